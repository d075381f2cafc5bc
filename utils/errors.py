"""Errors a user can act on: one line on stderr, exit status 2, no traceback."""

import difflib
import errno
import itertools
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
AGAIN = "what was finished is kept: where the script has it, continue with --resume auto"

TERMINAL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SHARED = "LAUNCH_FOLDER"  # variable of utils.launch: a folder for the processes of a run on this machine

CONTINUES = "run the same command again, it continues where it was"  # remedy of `run_command`
PEER_ENDED = "another process of this run ended"

PATIENCE = 2.0  # seconds that a line waits which only follows from another process's
PARENT = os.getppid()  # the launcher, while it lives

LISTED = 40  # names in a message at most, where all are listed
MOST_BESIDE = 10_000  # names in a folder that a wrong path is compared with
CLOSEST = 4  # names in a message, where they are too many


class UserError(Exception):
    """Bad input. The message says what is wrong, where, and what to do, in one line.

    File names may hold anything; what a terminal would not print as itself is escaped. An error of a loader worker is
    raised again with that worker's whole traceback as its message, whose last line is the error.
    """

    def __init__(self, message: str):
        if "\nOriginal Traceback (most recent call last):" in message:
            message = message.strip().splitlines()[-1].removeprefix(f"{__name__}.{type(self).__name__}: ")
        super().__init__(printable(message))


class Stopped(KeyboardInterrupt):
    """The run was asked to stop by the signal `number`. The message says what is saved; remedy: how to go on from it.

    Not an Exception, so that nothing which deals with errors takes it for one.
    """

    def __init__(self, message: str, number: int = signal.SIGTERM, remedy: str = ""):
        super().__init__(message)
        self.number, self.remedy = number, remedy


class AlreadyFinished(Exception):  # noqa: N818, not an error
    """There is nothing left to do, and the run has said so: a command that meets it ends in order."""


def printable(text: str) -> str:
    """Return `text` in one line any terminal and any UTF-8 file takes: control characters and broken bytes are
    escaped."""
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


@contextmanager
def foreign(what: str, advice: str) -> Iterator[None]:
    """Turn what code that is not ours, such as a stranger's network, raises into one line.

    The line is `what`, the kind and first line of the exception, and `advice`. Failures of the machine, such as memory
    that ran out, and UserErrors pass as they are.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if explain(error) is not None:
            raise
        raise UserError(f"{what} ({kind_and_reason(error)}): {advice}") from error


def kind_and_reason(error: BaseException) -> str:
    """Return the kind of an exception and the first line of its message."""
    return f"{type(error).__name__}: {reason(error)}" if str(error).strip() else type(error).__name__


def not_empty(values: Sized, what: str) -> None:
    """Raise UserError where a number is asked of nothing: it would be NaN at best, and a perfect score at worst."""
    if not len(values):
        raise UserError(f"{what} of no images is not a number: check that there are any")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the nearest known name as a question; where none is near, all, or the closest of many."""
    known = list(known)
    if near := difflib.get_close_matches(name, known, n=1, cutoff=0.5):
        return f"did you mean '{near[0]}'?"
    if len(known) <= LISTED:
        return f"known: {', '.join(known)}"
    closest = difflib.get_close_matches(name, known, n=CLOSEST, cutoff=0.0)
    return f"no name is near it; of {len(known)}, the closest are {', '.join(closest)}"


def no_such_path(path: str | Path) -> str:
    """Return why a path that does not exist cannot be read: the nearest one that does, or what to do."""
    path = Path(path)
    parent, name = next((one.parent, one.name) for one in (path, *path.parents) if one.parent.exists())
    beside: list[str] = []
    with suppress(OSError):  # a folder that may not be read, or a file
        beside = [one.name for one in itertools.islice(parent.iterdir(), MOST_BESIDE)]
    near = difflib.get_close_matches(name, beside, n=1, cutoff=0.75)
    return f"'{path}' does not exist: " + (f"did you mean '{parent / near[0]}'?" if near else "check the path")


def look_up(registry: dict, name: str, what: str):
    """Return registry[name]; raises UserError naming the nearest entry when it is not there."""
    if name not in registry:
        raise UserError(f"unknown {what} '{name}': {did_you_mean(name, registry)}")
    return registry[name]


