"""What ATS policies cost in accuracy: one training under each policy and seed, beside trainings without a policy.

    python scripts/ats_accuracy.py --data CIFAR10 --model convnet --width 16 --policies 24-38-20,7-4-15 --output DIR

Prints top-1 accuracy on DATA/val as a table, mean ± standard deviation over training seeds, and for every policy the
difference from no policy, seed by seed, with its interval (95 %, Student). results.json is written; every training is
kept, and a stopped one continues.
"""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from claim_numbers import bracketed

from defenses.ats.policies import parse
from reports.tables import Measured, Table, markdown
from utils.errors import CONTINUES, UserError, run_command
from utils.files import write_json
from utils.ownership import refuse_others
from utils.run_once import run_once
from utils.statistics import describe
from utils.tool_parser import ToolParser

SHAPES = {
    "vit": "--model.name=vit --model.patch_size=8 --model.embed_dim=96 --model.depth=3 --model.num_heads=3",
    "resnet20_4": "--model.name=resnet20_4",
    "convnet": "--model.name=convnet",
}
TRAINING = (
    "--data.image_size=32 --data.crop=false --data.batch_size=64 --data.workers=0 --augment.crop=padded "
    "--augment.repeats=1 --augment.rand_augment=null --augment.color_jitter=0 --augment.erasing=0 --optim.mixup=0 "
    "--optim.cutmix=0 --optim.warmup_epochs=1 --optim.lr=8e-3 --model.drop_path=0 --log.images_every=0 "
    "--data.mean=[0.4914,0.4822,0.4465] --data.std=[0.2470,0.2435,0.2616]"
)
PLAIN = "none"


def add_network(parser: ArgumentParser) -> None:
    """Add the options that say which network is trained, and on what."""
    parser.add_argument("--data", required=True, help="image folder with train/ and val/, such as CIFAR-10")
    parser.add_argument("--model", choices=SHAPES, default="resnet20_4", help="victim (default: resnet20_4)")
    parser.add_argument("--width", type=int, help="channels of the first stage (default: the model's, 64)")
    parser.add_argument("--train_images", type=int, default=4000, help="of every training (default: 4000)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")


def network_shape(given: Namespace) -> list[str]:
    """Return the options of train.py that give the network its shape."""
    return [*SHAPES[given.model].split(), *([f"--model.width={given.width}"] if given.width else [])]


def training_options(given: Namespace) -> list[str]:
    """Return the options of train.py, all but the number of epochs and the seed."""
    amp = ["--optim.amp=bf16"] if given.precision == "bf16" else []
    data = [f"--data.path={given.data}", f"--data.train_images={given.train_images}"]
    return [*TRAINING.split(), *network_shape(given), *data, f"--device={given.device}", *amp]


def accuracies(
    training: Sequence[str], epochs: int, seeds: int, chosen: Mapping[str, str], output: Path
) -> dict[str, list[float]]:
    """Return, and print, top-1 accuracies in percent of a training under each policy, one for each seed.

    chosen: the policies by name, '' for none; a training is kept in `output`/<name>/<seed>.
    """
    found = {}
    for name, policy in chosen.items():
        protect = ["--defense=ats", f"--defense_options.policies={policy}"] if policy else []
        scores = []
        for seed in range(seeds):
            options = [*training, *protect, f"--optim.epochs={epochs}", f"--seed={seed}"]
            scores.append(run_once("train.py", options, output / name.replace(" ", "_") / str(seed))["acc1"])
        spread = describe(scores)
        print(f"accuracy, {name} {policy}: {Measured(spread['mean'], spread['std'])} % (n = {len(scores)})")
        found[name] = scores
    return found


def arguments() -> Namespace:
    """Return the command line, its policies as a list; raises UserError where there is nothing to train or compare."""
    parser = ToolParser(description=__doc__)
    add_network(parser)
    parser.add_argument(
        "--policies", required=True, help="policies beside none, with commas between: 24-38-20,3-1-7+43-18-18"
    )
    parser.add_argument("--seeds", type=int, default=3, help="trainings under each policy (default: 3)")
    parser.add_argument("--epochs", type=int, default=10, help="of every training (default: 10)")
    parser.add_argument(
        "--precision", choices=("highest", "bf16"), default="highest", help="of the trainings (default: highest)"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder; what is finished there is kept")
    given = parser.parse_args()
    for name in ("seeds", "epochs", "train_images"):
        if getattr(given, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(given, name)}")
    given.policies = [policy for policy in given.policies.split(",") if policy != PLAIN]
    for policy in given.policies:
        parse(policy)  # before the trainings, not behind some of them
    return given


def as_table(found: dict[str, list[float]]) -> Table:
    """Return a row for each policy: its accuracies, and how far they are from those without one, seed by seed."""
    rows = []
    for policy, scores in found.items():
        spread = describe(scores)
        change = describe([one - other for one, other in zip(scores, found[PLAIN], strict=True)])
        changed = "" if policy == PLAIN else bracketed(change, "").strip()
        rows.append([f"`{policy}`", len(scores), Measured(spread["mean"], spread["std"]), changed])
    return Table(["policy", "n", "accuracy (%)", "difference from no policy [95 %]"], rows)


def main() -> None:
    given = arguments()
    refuse_others(given.output, ("results.json",), "this script")
    chosen = {PLAIN: ""} | {policy: policy for policy in given.policies}
    found = accuracies(training_options(given), given.epochs, given.seeds, chosen, given.output)
    print(markdown(as_table(found)))
    width = f" of width {given.width}" if given.width else ""
    setting = f"{given.model}{width}, {given.epochs} epochs on {given.train_images} images, {given.precision}"
    write_json(given.output / "results.json", {"setting": setting, "acc1": found})


if __name__ == "__main__":
    run_command(main, CONTINUES)
