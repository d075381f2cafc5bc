"""Options of training: the puzzle of masked steps, the optimiser with its losses, what is written."""

from dataclasses import dataclass
from typing import Literal

from models.options import MaskOptions
from utils.checks import check


@dataclass(frozen=True, kw_only=True)
class JigsawOptions(MaskOptions):
    """The masked jigsaw puzzle: how much is shuffled, how often, from when on."""

    mask_ratio: float = 0.0
    """Share of the patches to mask and permute; 0 turns the jigsaw off."""
    probability: float = 0.5
    """Chance that a training step is masked."""
    start_epoch: int = 20
    """First epoch with the jigsaw (official: after the warm-up)."""
    shuffle: Literal["mjp", "pps"] = "mjp"
    """mjp permutes the masked patches; pps permutes all pixels in patches and all patches, whatever mask_ratio says."""
    move: Literal["auto", "pixels"] = "auto"
    """What a masked step permutes: pixels of the images (official), or auto, which trains the same for less: position
    embeddings of a ViT the other way, and nothing where the shared unknown row makes the order invisible."""
    per_sample: bool = False
    """Own mask for every image instead of one for the global batch (official: one); sentences always have their own."""
    shrinking_window: bool = False
    """Text: as the published code, keep the length of a sentence's last window for the rest of the batch."""

    def __post_init__(self):
        check(0 <= self.mask_ratio <= 1, "jigsaw.mask_ratio", "between 0 and 1", self.mask_ratio)
        check(0 <= self.probability <= 1, "jigsaw.probability", "between 0 and 1", self.probability)
        super().__post_init__()

    @property
    def on(self) -> bool:
        """Return whether any step shuffles: pps knows no ratio."""
        return self.mask_ratio > 0 or self.shuffle == "pps"


