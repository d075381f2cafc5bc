"""Do policies ranked by ATS beat random ones? Scores against measured PSNR over random policies, with intervals.

    python scripts/ats_question.py --data CIFAR10 --model vit --attack closed_form --output runs/ats_vit
    python scripts/ats_question.py --data CIFAR10 --model convnet --output runs/ats_convnet

Trains the semi-trained network, scores random policies with defenses.ats.search, attacks the same network under each of
them (ViTs by the closed form, which takes seconds; any network with Inverting Gradients, at the options of
configs/attack/inverting_gradients.yaml), undoes the policy as an attacker who knows it would
(attacks/presets/ats_aware.py), and prints Spearman's rank correlation of S_pri with the PSNR, its 95 % interval by
bootstrap over policies, and what the best policies by rank leave against the rest. --also scores and attacks policies
of your choice beside the random ones, without counting them. --accuracy also trains under the best, the worst, the
hybrid and three random policies. results.json and policies.jpg are written; every step is kept, and a stopped run
continues. With more --policies a finished one scores all of them anew, and attacks those that it has not attacked.
"""

import json
import statistics
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml
from PIL import Image
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from ats_accuracy import TRAINING, accuracies, add_network, network_shape, training_options

from attacks.presets.ats_aware import undo
from defenses.ats.policies import parse
from defenses.ats.search import main as search
from eval.image_folders import read_image
from eval.psnr_ssim import psnr
from eval.reconstruction import mean_colour
from reports.charts import new_figure, picture_grid
from reports.tables import Measured
from utils.errors import CONTINUES, UserError, run_command
from utils.files import write_atomic, write_json
from utils.ownership import refuse_others
from utils.run_once import run_once
from utils.statistics import describe
from utils.tool_parser import ToolParser

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
MOST = 100.0  # dB of equal pictures
MEASURED = ("psnr_input", "above", "psnr", "aware")  # of a policy, in dB; see attack_policies


def aware(run: Path, policy: str) -> float:
    """Return the mean PSNR against the originals once the policy is undone, from the pictures of an attack; equal
    pictures count as MOST."""
    scores = []
    for file in sorted((run / "reconstructions").glob("*.png")):
        pixels = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)
        undone = undo(pixels, parse(policy))[0]
        found = psnr(undone[None] / 255, read_image(run / "originals" / file.name)[None]).item()
        scores.append(min(found, MOST))
    return statistics.fmean(scores)


def correlation(one: np.ndarray, other: np.ndarray, draws: int = 5000) -> tuple[float, float, float]:
    """Return (Spearman's rho, lower, upper end of its 95 % percentile interval by bootstrap over policies)."""
    rng, found = np.random.default_rng(0), []
    for _ in range(draws):
        chosen = rng.integers(0, len(one), len(one))
        if len(set(one[chosen])) > 1 and len(set(other[chosen])) > 1:
            found.append(spearmanr(one[chosen], other[chosen]).statistic)
    return float(spearmanr(one, other).statistic), *(float(end) for end in np.quantile(found, [0.025, 0.975]))


def arguments() -> Namespace:
    """Return the command line; raises UserError where attack and model do not go together."""
    parser = ToolParser(description=__doc__)
    add_network(parser)
    parser.add_argument("--policies", type=int, default=100, help="random policies (default: 100)")
    parser.add_argument("--images", type=int, default=20, help="images attacked per policy (default: 20)")
    attacks = ("inverting_gradients", "closed_form")
    parser.add_argument("--attack", choices=attacks, default=attacks[0], help=f"(default: {attacks[0]})")
    parser.add_argument("--iterations", type=int, default=500, help="of Inverting Gradients (default: 500)")
    parser.add_argument(
        "--precision", choices=("highest", "bf16"), default="highest", help="of training, matching (default: highest)"
    )
    parser.add_argument(
        "--untrained", action="store_true", help="attack the network's initial weights; S_pri stays the trained one's"
    )
    parser.add_argument("--draws", type=int, default=2, help="noise images per picture of S_pri (default: 2)")
    parser.add_argument("--also", default="", help="policies to score and attack beside the random ones: 3-1-7,7-4-15")
    parser.add_argument("--epochs", type=int, default=50, help="of the semi-trained network (default: 50)")
    parser.add_argument(
        "--accuracy", type=int, default=0, help="training seeds per policy for the accuracy (default: 0)"
    )
    parser.add_argument("--accuracy_epochs", type=int, default=10, help="epochs of those trainings (default: 10)")
    parser.add_argument("--output", type=Path, required=True, help="folder; what is finished there is kept")
    given = parser.parse_args()
    if given.policies < 4:
        raise UserError(f"--policies {given.policies}: a rank correlation with an interval takes 4 or more")
    if given.draws < 1:
        raise UserError(f"--draws {given.draws}: S_pri takes 1 noise image or more")
    counts = ("images", "iterations", "train_images", "epochs", "accuracy_epochs")
    for key in counts:  # of steps behind the training too
        if getattr(given, key) < 1:
            raise UserError(f"--{key} must be at least 1, got {getattr(given, key)}")
    if given.accuracy < 0:
        raise UserError(f"--accuracy must be 0 or more, got {given.accuracy}")
    for policy in filter(None, given.also.split(",")):
        parse(policy)  # before the training, not behind it
    if given.attack == "closed_form" and given.model != "vit":
        raise UserError(f"--attack closed_form reads position embeddings, and {given.model} has none: use --model vit")
    return given


