"""The model of an audit and the images it is measured on: its clients, their rounds, and what those tell at once."""

import copy
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from attacks.label_recovery import attributes_of, recover_class_features, recover_labels
from attacks.threat_model.client import Client, Round
from attacks.threat_model.knowledge import hidden_rows
from attacks.threat_model.local_step import multi_label
from attacks.threat_model.terms import Terms
from campaigns.sources import folder_labels, image_attributes
from campaigns.time_budget import TimeIsUp, stopped_after
from data.images import read_images
from defenses import build_defense
from models.jigsaw import Jigsaw
from models.position import new_pos_embed
from models.vit import VisionTransformer
from utils.errors import UserError
from utils.notes import Notes
from utils.statistics import describe

ATTRIBUTES = "attributes"  # rule for a model that tells attributes: their signs in the bias


class Subject:
    """The model and the images it is measured on. Labels are places of the class folders, or all different."""

    def __init__(self, model: nn.Module, paths: Sequence[Path], scale: dict, batch_size: int, seed: int, puzzle: dict):
        self.model, self.scale, self.batch_size, self.seed, self.puzzle = model, scale, batch_size, seed, puzzle
        self._client: Client | None = None
        self._rounds: dict[tuple[int, int], Round] = {}
        self.paths = list(paths)[: max(4 * batch_size, 4)]
        if len(self.paths) < batch_size:
            raise UserError(
                f"--batch_size {batch_size} is more than the {len(self.paths)} images of this audit: lower it, or give "
                f"--images a folder of more"
            )
        self.images = read_images(self.paths, model.arguments["image_size"], **scale).to(next(model.parameters()))
        self.folders: list[str] = []
        self.classes: dict = {}  # outputs by folder, or attributes by image

    def label(self, root: str, notes: Notes) -> None:
        """Label the images by their folders below `root`, or all differently where those name no classes; a model of
        attributes by its own predictions."""
        if multi_label(self.model):
            self.folders = [str(path) for path in self.paths]
            self.classes = image_attributes(self.model, None, self.paths, notes)
            return
        self.folders = [str(path.parent) for path in self.paths]
        self.classes = folder_labels(self.model, root, notes, "labelled differently, each from every other")
        if not self.classes:
            self.folders = [str(path) for path in self.paths]
            self.classes = {path: place for place, path in enumerate(self.folders)}

    def client(self, defence: str = "none", options: dict | None = None, mask_ratio: float = 0.0) -> Client:
        """Return a client that shares one gradient of the model, or of its MJP variant, and keeps the labels to
        itself."""
        model = masked_variant(self.model) if mask_ratio else self.model
        jigsaw = Jigsaw(self.model.grid, mask_ratio, **self.puzzle, seed=self.seed)
        terms = Terms(reveal_labels=False, **self.scale)
        return Client(model, jigsaw, build_defense(defence, options or {}), self.seed, terms, self.classes)

    def rounds(self, client: Client, batches: int, size: int | None = None) -> list[Round]:
        """Run rounds of the client on the first `batches` batches of the images; those of the last client are kept."""
        if self._client is not client:
            self._client, self._rounds = client, {}
        size = size or self.batch_size
        starts = range(0, max(1, len(self.images) - size + 1), size)[:batches]
        for at in starts:
            if (at, size) not in self._rounds:
                own = client.round(at, self.images[at : at + size], self.folders[at : at + size])
                self._rounds[at, size] = own
        fresh = [self._rounds[at, size] for at in starts]  # each attack draws from the start of its generator
        return [one._replace(generator=one.generator.clone_state()) for one in fresh]

    def labels_read(self, client: Client, rules: Sequence[str], *, singles: int, seconds: float) -> list[dict]:
        """Return for `singles` gradients of one image and one of all: the share of labels, or of attributes, that the
        rules find, in percent; what is found within so many seconds. rules: of label_recovery.recover_labels, or
        ATTRIBUTES."""
        rows: list[dict] = []
        with suppress(TimeIsUp), stopped_after(seconds):
            self._read_labels(client, rules, singles, rows)
        return rows

    def _read_labels(self, client: Client, rules: Sequence[str], singles: int, rows: list[dict]) -> None:
        """Append the rows of `labels_read` as they come."""
        for size in sorted({1, len(self.images)}):
            for rule in rules:
                shares, why = [], ""
                try:
                    shares = [share_read(one, rule) for one in self.rounds(client, singles, size)]
                except UserError as error:
                    why = str(error)
                rows.append({"images": size, "rule": rule, "read": describe(shares), "why": why})

    def features_open(self, client: Client, seconds: float) -> list[dict]:
        """Return for a gradient of one image and one of all: how many images the classifier's gradient gives the
        features, logits and labels of, proved without the truth; what is found within so many seconds."""
        rows: list[dict] = []
        with suppress(TimeIsUp), stopped_after(seconds):
            for size in sorted({1, len(self.images)}):
                (one, *_) = self.rounds(client, 1, size)
                found, why = None, ""
                try:
                    found = recover_class_features(one.leak, one.generator).found
                except UserError as error:
                    why = str(error)
                rows.append({"images": size, "open": found, "why": why})
        return rows

    def mask_read(self, mask_ratio: float) -> dict | None:
        """Return, of a step that MJP masks, the share of patches for which the gradient tells whether they were
        hidden; None where the model hides none, or the gradient of its positions is not shared."""
        if masked_variant(self.model) is None:
            return None
        right = []
        for one in self.rounds(self.client(mask_ratio=mask_ratio), 4):
            if (hidden := hidden_rows(one.leak)) is None:
                return None
            right.append(100 * float((hidden.cpu() == one.private.mask[0]).double().mean()))
        return {"mask_ratio": mask_ratio, "right": describe(right)}


def share_read(one: Round, rule: str) -> float:
    """Return the share of a batch's labels, or attributes, that the rule reads off its gradient, in percent."""
    if rule == ATTRIBUTES:
        return 100 * float((attributes_of(one.leak) == one.private.labels).double().mean())
    left = recover_labels(one.leak, rule, one.generator).tolist()
    labels = one.private.labels.tolist()
    return 100 * len([left.remove(label) is None for label in labels if label in left]) / len(labels)


def masked_variant(model: nn.Module) -> nn.Module | None:
    """Return the model with an unknown position embedding, as MJP trains it; None for models that cannot hide
    positions."""
    if getattr(model, "hides_positions", False):
        return model
    if not isinstance(model, VisionTransformer) or not isinstance(model.pos_embed, nn.Parameter):
        return None
    if model.pos_embed_rows is not None:
        return None
    model = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        row = new_pos_embed(1, model.embed_dim).detach().to(model.pos_embed)
        model.unknown_pos_embed = nn.Parameter(row)  # .to alone gives no parameter where it has to convert
    return model
