"""What an attack needs of a leak, as one check per attack, and the conditions several of them share.

A check (leak, options, loss, attack name) looks at names, shapes and modules alone, never at the values of gradients,
and raises UserError saying in one line why the attack does not apply. `checked` registers it with its attack, which
then refuses by it: what is said before an attack works (attacks/threat_model/applicable.py) is what happens when it
does.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps

import torch
from torch import Tensor, nn

from attacks.contrast import measure_contrast
from attacks.exactness import CERTAIN, MISFIT, OFF, rounding
from attacks.threat_model.leak import Leak, Reconstruction, RefusalError
from attacks.threat_model.local_step import active_dropout
from attacks.threat_model.uses import MJP, ROWS, Uses, defaults
from models.jigsaw import patchify, unpatchify
from models.position import patch_rows

CROSS_ENTROPY = "cross_entropy"
PATCHES = "patch_embed.proj.weight"
SEVERAL = 4.0  # times what a gradient holds beyond its rank, from which something else than noise is left over
SAME = 1e-4  # relative difference up to which a recognised formula is what a module computes, in float32

Check = Callable[[Leak, dict, str, str], None]


def checked(check: Check, *, uses: Uses = ROWS) -> Callable[[Callable], Callable]:
    """Declare an attack: its check, which runs first at every call, and what it uses of a server's knowledge beside the
    model and the gradients (attacks/threat_model/uses.py). They stand in its attributes `check` and `uses`.

    The check is given the options as the attack will have them, defaults included, and takes the client's loss for the
    cross-entropy; who knows better asks it first (attacks/threat_model/applicable.py).
    """

    def register(attack: Callable[..., Reconstruction]) -> Callable[..., Reconstruction]:
        known = defaults(attack)

        @wraps(attack)
        def call(leak: Leak, *, generator: torch.Generator, **options) -> Reconstruction:
            check(leak, known | options, getattr(leak.model, "loss", CROSS_ENTROPY), attack.__name__)
            declared = uses(known | options) if callable(uses) else uses
            ordered = MJP in declared and leak.attacker_knowledge == "permutation"
            return without_refuted_claims(leak, attack(leak, generator=generator, **options), ordered)

        call.check, call.uses = check, uses
        return call

    return register


def without_refuted_claims(leak: Leak, result: Reconstruction, ordered: bool = False) -> Reconstruction:
    """Return the result, without its claims where a premise of them is seen to be wrong. ordered: its patches do not
    stand where the model saw them, but where they were before MJP moved them.

    Pixels lie further outside [0, 1] than the claims allow: the normalisation, say. `outside` in the diagnostics says
    how far. Or the tokens of the image do not make the gradient of the first block, whose own scale does not matter:
    gradients were scaled apart, and `contrast` says by what factor, or patches stand elsewhere, and `unexplained` says
    what share of that gradient is left over.
    """
    claims = {key: False for key in ("exact", "exact_up_to_order") if result.diagnostics.get(key)}
    shown = result.certificate
    if not result.images.numel() or len(leak.image_shape) != 3 or not (claims or shown):
        return result
    away = _outside(leak, result.images)
    refuted = bool(claims) and bool(away.max() > OFF * CERTAIN)
    if shown is not None:
        own = _outside(leak, unpatchify(shown.patches, leak.model.patch_size, leak.model.grid))
        away = torch.maximum(away.max(), own.max())
        beyond = patchify(own, leak.model.patch_size).amax(dim=2) > shown.radius  # (B, N)
        refuted = refuted or bool((beyond & shown.claimed).any())
    wrong = {"outside": float(away.max())} if refuted else {}
    if not refuted and not ordered:
        wrong = _refuted_by_block(leak, result)
    if not wrong:
        return result
    return replace(result, diagnostics=result.diagnostics | claims | wrong, certificate=None)


def _refuted_by_block(leak: Leak, result: Reconstruction) -> dict[str, float]:
    """Return what of the first block's gradient the one image found does not explain: `contrast`, the factor by which
    it asks for another, or `unexplained`, a share of it; nothing where it agrees, or cannot be asked: it is not shared,
    belongs to other tokens (masked, of several steps), or these span all there is."""
    model, name = leak.model, "blocks.0.attn.qkv.weight"
    layer = dict(model.named_modules()).get(name.removesuffix(".weight"))
    hidden = leak.gradients.get("unknown_pos_embed")  # of exactly zero, if no position was hidden
    dropping = [getattr(model, part, None) for part in ("pos_drop", "patch_drop")]
    others = (
        leak.batch_size != 1
        or (leak.local is not None and leak.local.steps > 1)
        or (getattr(model, "hides_positions", False) and (hidden is None or bool(hidden.any())))
        or (leak.training and any(getattr(part, "p", 0) or getattr(part, "prob", 0) for part in dropping))
    )
    if others or layer is None or name not in leak.gradients:
        return {}
    like = next(model.parameters())
    if (tokens := _entering(model, result.images.to(like), layer)) is None or tokens.dim() != 3:
        return {}

    def inputs(images: Tensor) -> Tensor:
        return _entering(model, images.to(like), layer)[0].double().cpu()

    error = result.diagnostics.get("error", result.diagnostics.get("noise", 0.0))
    error = error if math.isfinite(error) else CERTAIN
    off = torch.randn(result.images.shape, generator=torch.Generator().manual_seed(0)).to(result.images)
    near = result.images + error * off / result.images.new_tensor(leak.std).view(-1, 1, 1)
    gradient = leak.gradients[name].double().cpu()
    found = measure_contrast(gradient, lambda factor: inputs(factor * result.images), inputs(near))
    rounded = MISFIT * rounding((leak.gradients[name],))
    if found is None or found.misfit <= rounded:
        return {}
    if abs(found.factor - 1) > max(CERTAIN, error) or math.isnan(found.factor):
        return {"contrast": found.factor}
    explained = rounded + SEVERAL * found.noise + OFF * found.moved
    return {"unexplained": found.misfit} if found.misfit > explained else {}


def _outside(leak: Leak, images: Tensor) -> Tensor:
    """Return how far each value (B, C, H, W) lies outside the range of pixels, in that range, 1."""
    mean, std = (images.new_tensor(value).view(-1, 1, 1) for value in (leak.mean, leak.std))
    pixels = images * std + mean
    return (pixels - pixels.clamp(0, 1)).abs()


def check_single(leak: Leak, attack: str) -> None:
    """Raise UserError unless the leak is one gradient of one image."""
    if leak.batch_size != 1 or (leak.local is not None and leak.local.steps > 1):
        raise RefusalError(
            f"attack '{attack}' solves for one image behind one gradient, and this leak is of {leak.batch_size} "
            f"image{'s' * (leak.batch_size != 1)} and {leak.local.steps if leak.local else 1} local steps: use "
            f"batch_size 1, local_steps 1"
        )


def check_patches(leak: Leak, attack: str) -> None:
    """Raise UserError unless the first layer is a projection of patches that reads each pixel once."""
    projection, side = leak.gradient(PATCHES, attack), leak.model.patch_size
    layer = leak.model.patch_embed.proj
    pixels, kernel = leak.image_shape[-1], projection.shape[-1]
    if tuple(layer.stride) == tuple(projection.shape[2:]) and pixels % kernel:
        why = f"{pixels} pixels are not a multiple of its patches' {kernel}, and the last ones are never read"
        raise RefusalError(f"attack '{attack}' needs a projection that reads each pixel once: {why}")
    if (
        tuple(projection.shape[1:]) != (leak.image_shape[0], side, side)
        or tuple(layer.stride) != (side, side)
        or any(layer.padding)
    ):
        shape = tuple(projection.shape)
        raise RefusalError(f"attack '{attack}' needs a projection that reads each pixel once, and this one is {shape}")
    if not isinstance(getattr(leak.model.patch_embed, "norm", nn.Identity()), nn.Identity):
        raise RefusalError(f"attack '{attack}' needs position embeddings added right after the patch projection")


def check_tokens(leak: Leak, attack: str) -> None:
    """Raise UserError unless the model's blocks read W x_i + b + e_i for every patch i, behind `norm_pre` if there is
    one, with e_i its row of the position table or nothing: tried on a picture of noise."""
    model, shape = leak.model, leak.image_shape
    own = torch.Generator().manual_seed(0)
    like = next(model.parameters())
    image = torch.rand(1, *shape, generator=own).to(like)
    tokens = _entering(model, image)
    number = model.grid[0] * model.grid[1]
    if tokens is not None and tokens.dim() == 3 and tokens.shape[1] == number + prefix_tokens(model):
        with torch.no_grad():
            expected = model.patch_embed.proj(image).flatten(2).mT
            rows = None if getattr(model, "pos_embed", None) is None else model.pos_embed
            if rows is not None and getattr(model, "pos_embed_rows", None) is None and rows.dim() != 3:
                rows = None
            expected = expected + (0 if rows is None else patch_rows(model))
            if (index := getattr(model, "index_embed", None)) is not None:
                expected = expected + index[0, -number:]
            expected = getattr(model, "norm_pre", nn.Identity())(expected)
        if _same(tokens[:, -number:], expected):
            return
    raise RefusalError(
        f"attack '{attack}' needs a ViT whose blocks read patch embeddings, each plus its row of the position table; "
        f"those of this {type(model).__name__} read something else"
    )


def check_rows(leak: Leak, attack: str) -> str:
    """Return the name of the table whose gradient holds a row for every patch, or for every group of tied ones. Raises
    UserError where it is not shared or has another shape."""
    model, name = leak.model, "index_embed" if "index_embed" in leak.gradients else "pos_embed"
    table, number = leak.gradient(name, attack), model.grid[0] * model.grid[1]
    tied = getattr(model, "pos_embed_rows", None) is not None
    if not tied and (table.dim() != 3 or table.shape[1] - number not in (0, prefix_tokens(model))):
        raise RefusalError(
            f"attack '{attack}' needs one position row for every patch, the table is {tuple(table.shape)}"
        )
    return name


def prefix_tokens(model: nn.Module) -> int:
    """Return how many tokens stand before those of the patches: of class, distillation, registers."""
    return getattr(model, "num_prefix_tokens", 0)


def first_block_of(model: nn.Module, attack: str) -> nn.Module:
    """Return the first block. Raises UserError unless it computes u = z + attention(LN1(z)), u + MLP(LN2(u)), each
    branch times its LayerScale if it has one: tried on tokens of noise."""
    blocks = getattr(model, "blocks", None)
    block = blocks[0] if blocks is not None and len(blocks) else None
    names = ("norm1", "attn", "norm2", "mlp")
    missing = next((name for name in names if not isinstance(getattr(block, name, None), nn.Module)), None)
    kind = type(block).__name__ if block is not None else type(model).__name__
    if missing is None and not isinstance(block.norm1, nn.LayerNorm):
        missing = f"a LayerNorm as norm1, it has {type(block.norm1).__name__}"
    if missing is None and not _is_pre_norm(block, model):
        missing = "that order: it computes something else"
    if missing is not None:
        raise RefusalError(
            f"attack '{attack}' needs a ViT whose first block is LayerNorm, attention, LayerNorm, MLP, and this {kind} "
            f"lacks {missing}"
        )
    return block


def check_embedding(leak: Leak, attack: str) -> nn.Module:
    """Return the first block of a model whose patch embedding an attack on one image inverts. Raises UserError for
    several images, without the embedding's gradient, and for a model whose embedding or block is of another kind."""
    check_single(leak, attack)
    leak.gradient(PATCHES, attack)
    check_patches(leak, attack)
    return first_block_of(leak.model, attack)


