"""APRIL's closed form: the tokens of a transformer without LayerNorm before its first attention, then their pixels.

Where the tokens z_i (patch embedding plus position embedding) feed the query, key and value weights W directly and
nothing else, their gradients are d_i = W^T a_i, with a_i the gradient by what W puts out for token i. So W^T dL/dW =
sum_i d_i z_i^T: with the PE gradients d_i as the columns of a matrix, tokens come from one least-squares problem,
unique while there are no more tokens than dimensions; pixels follow from inverting the patch projection.

Only `AprilBlock` (models/vit.py, option april) is built like that; attacks/linear/closed_form.py needs no such model. A
second block with residual connections is needed too: behind a single block that is read out at the class token, the d_i
have the rank 2 * heads + 1 and do not determine the tokens.

Source: Lu et al., "APRIL: Finding the Achilles' Heel on Privacy for Vision Transformers", CVPR 2022, section 3.
"""

import torch
from torch import Tensor

from attacks.exactness import MARGIN, claim, is_exact, rounding, solve
from attacks.threat_model.checks import check_single, checked
from attacks.threat_model.leak import Leak, Reconstruction, RefusalError
from models.jigsaw import unpatchify
from models.vit import AprilBlock, VisionTransformer


def check_april(leak: Leak, options: dict, loss: str, attack: str) -> None:
    """Raise UserError unless the model is one of APRIL's design, with no more values in a patch and no more tokens than
    dimensions, and the leak is one gradient of one image."""
    model = leak.model
    if not (isinstance(model, VisionTransformer) and isinstance(model.blocks[0], AprilBlock)):
        raise RefusalError(
            f"attack '{attack}' needs a ViT whose first block has neither LayerNorm before attention nor residual "
            f"connections: build it with april=true, or use attack 'closed_form'"
        )
    check_single(leak, attack)
    dim, values = model.patch_embed.proj.weight.flatten(1).shape
    if values > dim:
        raise RefusalError(
            f"attack '{attack}' cannot invert a patch projection from {values} pixel values to {dim} dimensions: "
            f"it needs smaller patches or a larger embed_dim"
        )
    leak.gradient("blocks.0.attn.qkv.weight", attack)
    tokens = leak.gradient("pos_embed", attack).shape[1]
    if tokens >= dim:
        raise RefusalError(
            f"attack '{attack}' needs fewer tokens than dimensions, and this model has {tokens} and {dim}"
        )


@checked(check_april, uses=())
def april(leak: Leak, *, generator: torch.Generator) -> Reconstruction:
    """Reconstruct one image from the gradients of the PE and of the first block's qkv weight, on the CPU in float64;
    `generator` is not drawn from. Raises UserError for other models and for more than one image.

    This attacker does not know of MJP. Hidden patches have PE gradients of zero, so nothing is found for them, while
    W^T dL/dW still contains their share, which the visible patches take up; `exact` is then False.

    diagnostics: rank (of the token gradients, at the rounding of the leak), unknowns (tokens), condition, residual
    (relative), error (predicted, of a pixel, range 1), exact (attacks/exactness.py).
    """
    model = leak.model
    projection = _double(model.patch_embed.proj.weight).flatten(1)  # (D, P)
    rows = leak.gradient("pos_embed", "april")[0]  # (1 + N, D)
    weight, gradient = model.blocks[0].attn.qkv.weight, leak.gradient("blocks.0.attn.qkv.weight", "april")
    system, right = _double(rows).T, _double(weight).T @ _double(gradient)
    if not system.any():
        raise RefusalError("the gradient of 'pos_embed' is zero everywhere: nothing can be reconstructed from it")
    eps = rounding((rows, gradient))
    solution = solve(system, right, eps)
    tokens = solution.values - _double(model.pos_embed)[0]
    if model.index_embed is not None:
        tokens = tokens - _double(model.index_embed)[0]
    embedded = tokens[model.num_prefix_tokens :] - _double(model.patch_embed.proj.bias)
    inverse = torch.linalg.pinv(projection)  # (P, D)
    patches = embedded @ inverse.T
    # What of the tokens no patch can give: as large as their error, if the equations are right.
    away = float((embedded - patches @ projection.T).square().mean().sqrt())
    pixels = float(torch.tensor(leak.std, dtype=torch.float64).square().mean().sqrt())
    spread = float(inverse.square().sum() / len(inverse)) ** 0.5  # of a pixel, for tokens of error 1
    error = max(solution.error, away) * spread * pixels
    # Measured on one processor: pixels off by 1.5 times what is predicted from seventeen tokens.
    surely = MARGIN * error
    holds = is_exact(rank=solution.rank, unknowns=len(rows), misfit=solution.misfit, error=surely, eps=eps)
    hidden = bool((rows[model.num_prefix_tokens :] == 0).all(dim=1).any())
    singular = torch.linalg.svdvals(system)
    diagnostics = {
        "rank": solution.rank,
        "unknowns": len(rows),
        "condition": float(singular[0] / singular[-1].clamp_min(1e-300)),
        "residual": solution.residual,
        "error": error,
        **claim(patches=holds and not hidden, places=True),
    }
    return Reconstruction(unpatchify(patches[None], model.patch_size, model.grid), diagnostics)


def _double(value: Tensor) -> Tensor:
    return value.detach().double().cpu()
