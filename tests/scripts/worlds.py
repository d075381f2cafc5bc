"""Scripts one after another in the same processes: torchrun ... tests/scripts/worlds.py JOBS.json (command lines).

One launch for all of them, because starting torch takes longer than any. They share one process group. A module is
named as python -m takes it.
"""

import importlib
import json
import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


def run_jobs(path: Path) -> None:
    for script, *arguments in json.loads(path.read_text()):
        if script.endswith(".py"):
            runpy.run_path(str(ROOT / script), run_name="script_under_test")["main"](arguments)
        else:
            importlib.import_module(script).main(arguments)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")  # once: the store of a torchrun does for one group
    dist.init_process_group = dist.destroy_process_group = lambda *_: None
    run_jobs(Path(sys.argv[1]))
