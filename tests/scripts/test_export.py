"""An exported model is the same model: in timm, in onnxruntime, in the official layout, and read back here."""

import runpy
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch

import models.timm_names  # noqa: F401, registers its names with timm
from models import build_model
from models.checkpoints import load_model, save_checkpoint
from models.official import from_official

ROOT = Path(__file__).parents[2]
NORMALIZE = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


def saved(path: Path, **arguments):
    model = build_model(num_classes=3, **arguments).eval()
    content = {
        "arguments": model.arguments,
        "model": model.state_dict(),
        "normalize": NORMALIZE,
        "classes": ["a", "b", "c"],
    }
    save_checkpoint(path, content)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    shape = {"image_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 2}
    model = saved(folder / "last.pt", name="vit", unknown=True, localization="linear", **shape)
    main = runpy.run_path(str(ROOT / "scripts" / "export.py"), run_name="script_under_test")["main"]
    options = ["--checkpoint", str(folder / "last.pt"), "--output", str(folder / "out")]
    main([*options, "--formats", "timm", "onnx", "official"])
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, 32, 32, generator=generator)
    mask = torch.rand(3, 16, generator=generator) < 0.5
    with torch.no_grad():
        return folder / "out", images, mask, model(images, mask)


def test_timm_builds_the_exported_model(exported):
    folder, images, mask, logits = exported
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert model(images, mask).equal(logits)
    assert timm.data.resolve_model_data_config(model)["mean"] == list(NORMALIZE["mean"])


def test_onnxruntime_computes_the_same_logits_at_another_batch_size(exported):
    folder, images, mask, logits = exported
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": images.numpy(), "mask": mask.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), logits, rtol=1e-4, atol=1e-5)
    unmasked = session.run(None, {"images": images.numpy(), "mask": (mask & False).numpy()})[0]
    assert abs(unmasked - found).max() > 1e-3  # the mask is an input, not a constant


def test_the_official_layout_holds_the_same_weights(exported):
    folder, images, mask, logits = exported
    weights = torch.load(folder / "official.pth", weights_only=True)["model"]
    assert weights["pos_embed.weight"].shape == (18, 64)  # class token, 16 patches, the unknown row last
    assert from_official(weights).keys() == load_model(folder / "model.safetensors").state_dict().keys()


def test_safetensors_read_back_as_the_whole_checkpoint(exported):
    folder, images, mask, logits = exported
    model = load_model(folder / "model.safetensors")
    assert model(images, mask).equal(logits)
    assert model.normalize == {key: list(value) for key, value in NORMALIZE.items()}
    assert model.classes == ["a", "b", "c"]


def test_the_card_says_what_a_reader_needs(exported):
    card = (exported[0] / "README.md").read_text()
    for part in ("32 x 32", "(0.5, 0.4, 0.3)", "mask", "local-dir:", "onnxruntime", "official.pth", "no config.yaml"):
        assert part in card, part
    assert str(exported[0]) not in card


@pytest.mark.parametrize(
    ("name", "formats", "said"),
    [("lenet", ["timm"], "not a plain ViT"), ("lenet", ["official"], "ViTs with an unknown position")],
)
def test_a_format_that_does_not_fit_is_refused_and_leaves_nothing(call, tmp_path, name, formats, said):
    saved(tmp_path / "last.pt", name=name, image_size=32)
    options = ["--checkpoint", tmp_path / "last.pt", "--output", tmp_path / "out", "--formats", *formats]
    done = call("scripts/export.py", *options)
    assert done.status == 2 and said in done.err and len(done.err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_an_earlier_export_is_kept(call, exported):
    folder = exported[0]
    done = call("scripts/export.py", "--checkpoint", folder.parent / "last.pt", "--output", folder)
    assert done.status == 2 and "exists already" in done.err
