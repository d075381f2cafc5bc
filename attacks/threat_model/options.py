"""Options of the threat model: what attacker, victim and client do and know."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from attacks import ATTACKS
from attacks.malicious import SERVERS
from attacks.threat_model.sharing import SHARES
from attacks.threat_model.uses import KNOWLEDGE
from defenses import DEFENSES
from models.options import ModelName, TextModelName
from utils.checks import check, check_scale
from utils.commandline import plain
from utils.errors import UserError, did_you_mean
from utils.schema import refuse_changed

AttackName = Literal[tuple(ATTACKS)]
DefenseName = Literal[tuple(DEFENSES)]
ServerName = Literal[tuple(SERVERS)]
ShareName = Literal[tuple(SHARES)]


@dataclass(frozen=True, kw_only=True)
class AttackerOptions:
    """The attack, and what its attacker knows."""

    attack: AttackName = "closed_form"
    """Attack to run; each is a file of attacks/ with its paper's settings as defaults."""
    attack_options: dict = field(default_factory=dict)
    """Options of the attack, e.g. --attack_options.NAME VALUE."""
    labels: Literal["known", "hidden"] = "known"
    """Whether the attacker is told the labels (places of the class folders, else arg-max of the victim)."""
    attacker_knowledge: Literal[tuple(KNOWLEDGE)] = "method"
    """What the attacker knows of MJP: nothing, the code, also the mask, also the permutation."""
    server: ServerName = "honest"
    """What the server does to the model before it sends it out (attacks/malicious/); honest changes nothing."""
    server_options: dict = field(default_factory=dict)
    """Options of the server, e.g. --server_options.bins 512."""
    server_images: str | None = None
    """Folder of pictures of the same kind that a malicious server has; without, it assumes a normal distribution."""


@dataclass(frozen=True, kw_only=True)
class VictimOptions:
    """The model whose gradients are shared."""

    model: ModelName | TextModelName | str | None = None
    """Victim by name, randomly initialised (or give --checkpoint): one of ours, timm:NAME, torchvision:NAME,
    hf:NAME or hf:FOLDER with its weights, or FILE.py:FUNCTION, which runs the file."""
    model_options: dict = field(default_factory=dict)
    """Options of the model, e.g. --model_options.patch_size 8; `unknown` defaults to true when mask_ratio > 0."""
    checkpoint: str | None = None
    """Victim's weights: a checkpoint of train.py, the official MJP code, timm or DeiT; with --model timm:NAME and the
    like, a state dict of that model."""
    image_size: int | None = None
    """Side of the victim's input in pixels; default 224, or the checkpoint's."""
    mean: tuple[float, ...] | None = None
    """Channel means of pixels in [0, 1], or one for all; default the checkpoint's, or ImageNet's."""
    std: tuple[float, ...] | None = None
    """Channel standard deviations of pixels in [0, 1], or one for all; default the checkpoint's, or ImageNet's."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of the victim's gradient."""

    def check_victim(self, text: bool) -> None:
        """Raise UserError unless the victim is given once, and as one of images, or of text."""
        single = self.model is not None and ":" not in self.model
        neither, both = self.model is None and self.checkpoint is None, single and self.checkpoint is not None
        if neither or both:
            raise UserError("give the victim as --model NAME or as --checkpoint FILE, one of the two")
        if single:
            known = (*get_args(ModelName), *get_args(TextModelName))
            if self.model not in known:
                raise UserError(f"--model: unknown value '{self.model}': {did_you_mean(self.model, known)}")
        if self.model is not None and not self.model.startswith("hf:"):
            of_text = self.model in get_args(TextModelName)
            remedy = "" if text else ": attack a model of sentences by attack.py, with --data.kind text"
            check(text == of_text, "model", f"a model of {'sentences' if text else 'images'}{remedy}", self.model)
        check_scale(self.mean, self.std)
        for key in ("image_size", "seed", "name", "checkpoint"):
            check(key not in self.model_options, f"model_options.{key}", "given as an option of its own", "it here")

    def victim(self) -> dict:
        """Return the model whose gradients are shared: options of attacks.threat_model.victim.build_victim."""
        hides = {"unknown": True} if self.model and ":" not in self.model and self.mask_ratio > 0 else {}
        own = {"checkpoint": self.checkpoint, "name": self.model, "image_size": self.image_size, "seed": self.seed}
        return own | hides | plain(self.model_options)


