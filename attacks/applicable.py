"""Which attacks apply to what a server has, and why the others do not: said before any of them works.

A check takes a Leak and the options the attack will run with, looks at names, shapes and modules alone (a preview, see
`expected`, has no gradients yet) and raises UserError where the attack would. tests/attacks/test_applicable.py holds
the two against each other. An attack without a check is taken to apply.
"""

from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from inspect import signature

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from attacks import ATTACKS, SENTENCES
from attacks.first_block import LAYERS, check_block
from attacks.joint_bounds import check_joint
from attacks.labels import BIAS_RULES, classifier_of
from attacks.layer_scale import fold_layer_scale
from attacks.layers import chain
from attacks.leak import Leak, LocalSteps
from attacks.likelihood import Likelihood
from attacks.matching import MatchingOptions
from attacks.priors import BatchNormStatistics
from attacks.sentence import check_sentence
from attacks.victim import active_dropout
from models.vit import AprilBlock
from utils.errors import UserError

CROSS_ENTROPY = "cross_entropy"
PATCHES = "patch_embed.proj.weight"
FIRST_BLOCK = ("patch_embed.proj.bias", "blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias")


def expected(
    model: nn.Module,
    batch_size: int,
    *,
    reveal_labels: bool,
    local: Sequence | None,
    withhold: Sequence[str] = (),
    **terms,
) -> Leak:
    """A preview of the leaks of simulated clients: parameters stand in for gradients, of which only names and shapes
    mean anything. terms: as in attacks.victim.share."""
    shared = {
        name: value.detach()
        for name, value in model.named_parameters()
        if not any(fnmatch(name, pattern) for pattern in withhold) and not name.startswith("localization.")
    }
    side = model.arguments["image_size"]
    labels = next(model.parameters()).new_zeros(batch_size).long() if reveal_labels else None
    known = {key: terms[key] for key in ("training", "dropout_seed", "tier") if key in terms}
    local = LocalSteps(*local) if local else None
    return Leak(model, shared, (3, side, side), batch_size, labels, local=local, **known)


def applicable(leak: Leak, loss: str = CROSS_ENTROPY) -> dict[str, str]:
    """By name of every attack on images: why it does not apply to this leak with its default options, empty if it does.
    Those on sentences have no place in such a list."""
    return {name: obstacle(name, leak, {}, loss) for name in ATTACKS if name not in SENTENCES}


def obstacle(name: str, leak: Leak, options: dict, loss: str = CROSS_ENTROPY) -> str:
    """Why the attack does not apply with these options, empty if it does. loss: the client's, as leak files name it."""
    attack = ATTACKS[name]
    given = {key: item.default for key, item in signature(attack).parameters.items()} | options
    check = CHECKS.get(name) or (_matching if isinstance(getattr(attack, "preset", None), MatchingOptions) else None)
    try:
        if check is not None:
            check(leak, given, loss, name)
    except UserError as error:
        return str(error)
    return ""


def describe(verdicts: dict[str, str]) -> str:
    """The result of `applicable` as lines of text."""
    fitting = [name for name, why in verdicts.items() if not why]
    lines = [f"attacks that apply: {', '.join(fitting) or 'none'}"]
    lines += [f"  {name:<20} no: {reason(name, why)}" for name, why in verdicts.items() if why]
    return "\n".join(lines)


def reason(name: str, why: str) -> str:
    """An obstacle without the name of its attack, for tables that have it in another column."""
    return why.removeprefix(f"attack '{name}' ")


def _closed_form(leak: Leak, options: dict, loss: str, name: str) -> None:
    model = leak.model
    projection = leak.gradient(PATCHES, name)
    if not isinstance(getattr(model.patch_embed, "norm", nn.Identity()), nn.Identity):
        raise UserError(f"attack '{name}' needs position embeddings added right after the patch projection")
    table = leak.gradient("index_embed" if "index_embed" in leak.gradients else "pos_embed", name)
    _check_patches(model, projection, name)
    tied = getattr(model, "pos_embed_rows", None) is not None
    patches = model.grid[0] * model.grid[1]
    if not tied and (table.dim() != 3 or table.shape[1] - patches not in (0, model.num_prefix_tokens)):
        raise UserError(f"attack '{name}' needs one position row for every patch, the table is {tuple(table.shape)}")
    _check_dropout(leak, name)


def _adaptive(leak: Leak, options: dict, loss: str, name: str) -> None:
    if leak.batch_size != 1:
        raise UserError(f"attack '{name}' reconstructs a batch of one image, this gradient is of {leak.batch_size}")
    if leak.tier == "T0":
        raise UserError(f"attack '{name}' knows of MJP: give it tier T1 to T3, or use 'closed_form' for tier T0")
    leak.gradient("pos_embed", name)
    leak.gradient(PATCHES, name)
    if getattr(leak.model, "pos_embed_rows", None) is not None:
        raise UserError(f"attack '{name}' needs a position row for every patch, and this model ties them: token_span")
    _closed_form(leak, options, loss, name)
    if leak.model.hides_positions:
        leak.gradient("unknown_pos_embed", name)


def _token_span(leak: Leak, options: dict, loss: str, name: str) -> None:
    if leak.batch_size != 1 or leak.local is not None:
        raise UserError(f"attack '{name}' solves for one image behind one gradient: use batch_size 1, local_steps 1")
    model = leak.model
    projection = leak.gradient(PATCHES, name)
    for parameter in FIRST_BLOCK:
        leak.gradient(parameter, name)
    plain = isinstance(getattr(model, "norm_pre", nn.Identity()), nn.Identity)
    block = model.blocks[0]
    if not plain or not isinstance(getattr(block, "norm1", None), nn.LayerNorm) or not bool(block.norm1.weight.all()):
        raise UserError(f"attack '{name}' needs a ViT with a LayerNorm in front of its first attention")
    _check_patches(model, projection, name)
    _check_dropout(leak, name)