def explain(error: Exception) -> str | None:
    """Return what a failure of the machine means to the user; None for anything else: a bug, which keeps its traceback.

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
        return f"{PEER_ENDED} or cannot be reached ({reason(error)}); {AGAIN}"
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "DefaultCPUAllocator" in text:
        return f"out of memory ({reason(error)}): lower the batch size or the size of the model; {AGAIN}"
    if isinstance(error, OSError):
        return f"{reason(error)}; {AGAIN}"
    return None


def ignore(*_) -> None:
    """Ignore a signal. SIG_IGN would have Python report one that came together with the signal being handled."""


@contextmanager
def on_stop_signals(receive: Callable[[int], None]) -> Iterator[None]:
    """Let the first SIGTERM or SIGINT (Ctrl-C) inside the block call `receive` with its number.

    From then on SIGTERM is ignored, as launchers tend to send it twice, and SIGINT ends the process at once, whatever
    it is doing: who presses Ctrl-C again wants that, and files are either whole or absent.
    """

    def first(number: int, _) -> None:
        signal.signal(signal.SIGTERM, ignore)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        receive(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, first) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stop_at_once() -> Iterator[None]:
    """Raise Stopped where a stop signal comes inside the block; a training loop puts its own answer in the place of
    this one."""

    def stop(number: int) -> None:
        raise Stopped("", number)

    with on_stop_signals(stop):
        yield


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Guard a script that fills a folder, and continues with what is there when it is started again."""
    try:
        yield
    except OSError as error:
        text = f"cannot prepare '{folder}' ({error}): free space or fix permissions and run this again"
        raise UserError(f"{text}, finished work is kept") from error


def run_command(main: Callable[[], None], remedy: str = "") -> None:
    """Call an entry script's `main`; turn a UserError, or a failure of the machine, into one line and exit status 2,
    and a stop signal into one line and 128 + its number. remedy: how to go on then, if the script knows it best."""
    try:
        with stop_at_once():
            main()
    except UserError as error:
        fail(str(error), again=False)
    except Stopped as stop:
        by = {signal.SIGINT: "Ctrl-C (SIGINT)"}.get(stop.number, signal.Signals(stop.number).name)
        saved = f", {stop}" if str(stop) else ""
        follows = stop.number == signal.SIGTERM and not saved  # torchrun ends the others with it
        _say(f"stopped by {by}{saved}: {remedy or stop.remedy or 'run the same command again'}", follows)
        _end(128 + stop.number, again=follows)
    except KeyboardInterrupt:
        _end(128 + signal.SIGINT, again=False)
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        fail(line, follows=line.startswith(PEER_ENDED))


def fail(line: str, *, again: bool = True, follows: bool = False) -> None:
    """End with one line on stderr. again: a launcher that starts processes again may do so; follows: see `_say`."""
    _say(f"error: {printable(line)}", follows)
    _end(2, again)


def _say(line: str, follows: bool = False) -> None:
    """Print a line on stderr; of the processes that a launcher started on this machine, one speaks for all.

    follows: it only follows from the end of another one, which is given a moment to say why it ended.
    """
    if SHARED in os.environ:
        said = Path(os.environ[SHARED]) / f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}.said"
        end = time.monotonic() + PATIENCE * follows
        while time.monotonic() < end and not said.exists():
            time.sleep(0.05)
        try:
            said.touch(exist_ok=False)  # one process at a time can make it
        except (FileExistsError, FileNotFoundError):  # another one has spoken; the launcher has ended
            return
    # One write: torchrun starts Python unbuffered, and a process that it stops may not come to the end of the line.
    print(f"{line}\n", end="", file=sys.stderr, flush=True)


def _end(status: int, again: bool) -> None:
    """Exit. Unless `again`, stop a torchrun that would start the processes again (--max-restarts): bad input stays bad,
    and who asked for an end wants one."""
    if not again and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        if SHARED in os.environ:
            told = Path(os.environ[SHARED]) / "status"
            with suppress(FileNotFoundError, FileExistsError), open(told, "x") as file:  # the first one counts
                file.write(str(status))
        if os.getppid() == PARENT:
            os.kill(PARENT, signal.SIGTERM)
    sys.exit(status)
