"""Parts of one kind by name, imported when they are asked for: the names are known without loading torch."""

from collections import UserDict
from importlib import import_module


class Registry(UserDict):
    """A dict from names to parts. A part is the object itself, or the place it is imported from on first use, as
    'package.module:object'; `data` holds these declarations as they were written."""

    def __getitem__(self, name: str):
        part = super().__getitem__(name)
        if not isinstance(part, str):
            return part
        module, _, attribute = part.partition(":")
        return getattr(import_module(module), attribute)