def check_dropout(leak: Leak, attack: str, *, seed_helps: bool) -> None:
    """Raise UserError where the client's step dropped something at random. seed_helps: the attack repeats the step, so
    that a seed it is told will do."""
    if leak.training and not (seed_helps and leak.dropout_seed is not None) and (layer := active_dropout(leak.model)):
        raise RefusalError(f"attack '{attack}' would have to know what the client's dropout in '{layer}' drew")


class _SeenError(Exception):
    """Ends a forward pass once the tokens that enter the blocks have been seen."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and every module back into its own."""
    modes = [(module, module.training) for module in model.modules() if module.training]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def _entering(model: nn.Module, image: Tensor, part: nn.Module | None = None) -> Tensor | None:
    """Return the tokens (1, T, D) that enter a part of the model for an image, by default its first block; None for
    models without blocks."""
    blocks = getattr(model, "blocks", None)
    if blocks is None or not len(blocks):
        return None
    seen = []

    def stop(module: nn.Module, inputs: tuple) -> None:
        seen.append(inputs[0].detach().clone())
        raise _SeenError

    handle = (blocks[0] if part is None else part).register_forward_pre_hook(stop)
    try:
        with evaluating(model):
            model(image)
    except _SeenError:
        return seen[0]
    except Exception:  # a model from outside that does not take such images has no tokens to show
        return None
    finally:
        handle.remove()
    return None


@torch.no_grad()
def _is_pre_norm(block: nn.Module, model: nn.Module) -> bool:
    number, like = model.grid[0] * model.grid[1] + prefix_tokens(model), next(block.parameters())
    own = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, number, block.norm1.normalized_shape[-1], generator=own).to(like)
    scales = [getattr(getattr(block, name, None), "gamma", None) for name in ("ls1", "ls2")]
    scales = [
        getattr(block, name, None) if scale is None else scale
        for name, scale in zip(("gamma_1", "gamma_2"), scales, strict=True)
    ]
    first, second = (1.0 if scale is None else scale for scale in scales)
    try:
        with evaluating(block):
            middle = tokens + first * block.attn(block.norm1(tokens))
            return _same(block(tokens), middle + second * block.mlp(block.norm2(middle)))
    except Exception:  # blocks of other kinds take other arguments
        return False


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= SAME * other.abs().max())
