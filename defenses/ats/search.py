"""Search transformation policies by their privacy and accuracy scores: python -m defenses.ats.search --config FILE

Many processes share the candidates: torchrun --nproc_per_node 8 -m defenses.ats.search --config FILE. Every scored
policy is kept, so a stopped search continues with --resume auto. Writes policies.json into the run folder, best first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from data.folders import open_dataset
from data.inputs import input_scale
from data.outputs import class_outputs
from data.transforms import denormalize, eval_transform
from defenses.ats.policies import Policy, candidates, parse, transform, write
from defenses.ats.scores import accuracy_score, first_of_class, jacobian, privacy_curve, privacy_score, rank
from defenses.ats.transforms import LIBRARY
from models import build_model
from models.checkpoints import load_model
from utils.campaign import Campaign
from utils.commandline import load
from utils.distributed import processes
from utils.errors import UserError, run_command
from utils.files import write_json
from utils.notes import Notes
from utils.progress import track
from utils.runs import open_run
from utils.seeds import derive_seed


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Search transformation policies for a network and a data set (Automatic Transformation Search).

    The checkpoint is of a short training on a part of the data (train.py --data.train_images); the accuracy score uses
    the same architecture untrained.
    """

    parts: ClassVar[dict] = {}
    script: ClassVar[str] = "python -m defenses.ats.search"
    usage: ClassVar[str] = "python -m defenses.ats.search --checkpoint FILE --data DIR --output DIR"
    common: ClassVar[tuple[str, ...]] = (
        "output", "checkpoint", "data", "dataset", "policies", "number", "samples", "batch", "batches", "keep", "seed",
        "device", "resume", "overwrite",
    )  # fmt: skip
    output: str
    """Run folder to create; policies.json is written into it."""
    checkpoint: str
    """Semi-trained network for the privacy score."""
    data: str
    """Folder that holds the data set."""
    dataset: Literal["folder", "cifar10", "cifar100", "svhn", "flowers102", "domainnet"] = "folder"
    """Kind of data set; its validation split gives the images."""
    policies: list[str | int] | None = None
    """Score these policies instead of random candidates, e.g. 3-1-7,43-18-18."""
    number: int = 1500
    """Random candidates."""
    length: int = 3
    """Most operations in a candidate."""
    samples: int = 5
    """Images per class for the privacy score (the first of each)."""
    draws: int = 5
    """Noise images per image to average the privacy score over (official: 1, as noisy as top policies differ)."""
    batch: int = 100
    """Images N whose derivatives are correlated for the accuracy score."""
    batches: int = 10
    """Such batches to average over, of images spread evenly over the validation set."""
    first_of_class: bool = False
    """Count only the first image of each class in a batch, as the official code does; N then follows the data."""
    threshold: float | None = None
    """Lowest accuracy score, per image of a batch (-1 is the best); default the lowest quartile of the candidates. The
    paper's -85 for ResNet20-4 is -1.35 (of about 63 images); an untrained ViT has scores around -20."""
    weight: float = 0.7
    """Weight of the mean privacy score over classes; the rest goes to its variance. 1 is the order of CVPR 2021."""
    keep: int = 10
    """Policies listed as the best."""
    seed: int = 0
    """Fixes candidates, directions and noise; they depend on the image and the policy alone."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:i."""
    resume: Literal["never", "auto"] = "never"
    """auto: continue the unfinished search in the output folder, if there is one."""
    overwrite: bool = False
    """Discard the run that is in the output folder."""

    def __post_init__(self):
        for key in ("number", "length", "samples", "draws", "batches", "keep"):
            if getattr(self, key) < 1:
                raise UserError(f"--{key} must be at least 1, got {getattr(self, key)}")
        if self.batch < 2:
            raise UserError(f"--batch must be at least 2, got {self.batch}: one image has nothing to correlate with")


def first_of_every_class(labels: Sequence[int], number: int) -> list[int]:
    """Return places of the first `number` images of every class."""
    seen: dict[int, int] = {}
    places = []
    for place, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= number:
            places.append(place)
    return places


