"""torchrun without its own report: python -m utils.launch [options of torchrun] SCRIPT [options of the script]

What a script has to say it says in one line, and this ends with its exit status; torchrun would add a traceback of its
own and end with 1. Of several processes on this machine that end with an error or a signal one says so, for each time
they were started. A process that died without a word is named here. LOGLEVEL=INFO shows what torchrun does.
"""

import logging
import os
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import SHARED, UserError, ignore, reason, run_command

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> None:
    """Run torchrun's command line, and exit with what its processes have ended with."""
    from torch.distributed import run as torchrun  # takes seconds, in which Ctrl-C should be answered
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="launch.") as shared:
        os.environ[SHARED] = shared
        try:
            torchrun.run(torchrun.parse_args(sys.argv[1:]))
            status = 0
        except ChildFailedError as error:
            status = of_failures(error, spoken=any(Path(shared).glob("*.said")))
        except SignalException as stop:
            status = 128 + int(stop.sigval)
        except RendezvousError as error:
            raise UserError(f"the nodes did not meet ({reason(error)}): check MASTER, PORT and the network") from error
        finally:
            _ignore_more(SignalException)
            del os.environ[SHARED]
        told = Path(shared) / "status"  # by a process that then stopped torchrun
        status = int(told.read_text()) if told.exists() else status
    sys.exit(status)


def _ignore_more(raised: type[Exception]) -> None:
    """Ignore SIGTERM from here on, of which each process may have sent one. raised: by torchrun's handler, for one that
    is waiting."""
    while signal.getsignal(signal.SIGTERM) is not ignore:
        with suppress(raised):
            signal.signal(signal.SIGTERM, ignore)


def of_failures(error: "ChildFailedError", spoken: bool) -> int:
    """Return the exit status that stands for the failed processes: that of the first; name it where none has spoken."""
    rank, first = error.get_first_failure()
    if first.exitcode >= 0:
        return first.exitcode
    if not spoken:
        name = signal.Signals(-first.exitcode).name
        print(f"error: process {rank} was ended by {name}: often memory, lower --data.batch_size", file=sys.stderr)
    return 128 - first.exitcode


if __name__ == "__main__":
    run_command(main)
