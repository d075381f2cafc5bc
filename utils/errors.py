"""Errors a user can act on: one line on stderr, exit status 2, no traceback."""

import difflib
import signal
import sys
from collections.abc import Callable, Iterable

LISTED = 60  # names in a message at most


class UserError(Exception):
    """Bad input. The message says what is wrong, where, and what to do, in one line."""


class Stopped(Exception):  # noqa: N818, not an error
    """The run was asked to stop (SIGTERM) and has saved its state. The message says how to continue."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest known name as a question, or a list of known names when nothing is near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    more = f" and {len(known) - LISTED} more" if len(known) > LISTED else ""
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known[:LISTED])}{more}"


def look_up(registry: dict, name: str, what: str):
    """registry[name]; raises UserError naming the nearest entry when it is not there."""
    if name not in registry:
        raise UserError(f"unknown {what} '{name}': {did_you_mean(name, registry)}")
    return registry[name]


def run_command(main: Callable[[], None]) -> None:
    """Call an entry script's `main`; turn a UserError into its one line and exit status 2."""
    try:
        main()
    except UserError as error:
        # An error raised in a loader worker arrives wrapped in that worker's traceback; its last line is ours.
        line = str(error).strip().splitlines()[-1].removeprefix(f"{__name__}.UserError: ")
        print(f"error: {line}", file=sys.stderr, flush=True)
        sys.exit(2)
    except Stopped as stop:
        print(f"stopped: {stop}", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGTERM)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
