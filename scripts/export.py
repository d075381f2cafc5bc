"""Carry a checkpoint to where people work: a folder timm loads, ONNX, the official code.

    python scripts/export.py --checkpoint runs/mjp/last.pt --output exports/mjp [--formats timm onnx official]

Always writes model.safetensors, which `--checkpoint` of every script here reads, and README.md, the model card. `timm`
adds config.json: `import models.timm_names; timm.create_model('local-dir:exports/mjp', pretrained=True)`. `onnx` adds
model.onnx with inputs `images` and, where positions can be hidden, `mask`, for any batch size; it is kept only if
onnxruntime computes the same logits, and needs `pip install onnx onnxscript onnxruntime`. `official` adds official.pth
in the layout of the MJP authors' code.
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.transforms import IMAGENET_MEAN, IMAGENET_STD
from models.checkpoints import load_model, save_safetensors
from models.official import to_official
from models.timm_names import INPUTS, NAMES
from models.vit import SIZES, VisionTransformer
from utils.errors import UserError, run_command
from utils.files import write_atomic, write_json, write_text
from utils.tool_parser import ToolParser

FORMATS = ("timm", "onnx", "official")
TOLERANCE = 1e-4  # of the largest logit: what float32 kernels of two libraries may differ by
OPTIONS = ("unknown", "index_embed", "localization", "unit_targets", "positions", "tie", "april", "patch_size")


def write_timm(model: nn.Module, folder: Path) -> str:
    """Write config.json in the layout timm and the Hugging Face hub share. Raises UserError where timm has no name for
    it."""
    arguments = model.arguments
    if not isinstance(model, VisionTransformer) or arguments.get("bottleneck"):
        raise UserError(f"--formats timm: model '{arguments['name']}' is not a plain ViT, leave timm out")
    size, side = arguments["name"].removeprefix("deit_"), arguments["image_size"]
    shape = {"embed_dim": model.embed_dim, "depth": len(model.blocks), "num_heads": model.blocks[0].attn.num_heads}
    given = {"unknown": False} | {key: arguments[key] for key in OPTIONS if key in arguments}
    inputs = INPUTS | {"input_size": (3, side, side), "num_classes": model.num_classes} | normalization(model)
    config = {
        "architecture": NAMES[size if size in SIZES else "small"],
        "num_classes": model.num_classes,
        **({"label_names": list(model.classes)} if model.classes else {}),
        "model_args": {"img_size": side, **shape, **given},
        "pretrained_cfg": inputs,
    }
    write_json(folder / "config.json", config)
    return "import models.timm_names, timm\nmodel = timm.create_model('local-dir:FOLDER', pretrained=True)"


def write_onnx(model: nn.Module, folder: Path) -> str:
    """Write model.onnx and compare it with the model on batches of 1 and 3. Raises UserError where the logits
    differ."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401, what torch.onnx.export is built on
    except ImportError as error:
        raise UserError(f"--formats onnx needs {error.name}: pip install onnx onnxscript onnxruntime") from error
    generator = torch.Generator().manual_seed(0)
    example = random_inputs(model, 2, generator)
    batch = torch.export.Dim("batch", min=1)
    file = folder / "model.onnx"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "# The axis name: batch will not be used")  # both inputs share it
        torch.onnx.export(
            model, (), file, kwargs=example, dynamo=True, external_data=False, verbose=False,
            input_names=list(example), output_names=["logits"], dynamic_shapes={key: {0: batch} for key in example},
        )  # fmt: skip
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    worst = 0.0
    for number in (1, 3):
        inputs = random_inputs(model, number, generator)
        expected = model(**{"mask": None} | inputs)
        found = torch.from_numpy(session.run(None, {key: value.numpy() for key, value in inputs.items()})[0])
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    if not worst <= TOLERANCE:
        raise UserError(f"ONNX logits differ by {worst:.1e} of the largest (at most {TOLERANCE:g}): nothing written")
    names = ", ".join(f"'{key}': {key}" for key in example)
    return (
        f"session = onnxruntime.InferenceSession('model.onnx')  # logits within {worst:.0e} of torch's, relative\n"
        f"logits = session.run(None, {{{names}}})[0]  # float32 images{', bool mask' * ('mask' in example)}"
    )


def write_official(model: nn.Module, folder: Path) -> str:
    """Write official.pth. Raises UserError for what the official code does not have."""
    if not isinstance(model, VisionTransformer) or not model.hides_positions or model.arguments.get("bottleneck"):
        name = model.arguments["name"]
        raise UserError(
            f"--formats official: the official code has ViTs with an unknown position, '{name}' here is none"
        )
    content = {"model": to_official(model.state_dict())}
    write_atomic(folder / "official.pth", lambda file: torch.save(content, file))
    return "weights = torch.load('official.pth', weights_only=True)['model']"


