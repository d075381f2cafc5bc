"""Was a picture behind this leak? What a linear layer read lies in the span of its gradient.

The gradient of a linear layer is sum_t delta_t [a_t; 1]^T over the tokens t of all images (the one only where it has a
bias), so the inputs of a picture that took part lie in the span of its rows; those of another one do not, as long as
the span is not everything. It needs no other gradient: a head, LoRA's first matrix or an adapter is enough. Scores
of distances are in eval/membership.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.label_recovery import classifier_of
from attacks.threat_model.leak import Leak
from utils.errors import UserError, did_you_mean

THIN = ("lora_a", "adapter.down.weight")  # names of thin matrices, each the first of two


@dataclass(frozen=True)
class Span:
    """A layer's gradient as a set of directions. layer: its name; rows (k, n), orthonormal, of what it read, with a one
    behind where `bias`; inputs: that it read, over all images. Where they are more than k, members lie in the span in
    part only."""

    layer: str
    rows: Tensor
    bias: bool
    inputs: int


def span_of(leak: Leak, layer: str | None = None) -> Span:
    """Return the span of what a linear layer read; layer None: the classifier, or else the first thin matrix that is
    shared.

    Its rank is the number of inputs, and at most that of the rows. A layer of the last block gets a gradient from the
    class token alone: ask an earlier one. Raises UserError for a layer that is none, is not shared or has a gradient
    of zeros, and where the span holds everything the layer can read: it then says nothing.
    """
    name = layer or _default(leak)
    parts = {"": f"{name}.weight", "LoRA": f"{name}.lora_a"}
    own = next((parts[kind] for kind in ("LoRA", "") if parts[kind] in leak.gradients), None)
    if own is None:
        shared = [key.rpartition(".")[0] for key, value in leak.gradients.items() if value.dim() == 2]
        hint = did_you_mean(name, list(dict.fromkeys(shared)))
        raise UserError(f"membership: this leak has no gradient of a linear layer '{name}': {hint}")
    matrix = leak.gradient(own, "membership").cpu()
    if matrix.dim() != 2:
        raise UserError(f"membership: '{own}' is no matrix, and only linear layers have a span")
    bias = own.endswith(".weight") and f"{name}.bias" in leak.gradients
    if bias:
        matrix = torch.cat([matrix, leak.gradient(f"{name}.bias", "membership").cpu()[:, None]], dim=1)
    if not matrix.any():
        raise UserError(
            f"membership: the gradient of '{own}' is zero (LoRA's first matrix is until the second has been trained)"
        )
    blank = torch.zeros(1, *leak.image_shape)
    inputs = leak.batch_size * inputs_of(leak.model, name, blank.to(next(leak.model.parameters()))).shape[1]
    rank = min(inputs, len(matrix))
    if rank >= matrix.shape[1]:
        raise UserError(
            f"membership: the {inputs} inputs of '{name}' span all of its {matrix.shape[1]} dimensions, so that every "
            f"picture seems to be a member: choose another --layer"
        )
    return Span(name, torch.linalg.svd(matrix.double(), full_matrices=False).Vh[:rank], bias, inputs)


def _default(leak: Leak) -> str:
    """Return the classifier where its gradient is shared, else the first layer with a thin matrix."""
    name = classifier_of(leak.model, leak.image_shape)
    thin = [key for key in leak.gradients if key.endswith(THIN)]
    if f"{name}.weight" in leak.gradients or not thin:
        return name
    return next((key for key in thin if leak.gradients[key].any()), thin[0]).rpartition(".")[0]


@torch.no_grad()
def inputs_of(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    """Return what a layer reads of images (B, C, H, W), normalised: (B, tokens, n), one token for a classifier."""
    seen: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    try:
        model(images)
    finally:
        handle.remove()
    if len(seen) != 1 or len(seen[0]) != len(images):
        raise UserError(f"membership: '{layer}' does not read each image once, so its inputs are no picture's own")
    return seen[0].reshape(len(images), -1, seen[0].shape[-1]).cpu()


def distances(span: Span, model: nn.Module, images: Sequence[Tensor]) -> Tensor:
    """Return the distance (M,) of pictures, in batches (B, C, H, W), from the span: the mean over what the layer reads
    of each of |rest| / |input|, 0 for members, lower is more likely one."""
    found = []
    for batch in images:
        values = inputs_of(model, span.layer, batch).double()  # (B, T, n)
        if span.bias:
            values = nn.functional.pad(values, (0, 1), value=1.0)
        rest = values - values @ span.rows.T @ span.rows
        found.append((rest.norm(dim=2) / values.norm(dim=2)).mean(dim=1))
    return torch.cat(found)
