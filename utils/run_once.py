"""One entry script after the other in one process, each run kept: for scripts that make a table of many runs."""

import json
import runpy
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from utils.errors import AlreadyFinished

ROOT = Path(__file__).resolve().parents[1]


def run_once(main: str | Callable[[Sequence[str]], None], options: Sequence[str], output: Path) -> dict:
    """Return the results of an entry script (its file, as 'attack.py', or its `main`) with these options: it runs,
    continues a stopped run in `output`, or leaves a finished one as it is.

    Raises UserError where the folder holds a run with other options: no table is of two settings.
    """
    resume = "same" if main == "train.py" else "auto"  # attacks and searches refuse other options by themselves
    if isinstance(main, str):
        main = runpy.run_path(str(ROOT / main), run_name="run_once")["main"]
    with suppress(AlreadyFinished):
        main([*options, f"--resume={resume}", f"--output={output}"])
    return json.loads((output / "results.json").read_text())
