"""Training: steps, epochs, and the state that makes a resumed run equal a straight one, bit for bit on a CPU."""

import signal
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data.device_augment import DeviceAugment
from data.loaders import Batch
from defenses.base import Defense, Step, mean_loss
from defenses.training import clipped_backward, defend
from models.position import given_mask
from models.task import Task, localization_loss
from training.masking import MaskPolicy, TokenPolicy, shuffled_where
from training.optim import build_criterion, build_mixup, build_optimizer, build_schedule, localization_weight
from training.options import LogOptions, OptimOptions
from training.precision import Precision, choose_kernels
from utils.distributed import Processes
from utils.errors import Stopped, UserError
from utils.seeds import derive_seed, seed_everything
from utils.stopping import StopSignal


class Trainer:
    """Everything that changes from step to step, and the one function that changes it.

    Every step seeds the global generators from (seed, epoch, step, rank), so `state_dict` needs no generator states
    but the jigsaw's own.
    """

    def __init__(
        self,
        model: nn.Module,
        processes: Processes,
        policy: MaskPolicy | TokenPolicy,
        options: OptimOptions,
        log: LogOptions,
        *,
        steps: int,
        batch_size: int,
        num_classes: int,
        seed: int,
        normalize: dict,
        defense: Defense,
    ):
        """Prepare to train `model` (whose `loss` says of what: classes or attributes), in place.

        Args:
            policy: what masks the inputs.
            log: how often checks and checkpoints come.
            steps: of an epoch.
            batch_size: images per process and step.
            normalize: mean and std of the images.
            defense: of a client that holds the whole training set; the global batch of a step is its batch.
        """
        defense.check(model)
        self.model, self.processes, self.policy = model, processes, policy
        self.options, self.log, self.steps, self.batch_size, self.seed = options, log, steps, batch_size, seed
        self.defense, self.about_images = defense, {**normalize, "num_classes": num_classes}
        self.augment = DeviceAugment(processes.device, **normalize)
        self.precision, self.stop = Precision(options.amp, options.matmul, processes.device), StopSignal()
        choose_kernels(model, options.attention, options.channels_last)
        self.move = shuffled_where(model, policy.move, defense.changes_gradients and defense.active)
        self.checkpoint_seconds, self.saved_at = 60 * log.checkpoint_minutes, time.monotonic()
        self.check_every = 1 if processes.device.type == "cpu" else log.every  # asking a GPU means waiting for it
        self.mixup, self.criterion = build_mixup(options, num_classes), build_criterion(options, model.loss)
        self.update_size = batch_size * processes.world_size * options.accumulation  # examples in an update
        scale = self.update_size / 512
        self.optimizer = build_optimizer(model, options, options.lr * scale)
        self.schedule = build_schedule(self.optimizer, options, steps // options.accumulation, scale)
        self.ema = ModelEmaV3(model, decay=options.ema) if options.ema else None
        if options.grad_checkpointing:
            if not hasattr(model, "set_grad_checkpointing"):
                raise UserError("--optim.grad_checkpointing: this model has no blocks to recompute: leave it out")
            model.set_grad_checkpointing()
        task = Task(model)
        if processes.world_size > 1:
            gpu = [processes.device] if processes.device.type == "cuda" else None
            task = DistributedDataParallel(task, device_ids=gpu)
        self.distributed_task = task
        self.task = torch.compile(task) if options.compile else task
        self.epoch = self.step = 0  # the next step to do
        self.last_checkpoint = "none yet"
        self.unreadable: set[int] = set()  # places in the training set whose files were passed over, on this process
        self.sums = self._fresh_sums()

    def _fresh_sums(self) -> Tensor:
        """Return the totals of the running epoch: loss, localization loss, masked share (each times images), images,
        skipped."""
        return torch.zeros(5, dtype=torch.float64, device=self.processes.device)

    def train_epoch(self, batches: Iterable[Batch], save: Callable[[], None]) -> dict:
        """Run the rest of the current epoch over `batches` and return its means over all processes.

        `save` is called when a checkpoint is due, and when a signal asked to stop; then Stopped is raised. A NaN or
        infinite loss raises UserError.
        """
        steps = self.steps
        self.model.train()
        started, first = time.monotonic(), self.step
        bad_step = torch.full((), steps, device=self.processes.device)
        for batch in batches:
            with self.precision.products():
                loss = self._train_step(batch)
            bad_step = torch.minimum(bad_step, torch.where(loss.isfinite(), steps, self.step))
            self.step += 1
            updates, unfinished = divmod(self.step, self.options.accumulation)  # half an update could not be resumed
            if not unfinished and (updates % self.check_every == 0 or self.step == steps):
                self._check(bad_step, save)
        loss, localization, masked, images, skipped = self.processes.sum(self.sums).tolist()
        rate = (self.step - first) * self.batch_size * self.processes.world_size / (time.monotonic() - started)
        stats = {
            "loss": loss / images,
            "localization": localization / images,
            "masked": masked / images,
            "skipped": int(skipped),
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_second": rate,
        }
        self.epoch, self.step, self.sums = self.epoch + 1, 0, self._fresh_sums()
        return stats

    def _check(self, bad_step: Tensor, save: Callable[[], None]) -> None:
        """Look at what the device and the other processes have seen; every process decides the same."""
        if self.processes.any(int(bad_step) < self.steps):
            where = f"epoch {self.epoch}, step {min(int(bad_step), self.step - 1)}"
            raise UserError(
                f"the loss became NaN or infinite at {where}; last good checkpoint: {self.last_checkpoint}; "
                f"lower --optim.lr or use --optim.amp none"
            )
        if self.processes.any(bool(self.stop.received)):
            save()
            raise self.stopped()
        overdue = 0 < self.checkpoint_seconds <= time.monotonic() - self.saved_at
        if self.processes.any(overdue and self.step < self.steps):
            save()

    def stopped(self, when: str = "") -> Stopped:
        """Return the exception of a run that was asked to stop, on this or another process, and has saved its state."""
        text = f"state saved at epoch {self.epoch}, step {self.step}{when}"
        return Stopped(text, self.stop.received or signal.SIGTERM, "continue with --resume auto")

    def _train_step(self, batch: Batch) -> Tensor:
        """Forward and backward of one batch, an update when its accumulation is complete. Returns the loss.

        Nothing here waits for a GPU: what the host needs to know it knows before.
        """
        processes, device = self.processes, self.processes.device
        seed_everything(derive_seed(self.seed, "step", self.epoch, self.step, processes.rank))
        update, part = divmod(self.epoch * self.steps + self.step, self.options.accumulation)
        if part == 0:
            self.schedule.step_update(update)
        images, labels = batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)
        if batch.plan is not None:
            images = self.augment(images, batch.plan)
        client = 0 if self.defense.changes_gradients else processes.rank  # the gradient is the same on all processes
        draws = torch.Generator().manual_seed(derive_seed(self.seed, "defense", self.epoch, self.step, client))
        images, targets = self.defense.images(images, labels, generator=draws, **self.about_images)
        if self.mixup:
            images, targets = self.mixup(images, targets)
        images, mask, source = self.policy(images, self.epoch, self.model.patch_size, processes, self.move)
        if self.options.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        last = part == self.options.accumulation - 1
        weight = localization_weight(self.epoch, self.options)
        loss_of = mean_loss(self.criterion, self.model)
        step = Step(self.model, images, targets, given_mask(self.model, mask), loss_of, self.precision.forward)
        if self.defense.clips_examples:
            localization, share = localization_loss(self.model, images, mask), self.batch_size / self.update_size
            loss = clipped_backward(self.defense, step, weight * localization, share, self.update_size)
        else:
            quiet = processes.world_size > 1 and not last  # exchange gradients once per update
            with self.distributed_task.no_sync() if quiet else nullcontext():
                with self.precision.forward():
                    logits, localization, penalty = self.task(images, mask, source)
                loss = self.criterion(logits.float(), targets) + weight * localization + penalty
                self.precision.scaler.scale(loss / self.options.accumulation).backward()
        if last:
            if self.defense.changes_gradients:
                defend(self.defense, step, processes.sum, self.update_size, draws)
            self._update(update)
        means = torch.stack([loss.detach(), localization.detach(), mask.float().mean()]).double()
        self.sums[:3] += means * len(labels)
        self.sums[3] += len(labels)
        self.sums[4] += int(batch.skipped.sum())
        for place, number in zip(batch.index.tolist(), batch.skipped.tolist(), strict=True):
            self.unreadable.update(range(place - number, place))  # negative ones count from the end
        return loss.detach()

    @property
    def updates(self) -> int:
        """Updates done up to the current step, of epochs as long as this one."""
        return (self.epoch * self.steps + self.step) // self.options.accumulation

    def sample_rate(self, examples: int) -> float:
        """Return the share of so many examples that an update takes."""
        return min(1.0, self.update_size / examples)

    def _update(self, update: int) -> None:
        scaler = self.precision.scaler
        if self.options.clip:
            scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.model, step=update)

    def weights(self) -> dict:
        """Return the weights and, with EMA, their average."""
        average = self.ema.module.state_dict() if self.ema else None
        return {"model": self.model.state_dict(), "model_ema": average}

    def is_finite(self) -> bool:
        """Return whether every weight is a number: a bad gradient shows in the loss a step after it has spoilt them."""
        return all(bool(value.isfinite().all()) for value in self.model.state_dict().values())

    def state_dict(self) -> dict:
        """Return tensors and plain values from which `load_state_dict` continues exactly, gathered on every process."""
        return {
            **self.weights(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "jigsaw": self.policy.jigsaw.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "steps": self.steps,
            "sums": self.processes.sum(self.sums),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from a state. Options of the optimizer stay those of this run, not of the saved one."""
        if state["step"] and state["steps"] != self.steps:
            raise UserError(
                f"the run stopped inside an epoch of {state['steps']} steps, and now an epoch has {self.steps}: resume "
                f"with the same global batch, --data.batch_size times the number of processes"
            )
        self.model.load_state_dict(state["model"])
        if self.ema:
            self.ema.module.load_state_dict(state["model_ema"] or state["model"])
        options = [
            {key: value for key, value in group.items() if key not in ("params", "lr")}
            for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, chosen in zip(self.optimizer.param_groups, options, strict=True):
            group.update(chosen)
        self.precision.scaler.load_state_dict(state["scaler"])
        self.policy.jigsaw.load_state_dict(state["jigsaw"])
        self.epoch, self.step = state["epoch"], state["step"]
        if self.processes.is_main:  # the totals of all processes are kept by one
            self.sums = state["sums"].to(self.processes.device)
