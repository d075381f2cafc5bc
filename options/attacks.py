"""Options of attack.py."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from attacks import ATTACKS, SENTENCES
from attacks.malicious import SERVERS
from attacks.threat_model.options import AttackerOptions, ClientOptions, VictimOptions
from attacks.threat_model.sharing import SHARES
from attacks.threat_model.uses import KNOWLEDGE
from campaigns.options import PrivateOptions, ScoreOptions
from defenses import DEFENSES
from models.options import MaskOptions
from options.audit import AuditConfig
from utils.checks import check
from utils.errors import UserError
from utils.ownership import CURVES, PICTURES, REPORT
from utils.run_options import RunOptions, typed
from utils.schema import refuse_changed

if TYPE_CHECKING:
    from attacks.threat_model.terms import Terms

PLAIN_STEP = {  # which an audit and --metric_only are about
    "defense": "none",
    "withhold": [],
    "local_steps": 1,
    "pretrain_steps": 0,
    "label_flip": False,
    "train_mode": False,
    "share_statistics": False,
    "attacker_knowledge": "method",
}
OF_TEXT = ("success_tokens", "window", "ngram")
OF_ONE_ATTACK = ("attack", "attack_options", "lpips", "victims_at_once", "watch_every")


@dataclass(frozen=True, kw_only=True)
class AttackConfig(
    AttackerOptions, VictimOptions, PrivateOptions, ClientOptions, ScoreOptions, RunOptions, MaskOptions
):
    """Reconstruct private images from the gradients a victim shares, and score what came out."""

    script: ClassVar[str] = "attack.py"
    usage: ClassVar[str] = "python attack.py --attack NAME --model NAME|--checkpoint FILE --images PATH... --output DIR"
    common: ClassVar[tuple[str, ...]] = (
        "attack", "attack_options", "attacker_knowledge", "model", "checkpoint", "images", "index", "num_images",
        "leak", "batch_size", "mask_ratio", "server", "share", "defense", "defense_options", "output", "overwrite",
        "resume", "device", "seed",
        "metric_only",
    )  # fmt: skip
    parts: ClassVar[dict] = {
        "attack": ("attack_options", ATTACKS),
        "defense": ("defense_options", DEFENSES),
        "server": ("server_options", SERVERS),
        "share": ("share_options", SHARES),
    }
    victims_at_once: int | Literal["auto"] | None = None
    """Independent victims attacked as one vectorised problem; default 16 below a million parameters, else 1. auto: as
    many as fit in the free memory (on a CPU at most the default). Results agree up to rounding, which long runs of
    L-BFGS amplify; a campaign is continued with the number it was started with."""
    metric_only: bool = False
    """Attack nothing: say from shapes and ranks what linear equations leave open of an image (chains, ViTs)."""
    audit: bool = False
    """The question of audit.py: write audit.html, what shapes and ranks give away, what the attacks that apply recover
    of sample photographs (or of --images) within a small budget, and what defences change."""
    minutes: float = 5.0
    """With --audit: minutes that all of it may take."""
    resume: Literal["never", "auto"] = "never"
    """auto: continue the unfinished campaign in the output folder, if there is one."""

    def __post_init__(self):
        super().__post_init__()
        text = self.data.kind == "text"
        self.check_victim(text)
        if self.images is None and not (self.metric_only or self.leak or self.audit or text):
            raise UserError("--images is missing: the private images, files or folders")
        if sum(map(bool, (self.metric_only, self.leak, self.audit))) > 1:
            raise UserError("--metric_only, --leak and --audit are different questions: ask one at a time")
        if self.leak:
            self._check_leak()
        check(text == (self.attack in SENTENCES), "attack", f"one for --data.kind {self.data.kind}", self.attack)
        if text:
            self._check_sentences()
        else:
            refuse_changed(self, "used with --data.kind text", OF_TEXT)
            refuse_changed(self.data, "used with --data.kind text", section="data.")
        if self.audit or self.metric_only:
            self._check_question("--audit" if self.audit else "--metric_only")
        given = self.server_images is None or self.server != "honest"
        check(given, "server_images", "used with a malicious --server", self.server_images)
        check(self.minutes > 0, "minutes", "above 0", self.minutes)
        check(self.audit or self.minutes == 5, "minutes", "used with --audit", self.minutes)
        check(self.index is None or self.num_images is None, "num_images", "left out with --index", self.num_images)
        check(self.index is None or bool(self.images), "index", "used with --images", self.index)
        self.indices()
        for key in ("num_images", "victims_at_once"):
            value = getattr(self, key)
            check(value in (None, "auto") or value >= 1, key, "at least 1", value)
        check(not text or self.victims_at_once != "auto", "victims_at_once", "a number with --data.kind text", "auto")
        self.check_client()
        if self.clients > 1:
            check(not text, "clients", "1 for text", self.clients)
            size = self.images_together
            joined = f"1 with --audit: of clients of one size the mean is the gradient of --batch_size {size}"
            check(not self.audit, "clients", joined, self.clients)
        check(self.lpips or not self.lpips_trunk, "lpips_trunk", "used with --lpips", self.lpips_trunk)
        check(self.watch_every >= 0, "watch_every", "0 or more", self.watch_every)

    def _check_sentences(self) -> None:
        """Refuse options that only images have a use for."""
        check(self.data.path is not None, "data.path", "the folder of train.csv and val.csv", "nothing")
        check(self.local_steps == 1, "local_steps", "1 for text", self.local_steps)
        alone = self.batch_size == 1 or self.attack == "dager"
        check(alone, "batch_size", "1 for text, except with --attack dager", self.batch_size)
        for key in ("images", "index", "image_size", "lpips", "metric_only", "leak", "audit", "share_statistics",
                    "label_flip", "pretrain_steps"):  # fmt: skip
            check(not getattr(self, key), key, "left out with --data.kind text", getattr(self, key))
        for key, usual in (("server", "honest"), ("partition", "listing"), ("share", "all")):
            check(getattr(self, key) == usual, key, f"{usual} with --data.kind text", getattr(self, key))

    def _check_question(self, question: str) -> None:
        """Refuse options that an audit, or the security metric, has no use for. question: which of the two."""
        for key, usual in (PLAIN_STEP | {"server": "honest", "partition": "listing"}).items():
            value, used = getattr(self, key), key == "withhold" and self.metric_only
            check(used or value == usual, key, f"left out with {question}, which is about a plain step", value)
        if self.audit:
            refuse_changed(self, "left out with --audit, which runs all attacks that apply", OF_ONE_ATTACK)

    def _check_leak(self) -> None:
        """Refuse options for what the leak file says."""
        told = {
            "attacker_knowledge": ("none", "method"),
            "labels": ("known",),
            "mask_ratio": (0.0,),
            "batch_size": (1,),
            "withhold": ([],),
        }
        told |= {"local_steps": (1,), "train_mode": (False,), "share_statistics": (False,), "defense": ("none",)}
        told |= {
            "num_images": (None,),
            "index": (None,),
            "label_flip": (False,),
            "pretrain_steps": (0,),
            "local_shuffle": (False,),
        }
        told |= {"partition": ("listing",), "clients": (1,), "client_weights": (None,), "client_dropout": (0.0,)}
        for key, values in told.items():
            check(getattr(self, key) in values, key, "left out with --leak, whose file says it", getattr(self, key))

    def folder(self) -> dict:
        """Return how the run folder is opened: options of utils.runs.Run. Some options change no reconstruction."""
        return {
            "overwrite": self.overwrite,
            "resume": self.resume == "auto",
            "state": "partial",
            "may_change": ("device", "watch_every", "success_psnr"),
            "inputs": self.inputs(),
            "outputs": self.outputs(),
        }

    def inputs(self) -> tuple[str | None, ...]:
        """Return files and folders the run reads."""
        images = [self.images] if isinstance(self.images, str) else self.images or []
        data = (self.data.path, self.data.public, self.attributes, self.server_images)
        return self.checkpoint, *images, self.leak, *data

    def outputs(self) -> tuple[str, ...]:
        """Return what the command writes, see utils.ownership."""
        if self.metric_only or self.audit:
            return ("audit.html",) * self.audit
        curves = CURVES if self.watch_every else ()
        return (*REPORT, *curves, *(("sentences.json",) if self.data.kind == "text" else PICTURES))

    def sentences(self, defense: str) -> dict:
        """Return whose sentences are attacked: keyword options of campaigns.sentences.open_sentence_campaign."""
        data, model = self.data, self.victim()
        given = {"checkpoint": model.pop("checkpoint"), "name": model.pop("name"), "encoding": data.text.encoding()}
        model = {key: value for key, value in model.items() if key not in ("image_size", "seed")}
        chosen = {"num_images": self.num_images, "min_tokens": data.min_tokens, "max_tokens": data.max_tokens}
        return {
            "victim": given | {"options": model},
            "data": {"path": data.path, "columns": data.text.columns()} | chosen,
            "public": data.public,
            "jigsaw": {"mask_ratio": self.mask_ratio} | self.sampler("text"),
            "seed": self.seed,
            "dtype": self.dtype,
            "terms": self.terms({"mean": (0.0,), "std": (1.0,)}),
            "threat_model": self.threat_model(defense),
            "threshold": self.success_tokens,
            "batch_size": self.batch_size,
        }

    def terms(self, scale: dict) -> "Terms":
        """Return what a client's round is like and what its server sees. scale: mean and std of the model's inputs."""
        from attacks.threat_model.terms import Terms  # of torch, which --help does without

        local = (self.local_steps, self.local_lr, self.local_batch_size or self.batch_size)
        return Terms(
            **scale,
            reveal_labels=self.labels == "known",
            local=local if self.local_steps > 1 else None,
            training=self.train_mode,
            dropout_seed=self.dropout_seed,
            statistics=self.share_statistics,
            withhold=self.withhold,
            attacker_knowledge=self.attacker_knowledge,
        )

    @property
    def images_together(self) -> int:
        """Images behind one leak."""
        return self.clients * self.batch_size

    def client(self) -> dict:
        """Return keyword options of attacks.threat_model.client.Client beside the terms of its round."""
        weights = self.client_weights and tuple(self.client_weights)
        together = (self.clients, self.batch_size, weights, self.client_dropout) if self.clients > 1 else None
        pretraining = (self.pretrain_steps, self.pretrain_lr) if self.pretrain_steps else None
        return {
            "label_flip": self.label_flip,
            "local_shuffle": self.local_shuffle,
            "pretraining": pretraining,
            "together": together,
        }

    def listing(self) -> dict:
        """Return which images are attacked, in which order: keyword options of data.images.list_images."""
        return {"count": self.num_images, "index": self.indices(), "size": self.batch_size, "by": self.partition}

    def sent(self) -> dict:
        """Return what clients receive, and train of it: options of attacks.malicious.sending.sent_model."""
        keys = ("server", "server_options", "share", "share_options", "seed")
        return {key: getattr(self, key) for key in keys}

    def leak_terms(self) -> dict:
        """Return who attacks leak files of which model: keyword options of campaigns.sources.recorded."""
        return {"attacker_knowledge": self.attacker_knowledge, "seed": self.seed, "name": self.model or self.checkpoint}

    def as_audit(self) -> AuditConfig:
        """Return the options of audit.py that ask what --audit asks here."""
        return self.part(AuditConfig)

    def audit_terms(self) -> dict:
        """Return what --audit asks: keyword options of campaigns.audit.audit."""
        terms = self.as_audit().terms()
        more = typed(self, ("share",)) + [f"--share_options.{key} {value}" for key, value in self.share_options.items()]
        return terms | {"victim": {key: " ".join([value, *more]) for key, value in terms["victim"].items()}}

    def shapes(self) -> dict:
        """Return what the security metric depends on: keyword options of attacks.security.security."""
        return {"mask_ratio": self.mask_ratio, "batch_size": self.images_together, "withhold": self.withhold}

    def threat_model(self, defense: str) -> dict[str, str]:
        """Return who knows what, for people: rows of the report. defense: the options of the defence."""
        text = self.data.kind == "text"
        images = f"{self.batch_size} {'sentence' if text else 'image'}{'s' * (self.batch_size > 1)}"
        update = f"update of {self.local_steps} SGD steps (rate {self.local_lr:g}) on {images}"
        update += ", in a new order in every epoch" * self.local_shuffle
        shared = update if self.local_steps > 1 else "gradient of " + images
        if self.clients > 1:
            weights = "weighted by " + ",".join(f"{weight:g}" for weight in self.client_weights or [])
            weights = weights if self.client_weights else "weighted by their images"
            dropout = f", {self.client_dropout:.0%} of which drop out of a round" if self.client_dropout else ""
            shared = f"mean over {self.clients} clients{dropout} ({weights}; secure aggregation), each: {shared}"
        steps = f"{self.pretrain_steps} SGD step{'s' * (self.pretrain_steps > 1)} (rate {self.pretrain_lr:g})"
        state = "random weights" if self.model else "trained weights"
        after = f" and {steps} on the very images" if self.pretrain_steps else ""
        mode = f"training, dropout seed {self.dropout_seed}" if self.train_mode else "evaluation"
        return {
            "attacker": "honest-but-curious server: it follows the protocol and looks at what it is sent",
            "shared": f"{shared}, {self.dtype}",
            "withheld": ", ".join(self.withhold) or "nothing",
            "labels": ("told" if self.labels == "known" else "hidden")
            + ", each image trained as the class after its own" * self.label_flip,
            "victim": f"{self.model or self.checkpoint}, {state}{after}, {mode} mode",
            **(self._text_terms() if text else self._image_terms()),
            "MJP": f"mask ratio {self.mask_ratio:g}" if self.mask_ratio else "off",
            **({"MJP, the attacker": KNOWLEDGE[self.attacker_knowledge]} if self.mask_ratio else {}),
            "defence": f"{self.defense} ({defense})" if defense else self.defense,
        }

    def _image_terms(self) -> dict[str, str]:
        images = {"class": "of one class for each client", "classes": "of different classes for each client"}
        return {
            **({"BatchNorm statistics": "of the batch, shared"} if self.share_statistics else {}),
            **({"images": images[self.partition]} if self.partition in images else {}),
        }

    def _text_terms(self) -> dict[str, str]:
        public = f"has those of {self.data.public}" if self.data.public else "has none"
        return {"tokenizer and length": "known", "public sentences": f"the server {public}"}