def above_mean_colour(run: Path, scores: list[dict]) -> float:
    """Return how far the reconstructions are above the mean colour of what the model was shown, mean over pictures."""
    gains = []
    for row in scores:
        (file,) = (run / "inputs").glob(f"{row['index']:04d}_*.png")
        gains.append(row["psnr_shown"] - mean_colour(read_image(file)[None]).item())
    return statistics.fmean(gains)


def initial(data: str, shape: list[str]) -> list[str]:
    """Return options of attack.py for the network of these options of train.py with its initial weights."""
    name, *others = (part.removeprefix("--model.") for part in shape)
    scale = [
        part.replace("--data.", "--") for part in TRAINING.split() if part.startswith(("--data.mean", "--data.std"))
    ]
    classes = sum(path.is_dir() for path in (Path(data) / "train").iterdir())
    options = [f"num_classes={classes}", *others]
    return [
        f"--model={name.removeprefix('name=')}",
        *(f"--model_options.{part}" for part in options),
        "--image_size=32",
        *scale,
    ]


def attack_policies(given: Namespace, victim: list[str], policies: list[dict]) -> tuple[dict, list[dict]]:
    """Return the scores of the attack without a policy, and each policy's row with MEASURED: PSNR of the model's input,
    how far that is above the input's mean colour, PSNR of the original, and of the original once the policy is
    undone."""
    attack = [*victim, f"--images={given.data}/val", f"--num_images={given.images}", f"--attack={given.attack}",
              f"--device={given.device}", f"--victims_at_once={min(given.images, 8)}"]  # fmt: skip
    if given.attack == "inverting_gradients":
        options = yaml.safe_load((ROOT / "configs/attack/inverting_gradients.yaml").read_text())["attack_options"]
        options |= {"iterations": given.iterations, "precision": given.precision}
        attack += [f"--attack_options.{name}={value}" for name, value in options.items()]
    plain = run_once("attack.py", attack, given.output / "attack" / "none")["summary"]
    rows = []
    for row in policies:
        policy = row["policy"]
        protect = ["--defense=ats", f"--defense_options.policies={policy}"]
        run = given.output / "attack" / policy
        found = run_once("attack.py", [*attack, *protect], run)
        summary = found["summary"]
        psnrs = {
            "psnr_input": summary["psnr_shown"]["mean"],
            "above": above_mean_colour(run, found["per_image"]),
            "psnr": summary["psnr"]["mean"],
            "aware": aware(run, policy),
        }
        rows.append(row | psnrs)
    return plain, rows


def scored(given: Namespace, checkpoint: str, folder: Path, candidates: list[str]) -> dict:
    """Return what the search finds of its candidates."""
    run_once(
        search,
        [checkpoint, f"--data={given.data}", *candidates, "--samples=1", f"--draws={given.draws}", "--batch=50",
         "--batches=2", f"--device={given.device}"],
        folder,
    )  # fmt: skip
    return json.loads((folder / "policies.json").read_text())


def correlations(rows: list[dict]) -> dict[str, tuple[float, float, float]]:
    """Return, and print, how the scores of the search rank policies against what the attack recovers under each."""
    found = {}
    for score in ("privacy", "accuracy"):
        for key in MEASURED:
            values = correlation(*(np.array([row[name] for row in rows]) for name in (score, key)))
            found[f"{score} against {key}"] = values
            middle, low, high = values
            print(f"Spearman of {score} against {key}: {middle:.2f} [{low:.2f}, {high:.2f}], n = {len(rows)}")
    return found


