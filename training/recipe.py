"""The training recipe of DeiT and MJP as functions: when the jigsaw fires, optimizer, schedules, precision.

Sources: the MJP paper (CVPR 2023) and its code; docs/method.md lists where the two differ and which option gives which.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler, PolyLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from models.jigsaw import Jigsaw, pixel_patch_shuffle, shuffle_inputs, shuffle_patches
from models.token_jigsaw import TokenJigsaw
from utils.distributed import Processes
from utils.errors import UserError


def upload(values: Tensor, device: torch.device) -> Tensor:
    """`values` of the CPU on `device`, copied while the host goes on."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def shuffled_where(model: nn.Module, wanted: str, defended: bool) -> str:
    """Return what a masked step permutes: 'pixels', 'positions' inside the model, or 'nothing'.

    wanted: 'pixels', or 'auto' for the cheapest that trains the same. A class token attends to a set, so moving patches
    is moving their position embeddings the other way; and where all masked patches share one of these, the order of
    their contents makes no difference at all. defended: a defence looks at the images.
    """
    if wanted == "pixels" or defended or not hasattr(model, "order_matters"):
        return "pixels"
    return "positions" if model.order_matters else "nothing"


class MaskPolicy:
    """Decides at every training step whether the jigsaw fires, and applies it to the batch.

    All processes draw the same stream, so one mask covers the global batch (or, per_sample, each its own rows).
    """

    def __init__(
        self,
        grid: tuple[int, int],
        seed: int,
        *,
        mask_ratio: float,
        probability: float,
        start_epoch: int,
        shuffle: str,
        move: str,
        per_sample: bool,
        mask_sampler: str,
        min_block: int,
        max_block: int,
    ):
        self.move = "pixels" if shuffle == "pps" else move
        self.jigsaw = Jigsaw(grid, mask_ratio, mask_sampler, min_block, max_block, seed)
        self.probability, self.start_epoch, self.shuffle, self.per_sample = (
            probability,
            start_epoch,
            shuffle,
            per_sample,
        )
        number = grid[0] * grid[1]
        self.nothing, self.stay = torch.zeros(1, number, dtype=torch.bool), torch.arange(number)[None]

    def __call__(
        self, images: Tensor, epoch: int, patch_size: int, processes: Processes, move: str = "pixels"
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(images, mask, source): the batch and its mask, all-false on steps without the jigsaw.

        move: 'pixels' permutes the images and leaves source None; 'positions' leaves the images and gives the
        permutation for the model to apply, the identity where nothing moves; 'nothing' does neither.
        """
        jigsaw, device = self.jigsaw, images.device
        wanted = jigsaw.mask_ratio > 0 or self.shuffle == "pps"  # pps permutes everything and knows no ratio
        active = wanted and epoch >= self.start_epoch
        moves = move == "positions" and wanted
        if not active or jigsaw.rng.random() >= self.probability:
            return images, upload(self.nothing, device), upload(self.stay, device) if moves else None
        if self.shuffle == "pps":
            return pixel_patch_shuffle(images, patch_size, jigsaw.rng), upload(self.nothing, device), None
        mask, source = jigsaw.draw(len(images) * processes.world_size if self.per_sample else 1)
        if self.per_sample:
            mask, source = (rows[processes.rank :: processes.world_size] for rows in (mask, source))
        mask, source = upload(mask, device), upload(source, device)
        if move == "pixels":
            return shuffle_patches(images, source, patch_size), mask, None
        return images, mask, source if moves else None


class TokenPolicy:
    """The same for batches of token ids (B, n): every sentence has its own mask, all-false if nothing is shuffled."""

    def __init__(
        self,
        grid: tuple[int],
        seed: int,
        *,
        mask_ratio: float,
        probability: float,
        start_epoch: int,
        window: int,
        ngram: int,
        shrinking_window: bool,
    ):
        options = {"window": window, "ngram": ngram, "shrinking": shrinking_window}
        self.jigsaw = TokenJigsaw(mask_ratio, **options, seed=seed)
        self.probability, self.start_epoch, self.move = probability, start_epoch, "pixels"

    def __call__(
        self, ids: Tensor, epoch: int, patch_size: int, processes: Processes, move: str = "pixels"
    ) -> tuple[Tensor, Tensor, None]:
        """(ids, mask, None) as `MaskPolicy` gives (images, mask, source); ids themselves are permuted."""
        jigsaw = self.jigsaw
        if not jigsaw.mask_ratio or epoch < self.start_epoch or jigsaw.rng.random() >= self.probability:
            return ids, torch.zeros_like(ids, dtype=torch.bool), None
        mask, source = jigsaw.draw(ids.cpu(), processes.rank, processes.world_size)
        return shuffle_inputs(ids, source, patch_size), mask.to(ids.device), None


def localization_weight(epoch: int, base: float, epochs: int, warmup_epochs: int) -> float:
    """Weight of the localization loss: 0 to `base` over the warm-up, both ends included, then a cosine to base / 2."""
    if epoch < warmup_epochs:
        return base * epoch / (warmup_epochs - 1) if warmup_epochs > 1 else base
    share = (epoch - warmup_epochs) / max(1, epochs - warmup_epochs)
    return base / 2 + base / 4 * (1 + math.cos(math.pi * share))


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


def build_optimizer(
    model: nn.Module,
    lr: float,
    *,
    optimizer: str = "adamw",
    momentum: float = 0.9,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    fused: bool,
    decay_pos_embed: bool,
) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum, without decay on biases, norms, class token and, unless decay_pos_embed,
    the position embeddings."""
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    if decay_pos_embed:
        exempt -= {"pos_embed", "unknown_pos_embed", "index_embed"}
    groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=exempt)
    if optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=fused)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)


def build_schedule(
    optimizer: torch.optim.Optimizer,
    kind: str,
    updates: int,
    warmup_updates: int,
    warmup_lr: float,
    min_lr: float,
    decay_updates: int | None = None,
    decay_rate: float = 0.1,
) -> Scheduler:
    """Learning rate as a function of the update number: linear warm-up, then training.options.OptimOptions.schedule.

    decay_updates: updates between the decays of a step schedule; None is a third of the run.
    """
    common = {"warmup_t": warmup_updates, "warmup_lr_init": warmup_lr, "t_in_epochs": False}
    if kind == "cosine":
        return CosineLRScheduler(optimizer, t_initial=updates, lr_min=min_lr, **common)
    if kind == "linear":
        base = optimizer.param_groups[0]["lr"]
        after = max(1, updates - warmup_updates)
        return PolyLRScheduler(optimizer, after, power=1.0, lr_min=0.01 * base, warmup_prefix=True, **common)
    decay = decay_updates or max(1, updates // 3)
    return StepLRScheduler(optimizer, decay, decay_rate=decay_rate, warmup_prefix=False, **common)


class AttributeLoss(nn.Module):
    """Mean binary cross-entropy of logits (B, attributes) and targets of 0 and 1 of the same shape."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(logits, targets.to(logits))


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
        """The block multiplies float32 matrices as asked for."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.matmul)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def error(self) -> float:
        """Largest relative error of a float32 matrix product on this device as done here: about 1e-6 where it is true
        float32, 1e-3 where the device rounds the factors to 10 bits or fewer."""
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
