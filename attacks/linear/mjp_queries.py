"""What the queries of the visible tokens tell of the hidden patches: attention of the first block, as an equation."""

import torch
from torch import Tensor

from attacks.linear.mjp_equations import FirstBlock, centre


class Queries:
    """Gradients of the visible tokens' queries in the first block, as a function of the hidden patches.

    The attention of a visible query reads keys and values of every token: with its output gradient known and the
    visible tokens known, the keys and values of the hidden ones are the only unknowns.
    """

    def __init__(self, block: FirstBlock, visible: Tensor):
        self.block, hidden = block, block.span.hidden
        offsets = block.offset
        self.offset = offsets[hidden][:1]  # bias and unknown embedding, the same for all
        tokens = centre(visible @ block.embed.T + offsets[~hidden])
        tokens = torch.cat([block.tokens[:1], tokens])
        fit = (visible - block.span.base[~hidden]) @ block.span.basis.T
        ratio = torch.cat([block.class_ratio[None], torch.where(block.certain, block.ratio, block.ratios(fit))])
        behind = block.known + ratio[:, None] * tokens  # g'_i
        deviation = (tokens.square().mean(1, keepdim=True) + block.eps).sqrt()
        normed = tokens / deviation * block.scale + block.bias
        self.queries, self.keys, self.values = self._split(normed @ block.qkv.T + block.qkv_bias)
        self.targets = self._split(block.through * deviation)[0]
        (self.outputs,) = self._split(behind @ block.proj, 1)
        self.temperature = self.queries.shape[2] ** -0.5
        self.norm = self.targets.square().mean().sqrt()

    def _split(self, rows: Tensor, parts: int = 3) -> list[Tensor]:
        """Split (M, parts D) into `parts` tensors (heads, M, D / heads)."""
        return [part.unflatten(1, (self.block.heads, -1)).transpose(0, 1) for part in rows.chunk(parts, dim=1)]

    def residual(self, patches: Tensor, chosen: Tensor | slice = slice(None), basis: Tensor | None = None):
        """Return (heads, Q, D / heads): relative error of the chosen queries' gradients for hidden patches (k, P).

        With a basis (r, P) of the directions in which patches move, also its Jacobian (elements, k r).
        """
        block = self.block
        tokens = centre(patches @ block.embed.T + self.offset)
        deviation = (tokens.square().mean(1, keepdim=True) + block.eps).sqrt()
        unit = tokens / deviation
        _, keys, values = self._split((unit * block.scale + block.bias) @ block.qkv.T + block.qkv_bias)
        queries, outputs = self.queries[:, chosen], self.outputs[:, chosen]
        every_key, every_value = torch.cat([self.keys, keys], dim=1), torch.cat([self.values, values], dim=1)
        attention = (queries @ every_key.mT * self.temperature).softmax(dim=2)
        upstream = outputs @ every_value.mT
        excess = upstream - (attention * upstream).sum(dim=2, keepdim=True)
        gradient = (attention * excess) @ every_key
        residual = (gradient * self.temperature - self.targets[:, chosen]) / self.norm
        if basis is None:
            return residual
        # d gradient = sum_m a_m [dlogit_m (excess_m (k_m - mean k) - gradient) + dupstream_m (k_m - mean k)
        #              + excess_m dk_m], with m the hidden patches.
        moved = centre(basis @ block.embed.T)
        change = moved[None] - unit[:, None] * (unit @ moved.T / unit.shape[1])[..., None]
        change = (change / deviation[:, None] * block.scale).flatten(0, 1) @ block.qkv[unit.shape[1] :].T
        dkeys, dvalues = (part.unflatten(1, (len(patches), -1)) for part in self._split(change, 2))
        last = slice(-len(patches), None)
        apart = keys[:, None] - (attention @ every_key)[:, :, None]  # (heads, Q, k, D / heads)
        inner = excess[:, :, last, None] * apart - gradient[:, :, None]
        logits = torch.einsum("hqe,hmbe->hqmb", queries, dkeys) * self.temperature
        passed = torch.einsum("hqe,hmbe->hqmb", outputs, dvalues)
        jacobian = torch.einsum("hqmb,hqme->hqemb", logits, inner) + torch.einsum("hqmb,hqme->hqemb", passed, apart)
        jacobian += torch.einsum("hqm,hmbe->hqemb", excess[:, :, last], dkeys)
        jacobian *= attention[:, :, None, last, None] * (self.temperature / self.norm)
        return residual, jacobian.flatten(0, 2).flatten(1)
