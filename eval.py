"""Accuracy of a checkpoint on clean and shuffled images, or another suite: ImageNet-C, -A, -O, positions, attention.

python eval.py --checkpoint F --data.path DIR --mask_ratios 0,0.5 --output DIR
python eval.py --suite imagenet-c --checkpoint F --data.path IMAGENET_C --output DIR
python eval.py --timm mixer_b16_224 --pretrained --data.path DIR --output DIR

Reads checkpoints of train.py, the official MJP code, timm and DeiT, and takes any classifier of timm by name.
Runs under torchrun with the same numbers.
Never `import eval`: the package eval/ answers to that name, and its modules hold the scores.
"""

from config import EvalConfig
from eval.accuracy import accuracy
from eval.attention import attention_suite
from eval.mce import imagenet_c
from eval.natural import imagenet_a, imagenet_o, labelled_set
from eval.position import position_suite
from eval.ratios import score_over_ratios
from eval.report import ratio_table
from eval.tables import plain
from utils.commandline import load
from utils.distributed import processes
from utils.errors import run_command
from utils.runs import open_run

SUITES = {
    "imagenet-c": imagenet_c,
    "imagenet-a": imagenet_a,
    "imagenet-o": imagenet_o,
    "calibration": labelled_set,
    "position": position_suite,
    "attention": attention_suite,
}


def main(argv: list[str] | None = None) -> None:
    config, resolved = load(EvalConfig, argv)
    inputs = (config.checkpoint, config.data.path, config.data.classes, config.known)
    folder = {"overwrite": config.overwrite, "inputs": inputs}
    with processes(config.device) as peers, open_run(config.output, resolved, peers, **folder) as run:
        log = run.log if peers.is_main else None
        if config.suite in SUITES:
            results = SUITES[config.suite](peers, log=log, **config.suite_arguments())
            run.figures(results.pop("figures", {}))
            run.results(results)
            return
        rows = score_over_ratios(accuracy, peers, averaged=("acc1", "acc5", "loss"), log=log, **config.arguments())
        for line in plain(ratio_table(rows, {"acc1": "top-1 (%)", "acc5": "top-5 (%)", "loss": "loss (nats)"})):
            run.log(line)
        run.results({"accuracy": rows})


if __name__ == "__main__":
    run_command(main)
