"""Load torchvision and timm without the machinery of torch.compile, which takes as long to import as torch itself.

One function of torchvision's detection models comes from torch._dynamo, and timm marks methods of one model as not to
be compiled by a decorator that loads it. That is 800 modules (1.6 s of a core) which no attack and no evaluation uses.
While the two are first imported, a stand-in takes the function's place, which asks the real one when it is called, and
torch's own late decorator that of the early one. Every command imports this module once its options are read.
"""

import sys
from contextlib import suppress
from importlib import import_module
from types import ModuleType
from unittest.mock import patch

import torch
from torch._compile import _disable_dynamo

COMPILER = ("torch._dynamo", "torch._dynamo.utils")


def _is_compile_supported(device_type: str) -> bool:
    """Return whether torch.compile supports a kind of device, as torch._dynamo.utils says."""
    return import_module("torch._dynamo.utils").is_compile_supported(device_type)


def _disable(function=None, recursive: bool = True, *, reason: str | None = None):  # noqa: ARG001, as the real one
    """Return the function as torch.compiler.disable does, which is asked when it is first called."""
    return _disable_dynamo(function, recursive)


def _load() -> None:
    """Import torchvision and timm, unless one of them or torch._dynamo is loaded already."""
    if {*COMPILER, "torchvision", "timm"} & set(sys.modules):
        return
    package, functions = (ModuleType(name) for name in COMPILER)
    package.__path__, functions.is_compile_supported = [], _is_compile_supported
    sys.modules.update(zip(COMPILER, (package, functions), strict=True))
    try:
        with suppress(AttributeError, ImportError):  # of a version that wants more of torch._dynamo: loaded as it is
            import_module("torchvision")
    finally:
        for name in COMPILER:
            del sys.modules[name]
    with patch.object(torch.compiler, "disable", _disable):
        import_module("timm")


_load()