@dataclass(frozen=True)
class OptimOptions:
    """Optimizer, schedule, losses, precision."""

    epochs: int = 300
    """Passes over the training set."""
    lr: float = 5e-4
    """Peak learning rate per 512 images of global batch; the rates below scale with it."""
    warmup_lr: float = 5e-7
    """Learning rate of the first step, per 512 images."""
    min_lr: float = 5e-6
    """Final learning rate, per 512 images."""
    warmup_epochs: int = 20
    """Epochs of linear warm-up (of the learning rate and of the localization weight)."""
    schedule: Literal["cosine", "linear", "step"] = "cosine"
    """Decay after the warm-up, as in the official code: cosine counts from step 0; linear falls from the end of the
    warm-up to a hundredth; step multiplies by decay_rate every decay_epochs, from step 0."""
    decay_epochs: int | None = None
    """Schedule step: epochs between decays, the warm-up counted (official: 30); default a third of the run."""
    decay_rate: float = 0.1
    """Schedule step: factor of each decay."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov momentum, as in the official code."""
    momentum: float = 0.9
    """SGD: momentum."""
    weight_decay: float = 0.05
    """Weight decay; not on biases, norms and position embeddings."""
    decay_pos_embed: bool = False
    """Decay position embeddings too (official MJP: true, by accident)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""
    eps: float = 1e-8
    """AdamW epsilon."""
    fused: bool = True
    """Fused kernel of the optimizer."""
    clip: float = 5.0
    """Largest global gradient norm; 0 is off. Applied once per update."""
    accumulation: int = 1
    """Steps whose gradients are summed into one update."""
    mixup: float = 0.8
    """Mixup alpha; 0 is off."""
    cutmix: float = 1.0
    """CutMix alpha; 0 is off."""
    cutmix_minmax: tuple[float, float] | None = None
    """CutMix: smallest and largest side of the box, as shares of the image, in place of alpha."""
    mixup_probability: float = 1.0
    """Chance that a step mixes images."""
    mixup_switch: float = 0.5
    """Chance of CutMix in place of mixup where both are on."""
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    """One mixture for the batch, one for each pair of images, or one for each image."""
    label_smoothing: float = 0.1
    """Label smoothing."""
    localization_weight: float = 0.01
    """Weight of the localization loss after its warm-up; it then falls to half along a cosine."""
    ema: float = 0.0
    """Decay of the averaged weights per update, e.g. 0.99996; 0 is off."""
    recipe: Literal["given", "float32", "auto"] = "given"
    """given takes amp, matmul and attention as they are. The others measure in seconds which of them are fastest on
    this machine: float32 among those that are true float32, auto also with TF32 and bf16 where the gradient is within
    5 %; kept in the user's cache folder (XDG_CACHE_HOME), logged."""
    amp: Literal["none", "bf16", "fp16"] = "none"
    """Mixed precision of the forward pass (official: none)."""
    matmul: Literal["highest", "high", "medium"] = "highest"
    """How float32 matrices are multiplied: on a GPU high is TF32; on a CPU medium may take a faster library at full
    precision, or round to bf16 (the log states the error; benchmarks/training.py finds what is fastest)."""
    attention: Literal["fused", "plain"] = "fused"
    """Attention as one kernel, or as plain matrix products: faster on some CPUs in bf16."""
    channels_last: bool = False
    """Store images and convolutions with channels innermost: faster for ResNets, on a GPU with amp above all."""
    compile: bool = False
    """torch.compile the training step."""
    grad_checkpointing: bool = False
    """Recompute block activations in the backward pass: less memory, about a third more time."""

    @property
    def mixing(self) -> bool:
        """Return whether images are mixed."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None

    def __post_init__(self):
        check(self.epochs >= 1, "optim.epochs", "at least 1", self.epochs)
        check(self.decay_epochs is None or self.decay_epochs >= 1, "optim.decay_epochs", "1 or more", self.decay_epochs)
        check(self.decay_rate > 0, "optim.decay_rate", "above 0", self.decay_rate)
        check(0 <= self.momentum < 1, "optim.momentum", "in [0, 1)", self.momentum)
        for key in ("mixup_probability", "mixup_switch"):
            check(0 <= getattr(self, key) <= 1, f"optim.{key}", "between 0 and 1", getattr(self, key))
        low, high = self.cutmix_minmax or (0.5, 0.5)
        check(0 < low <= high < 1, "optim.cutmix_minmax", "two shares in (0, 1), the smaller first", self.cutmix_minmax)
        for key in ("lr", "warmup_lr", "min_lr", "warmup_epochs", "weight_decay", "eps", "clip", "localization_weight"):
            check(getattr(self, key) >= 0, f"optim.{key}", "0 or more", getattr(self, key))
        check(all(0 <= beta < 1 for beta in self.betas), "optim.betas", "in [0, 1)", self.betas)
        check(self.accumulation >= 1, "optim.accumulation", "at least 1", self.accumulation)
        check(0 <= self.ema < 1, "optim.ema", "in [0, 1)", self.ema)
        check(0 <= self.label_smoothing < 1, "optim.label_smoothing", "in [0, 1)", self.label_smoothing)
        check(self.mixup >= 0, "optim.mixup", "0 or more", self.mixup)
        check(self.cutmix >= 0, "optim.cutmix", "0 or more", self.cutmix)


@dataclass(frozen=True)
class LogOptions:
    """What is written, and how often."""

    every: int = 50
    """Steps between progress lines in log.txt; on a GPU also between checks for a stop signal or a bad loss."""
    checkpoint_every: int = 1
    """Epochs between writes of last.pt (official: 5)."""
    checkpoint_minutes: float = 30.0
    """Minutes after which last.pt is written inside an epoch too; 0 is never."""
    images_every: int = 20
    """Epochs between TensorBoard images of shuffled inputs and the position-embedding similarity map; 0 is off."""

    def __post_init__(self):
        check(self.every >= 1, "log.every", "at least 1", self.every)
        check(self.checkpoint_every >= 1, "log.checkpoint_every", "at least 1", self.checkpoint_every)
        check(self.checkpoint_minutes >= 0, "log.checkpoint_minutes", "0 or more", self.checkpoint_minutes)
