"""Accuracy of a checkpoint on clean and shuffled images, speed, or another suite: ImageNet-C, -A, -O, positions, ...

python eval.py --checkpoint F --data.path DIR --mask_ratios 0,0.5 --output DIR
python eval.py --suite imagenet-c --checkpoint F --data.path IMAGENET_C --output DIR
python eval.py --timm mixer_b16_224 --pretrained --data.path DIR --output DIR

Reads checkpoints of train.py, the official MJP code, timm and DeiT, and takes any classifier of timm by name.
Runs under torchrun with the same numbers.
Never `import eval`: the package eval/ answers to that name, and its modules hold the scores.
"""

from options import EvalConfig
from utils.commandline import read_options
from utils.errors import run_command
from utils.registry import Registry

SUITES = Registry(
    {
        "imagenet-c": "eval.mce:imagenet_c",
        "imagenet-a": "eval.natural:imagenet_a",
        "imagenet-o": "eval.natural:imagenet_o",
        "calibration": "eval.natural:labelled_set",
        "position": "eval.position:position_suite",
        "attention": "eval.attention:attention_suite",
        "throughput": "eval.throughput:throughput",
    }
)


def main(argv: list[str] | None = None) -> None:
    config, resolved = read_options(EvalConfig, argv)  # torch loads below: --help need not wait
    from eval.accuracy import accuracy
    from eval.ratios import score_over_ratios
    from eval.report import ratio_table
    from reports.tables import plain
    from utils.distributed import processes
    from utils.runs import open_run

    with processes(config.device) as peers, open_run(config.output, resolved, peers, **config.folder()) as run:
        run.start()
        log = run.log if peers.is_main else None
        if config.measured in SUITES:
            results = SUITES[config.measured](peers, log=log, notes=run.notes, **config.suite_arguments())
            run.figures(results.pop("figures", {}))
            run.results(results)
            return
        rows = score_over_ratios(
            accuracy, peers, averaged=("acc1", "acc5", "loss"), log=log, notes=run.notes, **config.arguments()
        )
        for line in plain(ratio_table(rows, {"acc1": "top-1 (%)", "acc5": "top-5 (%)", "loss": "loss (nats)"})):
            run.log(line)
        run.results({"accuracy": rows})


if __name__ == "__main__":
    run_command(main)