WRITERS = {"timm": write_timm, "onnx": write_onnx, "official": write_official}


def normalization(model: nn.Module) -> dict[str, tuple[float, ...]]:
    normalize = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD} | (model.normalize or {})
    return {key: tuple(normalize[key]) for key in ("mean", "std")}


def random_inputs(model: nn.Module, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return images (B, 3, H, W) and, for models that hide positions, mask (B, N) bool."""
    side = model.arguments["image_size"]
    inputs = {"images": torch.randn(batch, 3, side, side, generator=generator)}
    if model.hides_positions:
        inputs["mask"] = torch.rand(batch, model.grid[0] * model.grid[1], generator=generator) < 0.3
    return inputs


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text()) if path.exists() else {}


def model_card(model: nn.Module, checkpoint: Path, uses: dict[str, str]) -> str:
    """Return the text of README.md: what the model is, how it was trained and scored as far as its run folder says, how
    to load it."""
    arguments, training = model.arguments, read(checkpoint.parent / "config.yaml")
    results = read(checkpoint.parent / "results.json")
    weights = sum(value.numel() for value in model.state_dict().values())
    shape = ", ".join(f"{key} {value}" for key, value in arguments.items() if key != "name")
    library = ["library_name: timm"] if "timm" in uses else []
    lines = ["---", "tags: [image-classification, masked-jigsaw-puzzle]", *library, "---", ""]
    lines += [f"# {arguments['name']}{' with MJP' if model.hides_positions else ''}", ""]
    lines += [f"{weights / 1e6:.2f} million numbers ({shape}).", "", "## Inputs", ""]
    side, inputs = arguments["image_size"], normalization(model)
    lines += [f"RGB, {side} x {side}, in [0, 1], then minus mean {inputs['mean']}, divided by std {inputs['std']}."]
    if model.hides_positions:
        rows, columns = model.grid
        lines += [
            f"`mask` (B, {rows * columns}), true where a patch of the {rows} x {columns} grid hides its position."
        ]
    lines += ["", "## Training and results", ""]
    if training:
        chosen = {name: training.get(name) for name in ("data", "augment", "jigsaw", "optim", "defense", "seed")}
        chosen["data"] = {key: value for key, value in (training.get("data") or {}).items() if key != "path"}
        lines += ["```yaml", yaml.safe_dump({k: v for k, v in chosen.items() if v}, sort_keys=False).strip(), "```"]
    else:
        lines += ["Not recorded: the checkpoint had no config.yaml beside it."]
    if results:
        lines += ["", "```json", json.dumps(results, indent=1), "```"]
    lines += ["", "## Loading", ""]
    for use in (f"model = models.checkpoints.load_model('model.safetensors')  # {arguments['name']}", *uses.values()):
        lines += ["```python", use, "```", ""]
    lines += [
        "## Limits",
        "",
        "Hidden positions do not make shared gradients private: an attacker who knows MJP reads the visible patches",
        "off them, and a step without a mask gives everything away. Measure before relying on it (`attack.py",
        "--attack mjp_aware`).",
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="of train.py, the official code, timm or DeiT")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; refused if it exists")
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=["timm"], help="default: timm")
    heads = "attention heads, of a checkpoint of others that does not say how many it has"
    parser.add_argument("--num_heads", type=int, metavar="N", help=heads)
    parser.add_argument("--ema", action="store_true", help="the averaged weights")
    given = parser.parse_args(argv)
    if given.output.exists() or given.output.is_symlink():
        raise UserError(f"'{given.output}' exists already: choose another --output")
    model = load_model(given.checkpoint, ema=given.ema, num_heads=given.num_heads)
    for sentence in model.assumed.values():
        print(f"assumed: {sentence}")
    place = next(path for path in given.output.absolute().parents if path.exists())
    with tempfile.TemporaryDirectory(dir=place, prefix=".export.") as temporary, torch.no_grad():
        folder = Path(temporary) / given.output.name  # takes its place only once it is whole
        folder.mkdir()
        uses = {name: WRITERS[name](model, folder) for name in given.formats}
        save_safetensors(folder / "model.safetensors", model)
        write_text(folder / "README.md", model_card(model, given.checkpoint, uses))
        given.output.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(given.output)
    print(f"wrote {', '.join(sorted(path.name for path in given.output.iterdir()))} to {given.output}")


if __name__ == "__main__":
    run_command(main)
