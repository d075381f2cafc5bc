"""models/file_kinds.py: a file that is no checkpoint is called what it is."""

import gzip
import json
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models.checkpoints import load_model, save_checkpoint
from models.timm_models import open_timm
from tests.models.small_models import assert_same_weights, small
from utils.errors import UserError, reason, shorten


def zipped(path, *names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")


def tarred(path):
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "a.py")


def compressed(path):
    torch.save(small().state_dict(), path)
    path.write_bytes(gzip.compress(path.read_bytes()))


def onnx(path):
    path.write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x052.0.0" + bytes(100))


KINDS = {
    "Git LFS pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"),
        "git lfs pull",
    ),
    "an HTML page": (lambda path: path.write_text("\n <!DOCTYPE html><html><body>404"), "download the file itself"),
    "an XML page": (lambda path: path.write_text('<?xml version="1.0"?><Error/>'), "download the file again"),
    "a JSON text": (lambda path: path.write_text(json.dumps({"error": "no"})), "holds the weights"),
    "a gzip archive": (compressed, "unpack it"),
    "a tar archive": (tarred, "unpack it"),
    "a TorchScript archive": (lambda path: torch.jit.script(nn.Linear(2, 2)).save(path), "state_dict()"),
    "a NumPy archive (.npz)": (lambda path: np.savez(path.open("wb"), a=np.ones(2)), "--timm NAME"),
    "a NumPy array (.npy)": (lambda path: np.save(path.open("wb"), np.ones(2)), "state dict of torch"),
    "an ONNX file": (onnx, "state dict"),
    "an HDF5 file": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(50)), "state dict of torch"),
    "a zip archive of 'readme.txt' and 1 more": (lambda path: zipped(path, "readme.txt", "weights.bin"), "unpack it"),
    "it is empty": (lambda path: path.write_bytes(b""), "another file"),
    "truncated or not a checkpoint": (lambda path: path.write_text("just some words\n" * 20), "another file"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["model.pth", "model.bin"])
def test_files_are_called_what_they_are(tmp_path, kind, name):
    make, remedy = KINDS[kind]
    make(tmp_path / name)
    with pytest.raises(UserError) as caught:
        load_model(tmp_path / name)
    text = str(caught.value)
    assert kind in text and remedy in text and str(tmp_path / name) in text
    assert text.isprintable() and "[1m" not in text and "\\x1b" not in text and not text.endswith("...")


