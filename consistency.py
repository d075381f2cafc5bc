"""Same prediction for an image and its shuffled version?

python consistency.py --checkpoint F --data.path DIR --mask_ratios 0.5 --output DIR

Reads checkpoints of train.py, the official MJP code, timm and DeiT; runs under torchrun with the same numbers.
"""

from config import ConsistencyConfig
from eval.consistency import consistency
from eval.ratios import score_over_ratios
from utils.commandline import load
from utils.distributed import processes
from utils.errors import run_command
from utils.runs import open_run


def main(argv: list[str] | None = None) -> None:
    config, resolved = load(ConsistencyConfig, argv)
    folder = {"overwrite": config.overwrite, "inputs": (config.checkpoint, config.data.path, config.data.classes)}
    with processes(config.device) as peers, open_run(config.output, resolved, peers, **folder) as run:
        log = run.log if peers.is_main else None
        rows = score_over_ratios(
            consistency, peers, averaged=("diff_norm", "consistency"), log=log, **config.arguments()
        )
        run.log("mask ratio  diff_norm  consistency   (std)   images  skipped  seeds")
        for row in rows:
            run.log(
                "{mask_ratio:10.2f} {diff_norm:10.4f} {consistency:12.2f} {consistency_std:7.2f} "
                "{images:8d} {skipped:8d} {seeds:6d}".format(**row)
            )
        run.results({"consistency": rows})


if __name__ == "__main__":
    run_command(main)