def _first_block(leak: Leak, options: dict, loss: str, name: str) -> None:
    if leak.batch_size != 1 or leak.local is not None:
        raise UserError(f"attack '{name}' solves for one image and one gradient: use batch_size 1, local_steps 1")
    check_block(leak.model)
    for layer in LAYERS:
        for part in ("weight", "bias"):
            leak.gradient(f"{layer}.{part}", name)
    _check_patches(leak.model, leak.gradient(PATCHES, name), name)
    _check_dropout(leak, name)


def _joint(leak: Leak, options: dict, loss: str, name: str) -> None:
    check_joint(fold_layer_scale(leak))


def _april(leak: Leak, options: dict, loss: str, name: str) -> None:
    blocks = getattr(leak.model, "blocks", None)
    if not isinstance(leak.model, VisionTransformer) or not isinstance(blocks[0], AprilBlock):
        raise UserError(
            f"attack '{name}' needs a ViT whose first block has neither LayerNorm before attention nor residual "
            f"connections: build it with april=true, or use attack 'closed_form'"
        )
    _check_single(leak, name)
    dim, values = leak.gradient(PATCHES, name).flatten(1).shape
    if values > dim:
        raise UserError(f"attack '{name}' cannot invert a patch projection from {values} values to {dim} dimensions")
    leak.gradient("pos_embed", name)
    leak.gradient("blocks.0.attn.qkv.weight", name)


def _matching(leak: Leak, options: dict, loss: str, name: str) -> None:
    if not leak.gradients:
        raise UserError("gradient matching needs at least one gradient: everything is withheld from this leak")
    if loss != CROSS_ENTROPY:
        raise UserError(f"attack '{name}' repeats the step with mean cross-entropy, and the client's loss is '{loss}'")
    _check_dropout(leak, name)
    if options["objective"] == "likelihood":
        given = {key: options[key] for key in ("defense", "defense_options", "softness")}
        Likelihood(**given, batch_size=leak.batch_size)
    if options["init"] == "closed_form":
        _closed_form(leak, options, loss, "closed_form")
    if options["pos_embed_cosine"]:
        leak.gradient("pos_embed", name)
    if options["image_prior"] and not options["image_prior_checkpoint"]:
        raise UserError("the image prior needs a CNN with BatchNorm: pass image_prior_checkpoint, or image_prior 0")
    if options["batch_norm"]:
        with BatchNormStatistics(leak.model) as seen:
            if not seen.layers:
                raise UserError("the batch_norm prior needs a victim with BatchNorm layers: set batch_norm to 0")
    rule = options["labels"]
    if leak.labels is None and rule != "joint":
        _check_labels(leak, rule)
    if options["features"]:
        layer = classifier_of(leak.model, leak.image_shape)
        if any(f"{layer}.{part}" not in leak.gradients for part in ("weight", "bias")):
            raise UserError("the feature prior needs the gradients of the classifier's weight and bias: leave it out")


def _ats_aware(leak: Leak, options: dict, loss: str, name: str) -> None:
    base = options["base"]
    why = obstacle(base, leak, options["base_options"] or {}, loss) if base in ATTACKS else ""
    if why:
        raise UserError(why)


def _recursion(leak: Leak, options: dict, loss: str, name: str) -> None:
    _check_single(leak, name)
    if loss != CROSS_ENTROPY:
        raise UserError(f"attack '{name}' knows the slope of the cross-entropy, and the client's loss is '{loss}'")
    for layer in chain(leak.model, leak.image_shape, name):
        leak.gradient(f"{layer.name}.weight", name)


def _sentence(leak: Leak, options: dict, loss: str, name: str) -> None:
    check_sentence(leak, name)


def _check_single(leak: Leak, name: str) -> None:
    if leak.batch_size > 1 or (leak.local is not None and leak.local.steps > 1):
        raise UserError(
            f"attack '{name}' takes one gradient of one image apart, and this leak mixes several: use batch_size 1 "
            f"and local_steps 1"
        )


def _check_patches(model: nn.Module, projection: Tensor, name: str) -> None:
    side = model.patch_size
    if tuple(projection.shape[1:]) != (3, side, side) or tuple(model.patch_embed.proj.stride) != (side, side):
        shape = tuple(projection.shape)
        raise UserError(f"attack '{name}' needs a projection that reads each pixel once, and this one is {shape}")


def _check_dropout(leak: Leak, name: str) -> None:
    if leak.training and leak.dropout_seed is None and (layer := active_dropout(leak.model)):
        raise UserError(f"attack '{name}' would have to know what the client's dropout in '{layer}' drew")


def _check_labels(leak: Leak, rule: str) -> None:
    if rule == "idlg" and leak.batch_size > 1:
        raise UserError(
            f"label rule 'idlg' reads one label, the batch has {leak.batch_size}: use bias_corrected, or yin if unique"
        )
    layer = classifier_of(leak.model, leak.image_shape)
    leak.gradient(f"{layer}.{'bias' if rule in BIAS_RULES else 'weight'}" if layer else "weight", f"label rule {rule}")


CHECKS: dict[str, Callable[[Leak, dict, str, str], None]] = {
    "closed_form": _closed_form,
    "adaptive": _adaptive,
    "token_span": _token_span,
    "first_block": _first_block,
    "joint": _joint,
    "ats_aware": _ats_aware,
    "april": _april,
    "rgap": _recursion,
    "hybrid": _recursion,
    **dict.fromkeys(SENTENCES, _sentence),
}