def print_quarters(ranked: list[dict]) -> None:
    """Print what the attack recovers under the quarter of the policies that the search likes best, and the rest."""
    for name, part in (("best quarter by S_pri", ranked[: len(ranked) // 4]), ("the rest", ranked[len(ranked) // 4 :])):
        spreads = {key: describe([row[key] for row in part]) for key in MEASURED}
        texts = [f"{key} {Measured(one['mean'], one['std'], '.2f', '.2f')}" for key, one in spreads.items()]
        print(f"{name} (n = {len(part)}): {', '.join(texts)}")


def draw(attacks: Path, ranked: list[dict]) -> "Figure":
    """Return a figure of the pictures attacked: the original, without a policy, and under the policies of lowest and
    highest S_pri what the model was shown and what came back."""
    columns = [("originals", "none", "original"), ("reconstructions", "none", "no policy")]
    for which, row in (("lowest", ranked[0]), ("highest", ranked[-1])):
        policy = row["policy"]
        columns.append(("inputs", policy, f"{which} S_pri, {policy}:\nmodel's input"))
        columns.append(("reconstructions", policy, f"{which} S_pri, {policy}:\nreconstruction"))
    names = sorted(file.name for file in (attacks / "none" / "originals").glob("*.png"))[:8]
    rows = [
        [np.asarray(Image.open(attacks / policy / kind / name).convert("RGB")) for kind, policy, _ in columns]
        for name in names
    ]
    chart = new_figure(1.9 * len(columns), 1.6 * len(rows) + 0.5)
    picture_grid(rows, [title for *_, title in columns], chart)
    return chart


def save(chart: "Figure", file: Path) -> None:
    write_atomic(file, lambda path: chart.savefig(path, format="jpeg", dpi=110, pil_kwargs={"quality": 88}))


def semi_trained(given: Namespace, training: list[str]) -> str:
    """Return the option that names the checkpoint of the network which scores policies, trained if it is not there."""
    run_once("train.py", [*training, f"--optim.epochs={given.epochs}"], given.output / "semi")
    return f"--checkpoint={given.output / 'semi' / 'last.pt'}"


def main() -> None:
    given = arguments()
    refuse_others(given.output, ("results.json", "policies.jpg"), "this script")
    training = training_options(given)
    checkpoint = semi_trained(given, training)
    found = scored(given, checkpoint, given.output / f"search_{given.policies}", [f"--number={given.policies}"])
    victim = initial(given.data, network_shape(given)) if given.untrained else [checkpoint]
    plain, rows = attack_policies(given, victim, found["policies"])
    ranked = sorted(rows, key=lambda row: row["privacy"])
    name = f"{given.model}, initial weights" if given.untrained else given.model
    report = {
        "setting": f"{name}, {given.attack}, {given.images} images under each of {len(rows)} random policies",
        "none": {key: plain[key] for key in ("psnr", "psnr_shown", "psnr_baseline")},
        "policies": rows,
        **correlations(rows),
    }
    print_quarters(ranked)
    save(draw(given.output / "attack", ranked), given.output / "policies.jpg")
    if given.also:
        chosen = scored(given, checkpoint, given.output / "search_also", [f"--policies={given.also}"])
        report["also"] = attack_policies(given, victim, chosen["policies"])[1]
        for row in report["also"]:
            print(f"{row['policy']}: S_pri {row['privacy']:.3f}, " + ", ".join(f"{k} {row[k]:.2f}" for k in MEASURED))
    print(f"no policy: {plain['psnr']['mean']:.2f} dB; no leak: {plain['psnr_baseline']['mean']:.2f} dB")
    if given.accuracy:
        random = {f"random {row['policy']}": row["policy"] for row in found["policies"][:3]}
        chosen = {"none": "", "hybrid": found["hybrid"], "best": ranked[0]["policy"], "worst": ranked[-1]["policy"]}
        report["acc1"] = accuracies(
            training, given.accuracy_epochs, given.accuracy, chosen | random, given.output / "accuracy"
        )
    write_json(given.output / "results.json", report)


if __name__ == "__main__":
    run_command(main, CONTINUES)
