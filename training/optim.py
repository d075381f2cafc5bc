"""Optimizer, schedules and losses of the training recipe of DeiT and MJP.

Sources: the MJP paper (CVPR 2023) and its code; docs/method.md lists where the two differ and which option gives which.
"""

import math

import torch
from timm.data import Mixup
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler, PolyLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from training.options import OptimOptions


def localization_weight(epoch: int, options: OptimOptions) -> float:
    """Return the weight of the localization loss: over the warm-up 0 to `options.localization_weight`, both ends
    included, then a cosine to half of it."""
    base, warmup = options.localization_weight, options.warmup_epochs
    if epoch < warmup:
        return base * epoch / (warmup - 1) if warmup > 1 else base
    share = (epoch - warmup) / max(1, options.epochs - warmup)
    return base / 2 + base / 4 * (1 + math.cos(math.pi * share))


def build_optimizer(model: nn.Module, options: OptimOptions, lr: float) -> torch.optim.Optimizer:
    """Return AdamW, or SGD with Nesterov momentum, at rate `lr`, without decay on biases, norms, class token and,
    unless `decay_pos_embed`, the position embeddings."""
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    if options.decay_pos_embed:
        exempt -= {"pos_embed", "unknown_pos_embed", "index_embed"}
    groups = param_groups_weight_decay(model, options.weight_decay, no_weight_decay_list=exempt)
    if options.optimizer == "sgd":
        nesterov = options.momentum > 0
        return torch.optim.SGD(groups, lr=lr, momentum=options.momentum, nesterov=nesterov, fused=options.fused)
    return torch.optim.AdamW(groups, lr=lr, betas=options.betas, eps=options.eps, fused=options.fused)


def build_schedule(
    optimizer: torch.optim.Optimizer, options: OptimOptions, updates_per_epoch: int, scale: float
) -> Scheduler:
    """Return the learning rate as a function of the update number: linear warm-up, then `options.schedule`.

    scale: images in an update over 512, which the rates are given for.
    """
    updates, warmup = options.epochs * updates_per_epoch, options.warmup_epochs * updates_per_epoch
    min_lr = options.min_lr * scale
    common = {"warmup_t": warmup, "warmup_lr_init": options.warmup_lr * scale, "t_in_epochs": False}
    if options.schedule == "cosine":
        return CosineLRScheduler(optimizer, t_initial=updates, lr_min=min_lr, **common)
    if options.schedule == "linear":
        base = optimizer.param_groups[0]["lr"]
        after = max(1, updates - warmup)
        return PolyLRScheduler(optimizer, after, power=1.0, lr_min=0.01 * base, warmup_prefix=True, **common)
    decay = options.decay_epochs * updates_per_epoch if options.decay_epochs else max(1, updates // 3)
    return StepLRScheduler(optimizer, decay, decay_rate=options.decay_rate, warmup_prefix=False, **common)


def build_mixup(options: OptimOptions, num_classes: int) -> Mixup | None:
    """Return what mixes the images of a batch and smooths their labels; None where nothing is mixed."""
    if not options.mixing:
        return None
    return Mixup(
        options.mixup,
        options.cutmix,
        options.cutmix_minmax,
        prob=options.mixup_probability,
        switch_prob=options.mixup_switch,
        mode=options.mixup_mode,
        label_smoothing=options.label_smoothing,
        num_classes=num_classes,
    )


def build_criterion(options: OptimOptions, loss: str) -> nn.Module:
    """Return the loss of logits and targets: 'cross_entropy' of classes, or 'bce' of attributes. Labels that are mixed
    are smoothed by `build_mixup`."""
    smoothing = 0.0 if options.mixing else options.label_smoothing
    return AttributeLoss() if loss == "bce" else nn.CrossEntropyLoss(label_smoothing=smoothing)


class AttributeLoss(nn.Module):
    """Mean binary cross-entropy of logits (B, attributes) and targets of 0 and 1 of the same shape."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(logits, targets.to(logits))
