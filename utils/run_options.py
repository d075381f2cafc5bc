"""Options of every script: where a run goes, and what fixes it (utils/runs.py)."""

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import ClassVar, TypeVar

from utils.checks import check

Part = TypeVar("Part")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a run goes, and what fixes it."""

    parts: ClassVar[dict] = {}
    output: str
    """Run folder to create."""
    seed: int = 0
    """Fixes everything that is drawn: weights, order, augmentation, masks, noise."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:i."""
    overwrite: bool = False
    """Discard the run that is in the output folder."""

    def __post_init__(self):
        check(0 <= self.seed < 2**63, "seed", "from 0 to 2^63 - 1", self.seed)
        known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device)
        check(known is not None, "device", "auto, cpu, cuda or cuda:i", f"'{self.device}'")
        getattr(super(), "__post_init__", lambda: None)()

    def part(self, kind: type[Part]) -> Part:
        """Return the options of one part: a `kind`, a dataclass, whose fields have the values they have here."""
        return kind(**{item.name: getattr(self, item.name) for item in fields(kind) if hasattr(self, item.name)})


def typed(config: RunOptions, keys: Iterable[str]) -> list[str]:
    """Return these options as one types them, those that are not as they are without being asked for."""
    usual = {item.name: item.default for item in fields(config)}
    found = []
    for key in keys:
        value = getattr(config, key)
        text = ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
        found += [f"--{key} {shlex.quote(text)}"] if value != usual[key] else []
    return found
