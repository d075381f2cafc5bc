"""Same prediction for an image and its shuffled version?

python consistency.py --checkpoint F --data.path DIR --mask_ratios 0.5 --output DIR
python consistency.py --timm mixer_b16_224 --pretrained --data.path DIR --mask_ratios 0.1,0.5 --seeds 3 --output DIR

Reads checkpoints of train.py, the official MJP code, timm and DeiT, and takes any classifier of timm by name.
Runs under torchrun with the same numbers.
"""

from options import ConsistencyConfig
from utils.commandline import read_options
from utils.errors import run_command


def main(argv: list[str] | None = None) -> None:
    config, resolved = read_options(ConsistencyConfig, argv)  # torch loads below: --help need not wait
    from eval.consistency import consistency
    from eval.ratios import score_over_ratios
    from eval.report import ratio_table
    from reports.tables import plain
    from utils.distributed import processes
    from utils.runs import open_run

    with processes(config.device) as peers, open_run(config.output, resolved, peers, **config.folder()) as run:
        run.start()
        log = run.log if peers.is_main else None
        rows = score_over_ratios(
            consistency, peers, averaged=("diff_norm", "consistency"), log=log, notes=run.notes, **config.arguments()
        )
        columns = {"consistency": "consistency (%)", "diff_norm": "feature difference norm"}
        for line in plain(ratio_table(rows, columns)):
            run.log(line)
        run.results({"consistency": rows})


if __name__ == "__main__":
    run_command(main)