def test_weights_that_are_packed_or_cut_short_say_so(tmp_path):
    torch.save({"fc.qweight": torch.ones(2, dtype=torch.int32), "fc.scales": torch.ones(2)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="quantised weights \\('fc.qweight'\\): use the model before"):
        load_model(tmp_path / "a.pth")
    torch.save(small().state_dict(), tmp_path / "b.pth")
    (tmp_path / "b.pth").write_bytes((tmp_path / "b.pth").read_bytes()[:5000])
    with pytest.raises(UserError, match="truncated or not a checkpoint .its end is missing"):
        load_model(tmp_path / "b.pth")


def test_content_decides_and_not_the_name(tmp_path):
    model = small()
    save_file(model.state_dict(), tmp_path / "a.pth")
    torch.save(model.state_dict(), tmp_path / "b.safetensors")
    for name in ("a.pth", "b.safetensors"):
        assert_same_weights(load_model(tmp_path / name, num_heads=1), model.state_dict())


def test_a_run_folder_is_pointed_to_its_file(tmp_path):
    model = small()
    save_checkpoint(tmp_path / "best.pt", {"arguments": model.arguments, "model": model.state_dict()})
    with pytest.raises(UserError, match="did you mean '.*best.pt'"):
        load_model(tmp_path)


@pytest.mark.parametrize("changes", [{"pos_embed": None}, {"reg_token": torch.zeros(1, 1, 64)}, {"conv1.weight": None}])
def test_networks_that_timm_may_know_are_pointed_to_it(tmp_path, changes):
    weights = {"stem.weight": torch.ones(2)} if "conv1.weight" in changes else small().state_dict() | changes
    torch.save({"model": {k: v for k, v in weights.items() if v is not None}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="--timm NAME .* --model timm:NAME"):
        load_model(tmp_path / "a.pth", num_heads=1)
    torch.save({"model": {"stem.weight": torch.ones(2)}, "arch": "mixer_b16_224"}, tmp_path / "b.pth")
    with pytest.raises(UserError, match="pass --timm mixer_b16_224, or --model timm:mixer_b16_224"):
        load_model(tmp_path / "b.pth")


def test_messages_are_cut_between_sentences():
    long = "The first sentence is whole. " + "The second one goes on and on " * 20
    assert reason(ValueError(long)) == "The first sentence is whole"
    assert reason(ValueError("\x1b[1mbold\x1b[0m words")) == "bold words"
    assert shorten("word " * 100).endswith("word ...") and len(shorten("word " * 100)) <= 160
    assert shorten("short") == "short"


def google(weights: dict[str, torch.Tensor], heads: int) -> dict[str, np.ndarray]:
    """A ViT of timm in the layout of Google's files."""
    found = {"cls": weights["cls_token"], "Transformer/posembed_input/pos_embedding": weights["pos_embed"]}
    found |= {"embedding/kernel": weights["patch_embed.proj.weight"].permute(2, 3, 1, 0)}
    found |= {"embedding/bias": weights["patch_embed.proj.bias"], "head/bias": weights["head.bias"]}
    found |= {"head/kernel": weights["head.weight"].T}
    found |= {f"Transformer/encoder_norm/{new}": weights[f"norm.{old}"] for new, old in NORM.items()}
    for number in range(len({name.split(".")[1] for name in weights if name.startswith("blocks.")})):
        block, ours = f"Transformer/encoderblock_{number}", f"blocks.{number}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        matrices, biases = weights[f"{ours}.attn.qkv.weight"].chunk(3), weights[f"{ours}.attn.qkv.bias"].chunk(3)
        for part, matrix, bias in zip(("query", "key", "value"), matrices, biases, strict=True):
            found[f"{attention}/{part}/kernel"] = matrix.T.unflatten(1, (heads, -1))
            found[f"{attention}/{part}/bias"] = bias.unflatten(0, (heads, -1))
        found[f"{attention}/out/kernel"] = weights[f"{ours}.attn.proj.weight"].T.unflatten(0, (heads, -1))
        found[f"{attention}/out/bias"] = weights[f"{ours}.attn.proj.bias"]
        for place in (0, 1):
            found[f"{block}/MlpBlock_3/Dense_{place}/kernel"] = weights[f"{ours}.mlp.fc{place + 1}.weight"].T
            found[f"{block}/MlpBlock_3/Dense_{place}/bias"] = weights[f"{ours}.mlp.fc{place + 1}.bias"]
            norms = {
                f"{block}/LayerNorm_{2 * place}/{new}": f"{ours}.norm{place + 1}.{old}" for new, old in NORM.items()
            }
            found |= {new: weights[old] for new, old in norms.items()}
    return {name: value.numpy() for name, value in found.items()}


NORM = {"scale": "weight", "bias": "bias"}


def test_an_npz_opens_in_a_timm_model(tmp_path):
    model = open_timm("test_vit", seed=3)
    np.savez(tmp_path / "a.npz", **google(model.network.state_dict(), 2))
    assert_same_weights(open_timm("test_vit", checkpoint=tmp_path / "a.npz").network, model.network.state_dict())
    np.savez(tmp_path / "b.npz", a=np.ones(2))
    with pytest.raises(UserError, match="--timm NAME .* with this file as --checkpoint"):
        load_model(tmp_path / "b.npz")
    with pytest.raises(UserError, match="b.npz' does not fit timm model 'test_vit'"):
        open_timm("test_vit", checkpoint=tmp_path / "b.npz")
    with pytest.raises(UserError, match="c.npz' does not exist"):
        open_timm("test_vit", checkpoint=tmp_path / "c.npz")
