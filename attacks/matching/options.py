"""The options of gradient matching, once: their defaults, units and limits. The preset of a paper is an instance."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from inspect import Parameter, Signature

import torch

from attacks.matching.likelihood import Likelihood
from attacks.matching.objectives import SCHEMES, drawn_at_once
from attacks.solvers.optimizers import OPTIMIZERS, SCHEDULES, SIGNS
from attacks.threat_model.checks import CROSS_ENTROPY, Check
from attacks.threat_model.leak import Leak, Reconstruction, vectorized
from attacks.threat_model.uses import Uses
from utils.errors import UserError, look_up

Watch = Callable[[int, int, Callable[[], tuple[torch.Tensor, torch.Tensor]]], None]
SCORES = dict.fromkeys(("loss", "tv", "inception", "pixelmean", "pixelmedian"))
NOT_NEGATIVE = {  # weights and lengths: below 0 they would ask for the opposite, or be off and not say so
    *("objective_weight", "second_objective_weight", "pos_embed_cosine", "smoothness", "softness", "tv", "task", "l2"),
    *("mean_square", "orthogonality", "patch_prior", "batch_norm", "features", "group", "epoch_order", "image_prior"),
    *("median_every", "warmup", "clip", "langevin", "stop_below", "finite_difference", "chunk"),
}
KEEPS = dict.fromkeys(("best", "last"))
PRECISIONS = ("highest", "high", "medium", "bf16")


@dataclass(frozen=True)
class SearchOptions:
    """Options of a search for inputs, pixels or embeddings, whose gradient is the leaked one."""

    objective: str = "cosine"
    """Distance of two gradients, by its name in objectives.py, or 'likelihood', that of a known `defense`."""
    objective_weight: float = 1.0
    """Weight of the objective."""
    layers: str = "all"
    """Tensors compared: all, firstK, lastK, topK or topk-K (the K of largest norm), or batch, batchK (8, or K, drawn
    anew in each iteration; the last iterate is then returned, not the best)."""
    layer_weights: str = "equal"
    """Weight of each tensor in the objective: equal, linear or exp, which favour the layers next to the image."""
    defense: str = ""
    """Defence the attacker knows to be in use, for objective 'likelihood' (attacks/matching/likelihood.py)."""
    defense_options: dict | None = None
    """Options of that defence, its strength among them."""
    softness: float = 0.3
    """Width of the likelihood of pruned and quantised entries, in units of their interval."""
    labels: str = "bias_corrected"
    """Rule of label_rules.py where the leak does not tell labels; joint: optimised together with the images; or
    exhaustive: every multiset of labels in a restart of its own, the lowest objective wins."""
    init: str = "randn"
    """First candidates: randn, randn_truncated, rand, uniform, zeros, light, dark, red, green, blue, patterned-PIXELS,
    or closed_form."""
    iterations: int = 4800
    """Steps of the optimizer."""
    optimizer: str = "adam"
    """adam, adam_safe, adamw, momentum, sgd or lbfgs."""
    lr: float = 0.1
    """Learning rate, in units of normalised pixels for Adam and signed gradients."""
    schedule: str = "constant"
    """Schedule of the learning rate: constant, step (a tenth after 3/8, 5/8 and 7/8), cosine or linear."""
    warmup: int = 0
    """Iterations over which the learning rate rises from 0."""
    signed: str = "none"
    """Step along the gradient (none), its sign (hard) or a softened sign (soft)."""
    clip: float = 0.0
    """Largest L2 norm of the images' gradient; 0 is off."""
    langevin: float = 0.0
    """Standard deviation of noise on the images' gradient, in units of the learning rate; 0 is off."""
    restarts: int = 1
    """Starts per victim; one of them wins by `scoring_choice`."""
    stop_below: float = 0.0
    """Objective at which a victim is done, looked at every 10 iterations; 0 is off."""
    double: bool = False
    """Compute in float64."""
    precision: str = "highest"
    """Precision of float32 matrix products: highest, high or medium; or bf16 autocast."""
    finite_difference: float = 0.0
    """Step of a one-sided difference in place of the second derivative, relative to the length of the parameters (3e-6
    suits float32); 0 is exact. Every 100 iterations it is compared with the exact derivative, and problems in which it
    is off go on exactly."""
    compile: bool = False
    """Compile the derivative: minutes for a ViT; with dropout it stays uncompiled."""
    chunk: int = 0
    """Problems differentiated at once; 0 is all. bf16 and dropout take one at a time."""

    def check(self) -> None:
        """Raise UserError for unknown names and options that do not go together."""
        for name, known, what in (
            ("optimizer", OPTIMIZERS, "optimizer"),
            ("schedule", SCHEDULES, "schedule"),
            ("layer_weights", SCHEMES, "layer_weights"),
            ("signed", dict.fromkeys(SIGNS), "value of 'signed'"),
            ("precision", dict.fromkeys(PRECISIONS), "precision"),
        ):
            look_up(known, getattr(self, name), what)
        if self.restarts < 1 or self.iterations < 0:
            counts = f"{self.restarts} and {self.iterations}"
            raise UserError(f"restarts must be at least 1 and iterations at least 0, got {counts}")
        if not self.lr >= 0:
            raise UserError(f"attack_options.lr must be 0 or more, got {self.lr}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in NOT_NEGATIVE and not value >= 0:
                raise UserError(f"attack_options.{field.name} must be 0 or more, got {value}")
        if self.objective != "likelihood" and self.defense:
            raise UserError(f"attack_options.defense is used with objective 'likelihood', not with '{self.objective}'")
        if drawn_at_once(self.layers) and self.layer_weights != "equal":
            raise UserError("layers 'batchK' draws which tensors count: leave layer_weights at 'equal'")
        if self.objective == "likelihood" and (self.layers, self.layer_weights) != ("all", "equal"):
            raise UserError("the likelihood is of all that was shared: leave layers at 'all', layer_weights at 'equal'")

    def likelihood(self, batch_size: int) -> Likelihood | None:
        """Return the likelihood of the known defence for a gradient of `batch_size` images; None without one."""
        if self.objective != "likelihood":
            return None
        return Likelihood(self.defense, self.defense_options, batch_size=batch_size, softness=self.softness)


@dataclass(frozen=True)
class MatchingOptions(SearchOptions):
    """Options of a gradient-matching attack on images.

    Minimised, per problem: objective_weight * objective + pos_embed_cosine * APRIL's term + the priors of
    attacks/matching/priors.py by their weights.
    """

    pos_embed_cosine: float = 0.0
    """Weight of the cosine distance of the position-embedding gradient (APRIL)."""
    smoothness: float = 10.0
    """Weight of smooth pictures in the start 'closed_form' (initialization.py)."""
    tv: float = 0.0
    """Weight of total variation."""
    tv_form: str = "anisotropic"
    """Form of total variation: anisotropic, padded, isotropic, opponents or wang."""
    task: float = 0.0
    """Weight of the client's own loss of the candidate (CPL)."""
    l2: float = 0.0
    """Weight of the Euclidean length of the images."""
    mean_square: float = 0.0
    """Weight of half the mean square of the pixels."""
    orthogonality: float = 0.0
    """Weight of the overlap between images of a batch."""
    patch_prior: float = 0.0
    """Weight of the jumps between neighbouring patches (GradViT)."""
    batch_norm: float = 0.0
    """Weight of the distance to the BatchNorm statistics of the victim (GradInversion)."""
    features: float = 0.0
    """Weight of the distance to the features read off the classifier's gradient."""
    group: float = 0.0
    """Weight of the distance to the mean of a victim's restarts (GradInversion); needs 2 restarts or more."""
    epochs: int = 1
    """Epochs of local steps for which the candidate has images of its own, set by the attack dimitrov."""
    epoch_order: float = 0.0
    """Weight of the distances between the mean images of these epochs, whatever their order (Dimitrov et al.)."""
    image_prior: float = 0.0
    """Weight of the distance to the BatchNorm statistics of the CNN in image_prior_checkpoint (GradViT)."""
    image_prior_checkpoint: str = ""
    """Checkpoint of a CNN with BatchNorm that was trained on photographs, or timm:NAME=FILE, the weights of one of
    timm."""
    second_phase: float = 1.0
    """Share of the iterations after which image_prior sets in; 1 has it from the start."""
    second_objective_weight: float = 1.0
    """Weight of the objective from second_phase on."""
    keep: str = "best"
    """Iterate that is returned: the best by what is minimised, or the last, as in Inverting Gradients' own code; where
    ReLUs and max-poolings make the objective jump the last is closer to the picture."""
    boxed: bool = True
    """Project the images on the range of valid pixels after each step."""
    scoring_choice: str = "loss"
    """Restart that is returned: the one of lowest objective, priors not counted (loss), of lowest total variation (tv),
    or in which scoring_model is surest of what it sees (inception); or the mean or median of all pixels of the
    restarts (pixelmean, pixelmedian)."""
    scoring_model: str = ""
    """scoring_choice inception: a classifier of timm by name, trained on photographs."""
    scoring_checkpoint: str = ""
    """scoring_choice inception: file of its weights; without one timm downloads them."""
    stages: int = 1
    """Stages of growing resolution, of as many iterations each: in the first, pixels are equal in blocks of
    2^(stages - 1), in the last they are free."""
    median_every: int = 0
    """Iterations between 3 x 3 median filters of the images; 0 is off."""

    def check(self) -> None:
        super().check()
        if self.stages < 1:
            raise UserError(f"stages must be at least 1, got {self.stages}")
        if not 0 <= self.second_phase <= 1:
            raise UserError(f"attack_options.second_phase must be from 0 to 1, got {self.second_phase}")
        if self.group and self.restarts < 2:
            raise UserError("the group prior compares restarts: set restarts to 2 or more, or group to 0")
        look_up(SCORES, self.scoring_choice, "scoring_choice")
        look_up(KEEPS, self.keep, "value of 'keep'")
        if self.labels == "exhaustive" and self.scoring_choice != "loss":
            raise UserError("labels exhaustive compares restarts by their objective: leave scoring_choice at 'loss'")
        if (self.scoring_choice == "inception") != bool(self.scoring_model):
            raise UserError(
                "scoring_model, a classifier of timm, goes with scoring_choice inception: give both or none"
            )
        if self.scoring_checkpoint and not self.scoring_model:
            raise UserError("scoring_checkpoint holds the weights of scoring_model: give that too")
        if self.image_prior and not self.image_prior_checkpoint:
            raise UserError("the image prior needs a CNN with BatchNorm: pass image_prior_checkpoint, or image_prior 0")


def attack_with(
    preset: SearchOptions,
    *,
    run: Callable[..., list[Reconstruction]],
    check: Check,
    uses: Uses,
    name: str = "gradient_matching",
) -> Callable:
    """Return the attack that calls run(leaks, options, generator=, watch=) with `preset`, changed by its keywords,
    after its check (attacks/threat_model/checks.py) of every leak; name: what messages call it.

    The attack takes one leak or several (attacks/threat_model/leak.py, `vectorized`), and every option as a keyword
    argument whose default is the preset's; `attack.preset` holds them.
    """
    names = [field.name for field in fields(preset)]

    @vectorized
    def attack(
        leaks: Sequence[Leak], *, generator: Sequence[torch.Generator], watch: Watch | None = None, **options
    ) -> list[Reconstruction]:
        chosen = replace(preset, **options)
        chosen.check()
        given = {field: getattr(chosen, field) for field in names}
        for leak in leaks:
            check(leak, given, getattr(leak.model, "loss", CROSS_ENTROPY), name)
        return run(leaks, chosen, generator=generator, watch=watch)

    keywords = {"generator": Parameter.empty, "watch": None, **{name: getattr(preset, name) for name in names}}
    attack.__signature__ = Signature(
        [Parameter("leaks", Parameter.POSITIONAL_OR_KEYWORD)]
        + [Parameter(name, Parameter.KEYWORD_ONLY, default=default) for name, default in keywords.items()]
    )
    attack.preset, attack.check, attack.uses, attack.__name__ = preset, check, uses, name
    return attack