class Scorer:
    """Scores policies on fixed images; what is drawn depends on the seed, the image and the policy alone."""

    def __init__(self, config: SearchConfig, device: torch.device, notes: Notes):
        trained = load_model(config.checkpoint).to(device)
        self.trained, self.config, self.device = trained, config, device
        self.untrained = build_model(seed=config.seed, **trained.arguments).eval().to(device)
        self.normalize = input_scale(trained, None, None, notes)
        dataset = open_dataset(config.dataset, config.data, "val")
        labels = list(getattr(dataset, "targets", None) or getattr(dataset, "labels", None) or [y for _, y in dataset])
        outputs = class_outputs(trained.classes, trained.arguments["num_classes"], dataset.classes, notes)
        labels = [outputs[int(label)] for label in labels]
        fit = eval_transform(trained.arguments["image_size"], crop=False, **self.normalize)

        def read(places: Sequence[int]) -> tuple[Tensor, Tensor]:
            images = torch.stack([fit(dataset[place][0].convert("RGB")) for place in places])
            pixels = (denormalize(images, **self.normalize).clamp(0, 1) * 255).round().to(torch.uint8)
            return pixels, torch.tensor([int(labels[place]) for place in places])

        wanted = config.batch * config.batches
        if wanted > len(labels):
            raise UserError(f"--batch {config.batch} x --batches {config.batches} is more than {len(labels)} images")
        step = len(labels) // wanted
        order = torch.randperm(wanted, generator=torch.Generator().manual_seed(config.seed)).tolist()
        self.private = read(first_of_every_class(labels, config.samples))
        self.others = read([place * step for place in order])

    def _inputs(self, pixels: Tensor, policy: Policy, use: str) -> Tensor:
        """Return normalised images under one draw of the policy each."""
        changed = []
        for place, image in enumerate(pixels):
            seed = derive_seed(self.config.seed, use, place, write([policy]))
            changed.append(transform(image, [policy], torch.Generator().manual_seed(seed)))
        shape = (1, -1, 1, 1)
        mean, std = (torch.tensor(self.normalize[key]).view(shape) for key in ("mean", "std"))
        return ((torch.stack(changed).float() / 255 - mean) / std).to(self.device)

    def privacy(self, policy: Policy) -> list[float]:
        """Return the mean S_pri of every class; lower is more private."""
        images, labels = self._inputs(self.private[0], policy, "privacy"), self.private[1].to(self.device)
        total = torch.zeros(len(images))
        mean, std = (images.new_tensor(self.normalize[key]).view(-1, 1, 1) for key in ("mean", "std"))
        for draw in range(self.config.draws):
            seeds = [derive_seed(self.config.seed, "noise", place, draw) for place in range(len(images))]
            noise = torch.stack(
                [torch.rand(images.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            )
            curve = privacy_curve(self.trained, images, labels, (noise.to(images) - mean) / std)
            total += privacy_score(curve).cpu() / self.config.draws
        return [total[self.private[1] == label].mean().item() for label in self.private[1].unique()]

    def accuracy(self, policy: Policy) -> list[float]:
        """Return S_acc / N of every batch; higher is better, -1 at most."""
        scores = []
        for pixels, labels in zip(*(part.split(self.config.batch) for part in self.others), strict=True):
            rows = jacobian(self.untrained, self._inputs(pixels, policy, "accuracy"))
            rows = rows[first_of_class(labels)] if self.config.first_of_class else rows
            scores.append(accuracy_score(rows) / len(rows))
        return scores


def functions(policy: Policy) -> set[tuple[str, float]]:
    """Return what a policy does, whatever the index: entries of the library that are the same function count as one."""
    return {(LIBRARY[index].name, LIBRARY[index].magnitude) for index in policy}


def hybrid(ranked: list[Policy], parts: int = 2) -> list[Policy]:
    """Return the best policies no two of which share a function, best first."""
    chosen: list[Policy] = []
    for policy in ranked:
        if not any(functions(policy) & functions(other) for other in chosen):
            chosen.append(policy)
    return chosen[:parts]


def report(rows: list[dict], config: SearchConfig) -> dict:
    """Return what policies.json holds: the ranking, every score, and the hybrid to train with."""
    privacy, accuracy = (np.array([row[key] for row in rows]) for key in ("privacy", "accuracy"))
    lowest = float(np.quantile(accuracy.mean(axis=1), 0.25)) if config.threshold is None else config.threshold
    order = rank(privacy, accuracy, lowest, config.weight)

    def line(place: int, combined: float | None) -> dict:
        return {
            "policy": rows[place]["image"],
            "combined": combined,
            "privacy": float(privacy[place].mean()),
            "privacy_variance": float(privacy[place].var()),
            "accuracy": float(accuracy[place].mean()),
        }

    ranked = [parse(rows[place]["image"])[0] for place, _ in order]
    return {
        "best": [line(place, combined) for place, combined in order[: config.keep]],
        "hybrid": write(hybrid(ranked)),
        "threshold": lowest,
        "below_threshold": len(rows) - len(order),
        "policies": [line(place, dict(order).get(place)) for place in range(len(rows))],
    }


def main(argv: list[str] | None = None) -> None:
    config, resolved = load(SearchConfig, argv)
    if config.policies:
        chosen = [policy for text in config.policies for policy in parse(str(text))]
    else:
        chosen = candidates(config.number, torch.Generator().manual_seed(config.seed), config.length)
    chosen = list(dict.fromkeys(chosen))
    folder = {"overwrite": config.overwrite, "resume": config.resume == "auto", "state": "partial"}
    folder |= {"may_change": ("device", "keep"), "inputs": (config.checkpoint, config.data)}
    folder |= {"outputs": ("partial/*.jsonl", "policies.json")}
    with processes(config.device) as peers, open_run(config.output, resolved, peers, **folder) as run:
        scorer = Scorer(config, peers.device, run.notes)
        behind = [[Path(config.checkpoint)]] * len(chosen)  # a score of another network is not continued
        campaign = Campaign(run.folder, [write([policy]) for policy in chosen], peers, behind)
        run.start()
        if campaign.finished:
            run.log(f"continuing: {len(campaign.finished)} of {len(chosen)} policies are scored")
        groups = campaign.todo(1)
        for (batch,) in track(groups, len(groups), "search", run.log if peers.is_main else None):
            policy = chosen[batch[0]]
            scores = {"privacy": scorer.privacy(policy), "accuracy": scorer.accuracy(policy)}
            campaign.add(campaign.rows(batch, [scores], {}))
        if rows := campaign.merge():
            found = report(rows, config)
            write_json(run.folder / "policies.json", found)
            run.log("     combined  privacy  accuracy  policy")
            for place, row in enumerate(found["best"], 1):
                run.log(
                    f"{place:>3}  {row['combined']:8.4f} {row['privacy']:8.4f}  {row['accuracy']:8.3f}  {row['policy']}"
                )
            run.log(f"hybrid: {found['hybrid'] or 'no policy is above the threshold'}")
            run.results({key: found[key] for key in ("best", "hybrid", "threshold", "below_threshold")})
            campaign.close()


if __name__ == "__main__":
    run_command(main)
