"""APRIL's closed form: the tokens of a transformer without LayerNorm before its first attention, then their pixels.

Where the tokens z_i (patch embedding plus position embedding) feed the query, key and value weights W directly and
nothing else, their gradients are d_i = W^T a_i, with a_i the gradient by what W puts out for token i. So W^T dL/dW =
sum_i d_i z_i^T: with the PE gradients d_i as the columns of a matrix, tokens come from one least-squares problem,
unique while there are no more tokens than dimensions; pixels follow from inverting the patch projection.

Only `AprilBlock` (models/vit.py, option april) is built like that; attacks/closed_form.py needs no such model. A second
block with residual connections is needed too: behind a single block that is read out at the class token, the d_i have
the rank 2 * heads + 1 and do not determine the tokens.

Source: Lu et al., "APRIL: Finding the Achilles' Heel on Privacy for Vision Transformers", CVPR 2022, section 3.
"""

import torch
from torch import Tensor

from attacks.leak import Leak, Reconstruction
from models.jigsaw import unpatchify
from models.vit import AprilBlock, VisionTransformer
from utils.errors import UserError


def april(leak: Leak, *, generator: torch.Generator) -> Reconstruction:
    """Reconstruct one image from the gradients of the PE and of the first block's qkv weight, on the CPU in float64;
    `generator` is not drawn from. Raises UserError for other models and for more than one image.

    This attacker does not know of MJP. Hidden patches have PE gradients of zero, so nothing is found for them, while
    W^T dL/dW still contains their share, which the visible patches take up; `exact` is then False.

    diagnostics: rank (of the token gradients, at the precision they came in), unknowns (tokens), condition, residual
    (relative), exact.
    """
    model = leak.model
    if not (isinstance(model, VisionTransformer) and isinstance(model.blocks[0], AprilBlock)):
        raise UserError(
            "attack 'april' needs a ViT whose first block has neither LayerNorm before attention nor residual "
            "connections: build it with april=true, or use attack 'closed_form'"
        )
    if leak.batch_size > 1 or (leak.local is not None and leak.local.steps > 1):
        raise UserError(
            "attack 'april' solves for one image behind one gradient, and this leak mixes several: use batch_size 1"
            " and local_steps 1"
        )
    projection = _double(model.patch_embed.proj.weight).flatten(1)  # (D, P)
    if projection.shape[1] > projection.shape[0]:
        raise UserError(
            f"attack 'april' cannot invert a patch projection from {projection.shape[1]} pixel values to "
            f"{projection.shape[0]} dimensions: it needs smaller patches or a larger embed_dim"
        )
    rows = leak.gradient("pos_embed", "april")[0]  # (1 + N, D)
    weight, gradient = model.blocks[0].attn.qkv.weight, leak.gradient("blocks.0.attn.qkv.weight", "april")
    system, right = _double(rows).T, _double(weight).T @ _double(gradient)
    if not system.any():
        raise UserError("the gradient of 'pos_embed' is zero everywhere: nothing can be reconstructed from it")
    solution = torch.linalg.lstsq(system, right, driver="gelsd")
    tokens = solution.solution - _double(model.pos_embed)[0]
    if model.index_embed is not None:
        tokens = tokens - _double(model.index_embed)[0]
    embedded = tokens[model.num_prefix_tokens :] - _double(model.patch_embed.proj.bias)
    patches = torch.linalg.lstsq(projection, embedded.T, driver="gelsd").solution.T
    values = solution.singular_values / solution.singular_values[0]
    noise = torch.finfo(rows.dtype).eps * len(system) ** 0.5  # the size of rounding errors in the gradient, as values
    rank, unknowns = int((values > noise).sum()), len(rows)
    diagnostics = {
        "rank": rank,
        "unknowns": unknowns,
        "condition": float(1 / values[-1]),
        "residual": float((system @ solution.solution - right).norm() / right.norm()),
        "exact": rank == unknowns,
    }
    return Reconstruction(unpatchify(patches[None], model.patch_size, model.grid), diagnostics)


def _double(value: Tensor) -> Tensor:
    return value.detach().double().cpu()
