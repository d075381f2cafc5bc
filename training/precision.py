"""How a step is computed, which changes numbers by rounding alone: precision of products, kernels, memory format."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from utils.errors import UserError


def choose_kernels(model: nn.Module, attention: str, channels_last: bool) -> None:
    """Set, in place, how the model is computed, which changes results by rounding alone.

    attention: 'fused' (scaled_dot_product_attention) or 'plain' (two matrix products and a softmax), which some
    processors do faster in bf16. channels_last: store convolutions' weights with channels innermost. Raises UserError
    where the model has no attention with two kernels (ResNets, rotary positions, text).
    """
    if attention == "plain":
        layers = [module for module in model.modules() if hasattr(module, "fused_attn")]
        if not layers:
            raise UserError("--optim.attention plain: this model has none of that kind: leave it out")
        for layer in layers:
            layer.fused_attn = False
    if channels_last:
        model.to(memory_format=torch.channels_last)


class Precision:
    """Mixed precision of the forward pass: 'none', 'bf16' or 'fp16' (which needs a GPU and scales its gradients), and
    how float32 matrix products are done: 'highest', 'high' or 'medium' (torch.set_float32_matmul_precision)."""

    def __init__(self, amp: str, matmul: str, device: torch.device):
        if amp == "fp16" and device.type != "cuda":
            raise UserError("--optim.amp fp16 needs a GPU: use bf16 on a CPU")
        self.amp, self.matmul, self.device = amp, matmul, device
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

    @contextmanager
    def products(self) -> Iterator[None]:
        """Let the block multiply float32 matrices as asked for."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.matmul)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def error(self) -> float:
        """Return the largest relative error of a float32 matrix product on this device as done here: about 1e-6 where
        it is true float32, 1e-3 where the device rounds the factors to 10 bits or fewer."""
        generator = torch.Generator().manual_seed(0)
        one, other = torch.rand(2, 256, 256, generator=generator, dtype=torch.float64)
        exact = one @ other
        with self.products():
            found = (one.float().to(self.device) @ other.float().to(self.device)).cpu().double()
        return float(((found - exact) / exact).abs().max())

    def forward(self):
        if self.amp == "none":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if self.amp == "bf16" else torch.float16)
