"""Errors a user can act on: one line on stderr, exit status 2, no traceback."""

import difflib
import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
AGAIN = "what was finished is kept: where the script has it, continue with --resume auto"

TERMINAL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
LISTED = 60  # names in a message at most


class UserError(Exception):
    """Bad input. The message says what is wrong, where, and what to do, in one line.

    File names may hold anything; what a terminal would not print as itself is escaped. An error of a loader worker is
    raised again with that worker's whole traceback as its message, whose last line is the error.
    """

    def __init__(self, message: str):
        if "\nOriginal Traceback (most recent call last):" in message:
            message = message.strip().splitlines()[-1].removeprefix(f"{__name__}.{type(self).__name__}: ")
        super().__init__(printable(message))


class Stopped(Exception):  # noqa: N818, not an error
    """The run was asked to stop (SIGTERM) and has saved its state. The message says how to continue."""


def printable(text: str) -> str:
    """`text` in one line any terminal and any UTF-8 file takes: control characters and broken bytes are escaped."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode() for char in text
    )


def reason(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind where it has none: `shorten`ed, without the codes that
    colour terminals."""
    lines = TERMINAL.sub("", str(error)).strip().splitlines()
    return shorten(lines[0].strip()) if lines else type(error).__name__


def shorten(text: str, most: int = 160) -> str:
    """Return `text`, or as many of its whole sentences as fit into `most` characters; where its first is longer, that
    much of it up to a word and three dots."""
    if len(text) <= most:
        return text
    sentence = text[: most + 1].rfind(". ")
    return text[:sentence] if sentence > 0 else f"{text[: most - 4].rsplit(' ', 1)[0]} ..."


def not_empty(values: Sized, what: str) -> None:
    """Raise UserError where a number is asked of nothing: it would be NaN at best, and a perfect score at worst."""
    if not len(values):
        raise UserError(f"{what} of no images is not a number: check that there are any")


def did_you_mean(name: str, known: Iterable[str], most: int = LISTED) -> str:
    """The nearest known name as a question, or a list of at most `most` known names when nothing is near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known[:most])}{more}"


def look_up(registry: dict, name: str, what: str):
    """registry[name]; raises UserError naming the nearest entry when it is not there."""
    if name not in registry:
        raise UserError(f"unknown {what} '{name}': {did_you_mean(name, registry)}")
    return registry[name]


def explain(error: Exception) -> str | None:
    """What a failure of the machine means to the user; None for anything else, which is a bug and keeps its traceback.

    A disk that is full or cannot be used, a process of the run that died, memory that ran out.
    """
    text, kind = str(error), type(error).__name__
    if isinstance(error, OSError) and error.errno is not None:
        where = f" '{error.filename}'" if error.filename else ""
        remedy = "free space" if error.errno in FULL else "check the path, its permissions and its disk"
        return f"{error.strerror}{where}: {remedy}; {AGAIN}"
    if "DataLoader worker" in text:
        return f"a loader worker died ({reason(error)}): often memory, lower --data.workers or batch_size; {AGAIN}"
    if kind.startswith("Dist") or "gloo" in text or "onnection closed by peer" in text:
        return f"another process of this run ended or cannot be reached ({reason(error)}); {AGAIN}"
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "DefaultCPUAllocator" in text:
        return f"out of memory ({reason(error)}): lower the batch size or the size of the model; {AGAIN}"
    if isinstance(error, OSError):
        return f"{reason(error)}; {AGAIN}"
    return None


@contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """Inside the block SIGTERM raises Stopped, once; a training loop puts its own answer in the place of this one."""

    def stop(*_) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # launchers tend to send it twice
        raise Stopped(f"asked to stop by SIGTERM; {AGAIN}")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Around a script that fills a folder, and continues with what is there when it is started again."""
    try:
        yield
    except OSError as error:
        text = f"cannot prepare '{folder}' ({error}): free space or fix permissions and run this again"
        raise UserError(f"{text}, finished work is kept") from error


def run_command(main: Callable[[], None]) -> None:
    """Call an entry script's `main`; turn a UserError, or a failure of the machine, into one line and exit status 2."""
    try:
        with stop_on_sigterm():
            main()
    except UserError as error:
        fail(str(error), again=False)
    except Stopped as stop:
        print(f"stopped: {stop}", file=sys.stderr, flush=True)
        _do_not_restart()
        sys.exit(128 + signal.SIGTERM)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        fail(line)


def _do_not_restart() -> None:
    """Stop a torchrun that would start the processes again (--max-restarts): bad input stays bad, and who asked for an
    end wants one."""
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        os.kill(os.getppid(), signal.SIGTERM)


def fail(line: str, *, again: bool = True) -> None:
    """End with one line on stderr. again: a launcher that starts processes again may do so."""
    print(f"error: {printable(line)}", file=sys.stderr, flush=True)
    if not again:
        _do_not_restart()
    sys.exit(2)
