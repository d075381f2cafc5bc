"""What a file is that was given as a checkpoint and is none, told by its first bytes, and what to do about it."""

import json
import struct
import zipfile
from pathlib import Path

HEAD = 1024  # bytes looked at
SAVED = ("model.safetensors", "pytorch_model.bin")  # what a folder of HuggingFace or timm holds its weights in
TIMM = "a network of timm loads with --timm NAME (eval.py, consistency.py) or --model timm:NAME (attack.py, audit.py)"

# First bytes, what such a file is, what to do. Texts are compared in lower case, without white space before them.
BYTES = (
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
    (b"BZh", "a bzip2 archive", "unpack it"),
    (b"\xfd7zXZ", "an xz archive", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it"),
    (b"Rar!", "a RAR archive", "unpack it"),
    (b"\x89HDF", "an HDF5 file, as Keras writes", "convert it to a state dict of torch"),
    (b"\x93NUMPY", "a NumPy array (.npy)", "convert it to a state dict of torch"),
    (b"GGUF", "a GGUF file of quantised weights", "use the weights it was made from"),
)
TEXTS = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the weights",
        "run 'git lfs pull' or download it",
    ),
    (b"<!doctype html", "an HTML page", "download the file itself, not the page about it"),
    (b"<html", "an HTML page", "download the file itself, not the page about it"),
    (b"<?xml", "an XML page, as servers answer with when there is an error", "download the file again"),
)
ZIPS = (  # a name in the archive, what it is, what to do
    ("constants.pkl", "a TorchScript archive, which is a program", "save the module's state_dict() with torch.save"),
    ("serialized_exported_program.json", "a program of torch.export", "save the module's state_dict() with torch.save"),
    ("models/model.json", "a program of torch.export", "save the module's state_dict() with torch.save"),
)


def foreign_kind(path: Path) -> tuple[str, str] | None:
    """Return (what the file is, what to do) where it is recognised as something else than weights, else None."""
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if is_safetensors(path) and head[8:9] == b"{":
        return None
    for start, what, remedy in BYTES:
        if head.startswith(start):
            return what, remedy
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for start, what, remedy in TEXTS:
        if text.startswith(start):
            return what, remedy
    if head[257:262] == b"ustar":
        return "a tar archive", "unpack it"
    if path.suffix == ".onnx" or (len(head) > 2 and head[0] == 8 and 1 <= head[1] <= 30 and head[2] == 0x12):
        return "an ONNX file, which is a program", "use the state dict of the torch model it was exported from"
    if text[:1] in (b"{", b"[") and _is_json(path):
        return "a JSON text", "give the file that holds the weights"
    return _zip_kind(path)


def _zip_kind(path: Path) -> tuple[str, str] | None:
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    inner = [name.split("/", 1)[-1] for name in names]  # torch puts one folder around everything
    for mark, what, remedy in ZIPS:
        if mark in inner or mark in names:
            return what, remedy
    if "data.pkl" in inner:
        return None
    if names and all(name.endswith(".npy") for name in names):
        if any(name.endswith("embedding/kernel.npy") for name in names):
            return None
        return "a NumPy archive (.npz) that is no ViT of Google's JAX code", f"{TIMM}, with this file as --checkpoint"
    some = f" of '{names[0]}'" + (f" and {len(names) - 1} more files" if len(names) > 1 else "") if names else ""
    return f"a zip archive{some}", "unpack it and give the file that holds the weights"


def is_safetensors(path: Path) -> bool:
    """Return whether a file is meant to be safetensors: by its name, unless it is torch's archive, or by its first
    bytes, which are the length of a header and a header in JSON."""
    with open(path, "rb") as file:
        head = file.read(9)
    if path.suffix == ".safetensors":
        return not head.startswith(b"PK")
    return len(head) == 9 and head[8:] == b"{" and struct.unpack("<Q", head[:8])[0] < path.stat().st_size


def _is_json(path: Path) -> bool:
    if path.stat().st_size > 1 << 24:
        return False
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return True