@dataclass(frozen=True, kw_only=True)
class ClientOptions:
    """What the client does before it shares."""

    batch_size: int = 1
    """Images per gradient."""
    partition: Literal["listing", "class", "classes"] = "listing"
    """Images a client has: the next ones of the listing, those of one class folder, or each of another folder."""
    mask_ratio: float = 0.0
    """Share of the patches the victim masks and permutes (MJP); 0 is a plain step."""
    defense: DefenseName = "none"
    """What the victim does to its images before the step, or to the gradient before sharing it (defenses/)."""
    defense_options: dict = field(default_factory=dict)
    """Options of the defence, e.g. --defense_options.std 1e-3."""
    share: ShareName = "all"
    """What of the network the client trains and shares: all of it, its head, LoRA, adapters, all but positions."""
    share_options: dict = field(default_factory=dict)
    """Options of the shared part, e.g. --share_options.rank 64."""
    withhold: list[str] = field(default_factory=list)
    """Gradients the client keeps to itself: parameter names or patterns, e.g. pos_embed or 'head.*'."""
    local_steps: int = 1
    """FedAvg: SGD steps of the client before it shares its weight update; 1 shares a plain gradient (FedSGD)."""
    local_lr: float = 1e-3
    """FedAvg: learning rate of the client's steps."""
    local_batch_size: int | None = None
    """FedAvg: images per step of the client, in order and around the end; default all of batch_size."""
    local_shuffle: bool = False
    """FedAvg: the images have a new order in every epoch of the local steps, which the attacker is not told."""
    pretrain_steps: int = 0
    """Plain SGD steps that the victim has taken on the very images before the round (the hybrid attack's setting)."""
    pretrain_lr: float = 0.01
    """Learning rate of these steps."""
    label_flip: bool = False
    """The client trains every image as the class after its own: a dishonest server rotated the classifier's rows."""
    clients: int = 1
    """Secure aggregation: clients behind each leak, of batch_size images each; the server sees their mean alone."""
    client_weights: list[float] | None = None
    """Weights of the clients in that mean, e.g. 2,1,1, which the attacker knows; default their numbers of images."""
    client_dropout: float = 0.0
    """Share of the clients that drop out before a round ends, drawn anew each round; the server sees the others."""
    train_mode: bool = False
    """The client's model is in training mode: BatchNorm uses its batch, dropout is on (needs dropout_seed)."""
    dropout_seed: int | None = None
    """Seed of the client's dropout, which the attacker is then told."""
    share_statistics: bool = False
    """The client shares the BatchNorm statistics of its batch."""

    def check_client(self) -> None:
        """Raise UserError for what a client cannot do, and for options that would do nothing."""
        check(0 <= self.mask_ratio <= 1, "mask_ratio", "between 0 and 1", self.mask_ratio)
        for key in ("batch_size", "local_steps", "clients", "local_batch_size"):
            value = getattr(self, key)
            check(value is None or value >= 1, key, "at least 1", value)
        for key in ("local_lr", "pretrain_lr"):
            check(getattr(self, key) > 0, key, "above 0", getattr(self, key))
        if self.local_steps == 1:
            refuse_changed(self, "used with --local_steps above 1", ("local_lr", "local_batch_size", "local_shuffle"))
        check(self.pretrain_steps >= 0, "pretrain_steps", "0 or more", self.pretrain_steps)
        if self.pretrain_steps == 0:
            refuse_changed(self, "used with --pretrain_steps", ("pretrain_lr",))
        check(self.dropout_seed is None or self.train_mode, "dropout_seed", "used with --train_mode", self.dropout_seed)
        self._check_aggregate()

    def _check_aggregate(self) -> None:
        """Raise UserError for what a mean over several clients cannot be of."""
        weights, drops = self.client_weights, self.client_dropout > 0
        if weights is not None:
            rule = f"one number above 0 for each of --clients {self.clients}"
            fits = len(weights) == self.clients and all(0 < weight < float("inf") for weight in weights)
            check(fits, "client_weights", rule, ",".join(f"{weight:g}" for weight in weights) or "none")
        check(0 <= self.client_dropout < 1, "client_dropout", "from 0 to below 1", self.client_dropout)
        check(not drops or self.clients > 1, "client_dropout", "used with --clients", self.client_dropout)
        rule = "left out with --client_dropout: which clients are left differs from round to round"
        check(not drops or weights is None, "client_weights", rule, weights)
        if self.clients > 1:
            for key in ("dropout_seed", "share_statistics", "pretrain_steps"):
                check(not getattr(self, key), key, "left out with --clients, which have one each", getattr(self, key))
