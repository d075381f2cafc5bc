"""Reading what torch.save wrote without running anything in it: the classes that may stand in a file, and messages."""

import argparse
import collections
import datetime
import pathlib
import pickle
import re
import types
import zipfile
from pathlib import Path

import numpy as np
import torch

from utils.errors import UserError, reason

# What training scripts put beside weights, and the inert class it becomes here. None of these runs code of the file:
# containers, numbers and dates as they are; configurations of other libraries as dicts; paths without a file system.
DICTS = (
    "yacs.config.CfgNode",
    "easydict.EasyDict",
    "addict.addict.Dict",
    "ml_collections.config_dict.config_dict.ConfigDict",
    "mmengine.config.config.ConfigDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
)
PATHS = {
    "PosixPath": pathlib.PurePosixPath,
    "WindowsPath": pathlib.PureWindowsPath,
    "PurePosixPath": pathlib.PurePosixPath,
    "PureWindowsPath": pathlib.PureWindowsPath,
}
PLAIN = (argparse.Namespace, types.SimpleNamespace, frozenset, dict, list, tuple, int, float, str, bool,
         datetime.date, datetime.datetime, datetime.timedelta, datetime.timezone)  # fmt: skip
NUMPY_TYPES = {type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdFDSU"}
MODELS = ("torch.nn.", "timm.", "torchvision.", "transformers.", "__main__.", "models.")  # whose classes are networks


class Array:
    """Stands for a NumPy array of numbers in a file: no more memory is given to it than the file has bytes of it."""

    values = np.zeros(0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, by_columns, data = state
        self.values = _from_bytes(dtype, data).reshape(shape, order="F" if by_columns else "C")


def _plain_dict(*_) -> dict:
    """Take the place of defaultdict, which torch's reader does not fill."""
    return {}


def _plain_list(*items) -> list:
    """Take the place of deque, likewise."""
    return list(items[0]) if items else []


def _new_array(*_) -> Array:
    """Take the place of NumPy's _reconstruct, whose shape could ask for any amount of memory."""
    return Array()


def _scalar(dtype: np.dtype, data: bytes) -> object:
    """Take the place of NumPy's scalar: the number in Python."""
    return _from_bytes(dtype, data)[0].item()


def _from_bytes(dtype: np.dtype, data: bytes) -> np.ndarray:
    if dtype.hasobject:
        raise ValueError("an array of Python objects")
    return np.frombuffer(data, dtype)


def harmless() -> list:
    """Return the allow-list as torch.serialization.safe_globals takes it."""
    arrays = [(function, f"numpy.{module}.multiarray.{name}")
              for function, name in ((_scalar, "scalar"), (_new_array, "_reconstruct"))
              for module in ("core", "_core")]  # fmt: skip
    arrays += [(Array, "numpy.ndarray"), (np.dtype, "numpy.dtype")]
    arrays += [(kind, f"numpy.dtypes.{kind.__name__}") for kind in NUMPY_TYPES]
    paths = [(kind, f"{module}.{name}") for name, kind in PATHS.items() for module in ("pathlib", "pathlib._local")]
    filled = [(_plain_dict, "collections.defaultdict"), (_plain_list, "collections.deque")]
    return [*PLAIN, *filled, *((collections.OrderedDict, name) for name in DICTS), *arrays, *paths]


def unpickle(path: Path) -> object:
    """Return the content of a file of torch.save, on the CPU. Raises UserError naming a class that is not harmless."""
    with open(path, "rb") as file:
        if file.read(4) == b"PK\x03\x04" and not zipfile.is_zipfile(path):
            raise ValueError("its end is missing: a copy or a download was cut short")
    try:
        with torch.serialization.safe_globals(harmless()), open(path, "rb") as file:  # by a path's suffix torch guesses
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|class|function|type) '?([A-Za-z_]\w*(?:\.\w+)+)", str(error))
        if found is None:
            raise ValueError(_problem(error)) from error
        name = found[1]
        if name.startswith("__torch__.") or "quantized" in name:
            what, remedy = f"quantised weights ('{name}')", "use the model before quantisation"
        elif name.startswith(MODELS):
            what, remedy = f"a whole pickled model ('{name}')", "save its state_dict() with torch.save"
        else:
            what, remedy = f"an object of '{name}'", "save the model's state_dict() alone"
        raise UserError(
            f"checkpoint '{path}' holds {what}, whose reading could run code, and is refused: {remedy}"
        ) from error


class _ArraysOnly(pickle.Unpickler):
    """Reads dicts, lists, numbers, texts and NumPy arrays of numbers; any other class in the file ends it."""

    KNOWN = {("numpy", "ndarray"): Array, ("numpy", "dtype"): np.dtype} | {
        (f"numpy.{module}.multiarray", "_reconstruct"): _new_array for module in ("core", "_core")
    }

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"it names '{module}.{name}', whose reading could run code")
        return self.KNOWN[module, name]


def unpickle_arrays(path: Path) -> object:
    """Return the content of a file of Python's pickle that holds NumPy arrays in dicts and lists, and runs nothing in
    it. Raises UserError for any other content."""
    try:
        with open(path, "rb") as file:
            return _plain(_ArraysOnly(file).load())
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"'{path}' is no pickle of plain arrays ({reason(error)}): use another file") from error


def _plain(value: object) -> object:
    """Return nested dicts and lists with the arrays themselves."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.values if isinstance(value, Array) else value


def _problem(error: Exception) -> str:
    """Return what torch's reader found, without its advice to read the file unsafely."""
    found = re.search(r"WeightsUnpickler error: ([^\n]+)", str(error))
    return reason(ValueError(found[1])) if found else "its bytes are not those of torch.save"
