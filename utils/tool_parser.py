"""The options of small tools (`python -m eval.mse`, scripts/*.py): argparse with the project's errors and spelling."""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence

from utils.errors import UserError, did_you_mean


class ToolParser(ArgumentParser):
    """argparse whose options may be written with hyphens or underscores, and whose errors are one line (UserError)."""

    def __init__(self, **options):
        super().__init__(**{"formatter_class": RawDescriptionHelpFormatter, "allow_abbrev": False} | options)

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Namespace | None = None) -> Namespace:
        words = [_underscored(word) for word in (sys.argv[1:] if args is None else args)]
        options = [name for name in self._option_string_actions if name.startswith("--")]
        for name in (word.partition("=")[0] for word in words if word.startswith("--") and word != "--"):
            if name not in options:  # said first: argparse would complain of the option that it was meant to be
                self.error(f"unknown option '{name}': {did_you_mean(name, options)}")
        found, unknown = self.parse_known_args(words, namespace)
        if unknown:
            self.error(f"unexpected '{unknown[0]}'")
        return found


def _underscored(word: str) -> str:
    """Return an option with underscores in its name; other words, and values after '=', as they are."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") and len(word) > 2 else word
