"""Parts of one kind by name, imported when they are asked for: the names are known without loading torch."""

from collections import UserDict
from functools import partial
from importlib import import_module

from utils.aliases import current_value


class Later:
    """A `functools.partial` of what stands at `place` ('package.module:object'), which is imported on first use."""

    def __init__(self, place: str, *arguments, **options):
        self.place, self.arguments, self.options = place, arguments, options


class Registry(UserDict):
    """A dict from names to parts. A part is the object itself, or the place it is imported from on first use, as
    'package.module:object' or `Later`; `data` holds these declarations as they were written. Former names
    find their part too, and are not listed."""

    def __getitem__(self, name: str):
        part = super().__getitem__(current_value("attack", name))
        if isinstance(part, Later):
            return partial(_imported(part.place), *part.arguments, **part.options)
        return _imported(part) if isinstance(part, str) else part


def _imported(place: str):
    module, _, attribute = place.partition(":")
    return getattr(import_module(module), attribute)
