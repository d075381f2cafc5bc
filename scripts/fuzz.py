"""Coverage-guided fuzzing of what reads strangers' files, with atheris (`pip install atheris`, Linux, not required).

    python scripts/fuzz.py checkpoint -max_total_time=600
    python scripts/fuzz.py config CORPUS_FOLDER

Targets: `checkpoint` reads bytes as a checkpoint (the pickle machine behind weights_only is Python, and is
instrumented), `config` reads them as a YAML file of train.py. Anything but a result or a UserError of one printable
line is a finding, and the bytes are kept in crash-*. The other options are libFuzzer's.
"""

import pickle
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import jsonargparse  # noqa: F401, large and not what is looked at: not instrumented
import torch._weights_only_unpickler as machine

import models  # noqa: F401
from options import TrainConfig
from utils.errors import UserError

machine.Unpickler.load = atheris.instrument_func(machine.Unpickler.load)
with atheris.instrument_imports(include=["models.checkpoints", "models.archives", "utils.commandline"]):
    from models.checkpoints import load_model
    from utils.commandline import load

FILE = Path(tempfile.mkdtemp()) / "input"


def checkpoint(path: Path) -> None:
    load_model(path)


def config(path: Path) -> None:
    load(TrainConfig, ["--output", "run", "--config", str(path)])


TARGETS = {"checkpoint": checkpoint, "config": config}
SEEDS = {
    "checkpoint": [pickle.dumps({"model": {"head.weight": [1, 2.5, "text", (None, True)]}}, protocol=2)],
    "config": [b"model: {name: vit, depth: 3}\noptim: {lr: 1e-3, betas: [0.9, 0.99]}\n", b"a: &a [1]\nb: *a\n"],
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: python scripts/fuzz.py {'|'.join(TARGETS)} [libFuzzer options]")
    name = sys.argv.pop(1)

    def one_input(data: bytes) -> None:
        FILE.write_bytes(data)
        try:
            TARGETS[name](FILE)
        except UserError as error:
            if not str(error).isprintable():
                raise RuntimeError(f"not one printable line: {error!r}") from error
        except SystemExit as stop:
            if stop.code:
                raise

    corpus = FILE.parent / "seeds"
    corpus.mkdir()
    for number, seed in enumerate(SEEDS[name]):
        (corpus / str(number)).write_bytes(seed)
    atheris.Setup([*sys.argv, str(corpus)], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
