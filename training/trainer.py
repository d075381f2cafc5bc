"""Training: steps, epochs, and the state that makes a resumed run equal a straight one, bit for bit on a CPU."""

import signal
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from data.decode import in_words
from data.device_augment import DeviceAugment
from data.loaders import Batch, name_unreadable
from defenses.base import Defense, Step, mean_loss
from defenses.training import Account, clipped_backward, defend, describe_guarantee
from models.checkpoints import read_checkpoint, save_checkpoint
from models.task import Task, localization_loss
from training.recipe import (
    AttributeLoss,
    MaskPolicy,
    Precision,
    TokenPolicy,
    build_optimizer,
    build_schedule,
    choose_kernels,
    localization_weight,
    shuffled_where,
)
from utils.distributed import Processes
from utils.errors import Stopped, UserError
from utils.progress import EPOCH_HEAD, log_epoch, track
from utils.runs import Run
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
        *,
        steps: int,
        batch_size: int,
        num_classes: int,
        seed: int,
        check_every: int,
        checkpoint_minutes: float,
        epochs: int,
        lr: float,
        warmup_lr: float,
        min_lr: float,
        warmup_epochs: int,
        schedule: str,
        decay_epochs: int | None,
        decay_rate: float,
        optimizer: str,
        momentum: float,
        weight_decay: float,
        decay_pos_embed: bool,
        betas: tuple[float, float],
        eps: float,
        fused: bool,
        clip: float,
        accumulation: int,
        mixup: float,
        cutmix: float,
        cutmix_minmax: tuple[float, float] | None,
        mixup_probability: float,
        mixup_switch: float,
        mixup_mode: str,
        label_smoothing: float,
        localization_weight: float,
        ema: float,
        amp: str,
        matmul: str,
        attention: str,
        channels_last: bool,
        compile: bool,  # noqa: A002, the option's name
        grad_checkpointing: bool,
        defense: Defense,
        normalize: dict,
        loss: str = "cross_entropy",
    ):
        """steps per epoch, batch_size per process; checkpoint_minutes between checkpoints inside an epoch, 0 is none;
        normalize: mean and std of the images; the rest as in training.options.OptimOptions. Rates are per 512 images.

        loss: cross_entropy of classes, or bce of attributes. defense: one client holds the whole training set, and the
        global batch of a step is its batch.
        """
        defense.check(model)
        self.defense, self.about_images = defense, {**normalize, "num_classes": num_classes}
        self.augment = DeviceAugment(processes.device, **normalize)
        self.model, self.processes, self.policy, self.steps = model, processes, policy, steps
        self.epochs, self.warmup_epochs, self.base_weight = epochs, warmup_epochs, localization_weight
        self.batch_size, self.clip, self.accumulation = batch_size, clip, accumulation
        self.seed, self.channels_last = seed, channels_last
        self.precision, self.stop = Precision(amp, matmul, processes.device), StopSignal()
        choose_kernels(model, attention, channels_last)
        self.move = shuffled_where(model, policy.move, defense.changes_gradients and defense.active)
        self.checkpoint_seconds, self.saved_at = 60 * checkpoint_minutes, time.monotonic()
        self.check_every = 1 if processes.device.type == "cpu" else check_every  # asking a GPU means waiting for it
        mixing = mixup > 0 or cutmix > 0 or cutmix_minmax is not None
        drawn = {"prob": mixup_probability, "switch_prob": mixup_switch, "mode": mixup_mode}
        drawn |= {"label_smoothing": label_smoothing, "num_classes": num_classes}
        self.mixup = Mixup(mixup, cutmix, cutmix_minmax, **drawn) if mixing else None
        smooth = 0.0 if mixing else label_smoothing
        self.criterion = AttributeLoss() if loss == "bce" else nn.CrossEntropyLoss(label_smoothing=smooth)
        self.update_size = batch_size * processes.world_size * accumulation  # examples in an update
        scale, updates = self.update_size / 512, steps // accumulation
        self.optimizer = build_optimizer(
            model,
            lr * scale,
            optimizer=optimizer,
            momentum=momentum,
            weight_decay=weight_decay,
            betas=betas,
            eps=eps,
            fused=fused,
            decay_pos_embed=decay_pos_embed,
        )
        self.schedule = build_schedule(
            self.optimizer,
            schedule,
            epochs * updates,
            warmup_epochs * updates,
            warmup_lr * scale,
            min_lr * scale,
            decay_epochs and decay_epochs * updates,
            decay_rate,
        )
        self.ema = ModelEmaV3(model, decay=ema) if ema else None
        if grad_checkpointing:
            model.set_grad_checkpointing()
        task = Task(model)
        if processes.world_size > 1:
            gpu = [processes.device] if processes.device.type == "cuda" else None
            task = DistributedDataParallel(task, device_ids=gpu)
        self.distributed_task = task
        self.task = torch.compile(task) if compile else task
        self.epoch = self.step = 0  # the next step to do
        self.last_checkpoint = "none yet"
        self.unreadable: set[int] = set()  # places in the training set whose files were passed over, on this process
        self.sums = self._fresh_sums()

    def _fresh_sums(self) -> Tensor:
        """Totals of the running epoch: loss, localization loss, masked share (each times images), images, skipped."""
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
            updates, unfinished = divmod(self.step, self.accumulation)  # half an update could not be resumed
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
        """The exception of a run that was asked to stop, on this or another process, and has saved its state."""
        text = f"state saved at epoch {self.epoch}, step {self.step}{when}"
        return Stopped(text, self.stop.received or signal.SIGTERM, "continue with --resume auto")

    def _train_step(self, batch: Batch) -> Tensor:
        """Forward and backward of one batch, an update when its accumulation is complete. Returns the loss.

        Nothing here waits for a GPU: what the host needs to know it knows before.
        """
        processes, device = self.processes, self.processes.device
        seed_everything(derive_seed(self.seed, "step", self.epoch, self.step, processes.rank))
        update, part = divmod(self.epoch * self.steps + self.step, self.accumulation)
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
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        last = part == self.accumulation - 1
        weight = localization_weight(self.epoch, self.base_weight, self.epochs, self.warmup_epochs)
        hidden = mask if self.model.hides_positions else None
        step = Step(self.model, images, targets, hidden, mean_loss(self.criterion, self.model), self.precision.forward)
        if self.defense.clips_examples:
            localization, share = localization_loss(self.model, images, mask), self.batch_size / self.update_size
            loss = clipped_backward(self.defense, step, weight * localization, share, self.update_size)
        else:
            quiet = processes.world_size > 1 and not last  # exchange gradients once per update
            with self.distributed_task.no_sync() if quiet else nullcontext():
                with self.precision.forward():
                    logits, localization, penalty = self.task(images, mask, source)
                loss = self.criterion(logits.float(), targets) + weight * localization + penalty
                self.precision.scaler.scale(loss / self.accumulation).backward()
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
        return (self.epoch * self.steps + self.step) // self.accumulation

    def sample_rate(self, examples: int) -> float:
        """Return the share of so many examples that an update takes."""
        return min(1.0, self.update_size / examples)

    def _update(self, update: int) -> None:
        scaler = self.precision.scaler
        if self.clip:
            scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.model, step=update)

    def weights(self) -> dict:
        """The weights and, with EMA, their average."""
        average = self.ema.module.state_dict() if self.ema else None
        return {"model": self.model.state_dict(), "model_ema": average}

    def is_finite(self) -> bool:
        """Whether every weight is a number: a bad gradient shows in the loss one step after it has spoilt them."""
        return all(bool(value.isfinite().all()) for value in self.model.state_dict().values())

    def state_dict(self) -> dict:
        """Tensors and plain values from which `load_state_dict` continues exactly, gathered on every process."""
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


def label_order(train: DataLoader, val: DataLoader, run: Run) -> list[str]:
    """Return the class names of a training set by label: in the order of the run that is resumed, where it had another.

    Logs how many hidden files and folders the data sets passed over.
    """
    classes = list(train.dataset.base.classes)
    if litter := [path for loader in (train, val) for path in getattr(loader.dataset.base, "litter", ())]:
        run.log(in_words(litter, Path(litter[0]).parent))
    if run.resumed and not getattr(train.dataset.base, "multi_label", False):
        before = read_checkpoint(run.folder / "last.pt").get("classes")
        if isinstance(before, list) and before != classes and sorted(before) == sorted(classes):
            for loader in (train, val):
                loader.dataset.label_map = [before.index(name) for name in loader.dataset.base.classes]
            return before
    return classes


def fit(
    trainer: Trainer,
    batches: DataLoader,
    run: Run,
    *,
    about: dict,
    evaluate: Callable[[nn.Module, StopSignal], dict],
    pictures: Callable[[], dict[str, Tensor]],
    checkpoint_every: int,
    images_every: int,
    start: str | None = None,
) -> dict:
    """Train to the last epoch, from the start or from the run's last.pt, and return the final numbers.

    about: what every checkpoint holds besides the trainer's state. evaluate(model, stop) -> acc1, acc5, loss, skipped;
    once a stop signal came it may leave images out, as its numbers are then not used. start: what a guarantee of
    privacy must say of the weights the run began with.
    """
    peers, started = trainer.processes, time.monotonic()
    last, best_file, log = run.folder / "last.pt", run.folder / "best.pt", run.log if peers.is_main else None
    best, score, before, stats = {"acc1": -1.0, "epoch": -1}, {}, 0.0, None
    earlier = []  # updates of this run before it was resumed, as defenses.accounting keeps them
    if run.resumed:
        content = read_checkpoint(last)
        if any(content[key] != about[key] for key in ("arguments", "classes")):
            raise UserError(f"'{last}' is of another model or data set: choose another --output, or pass --overwrite")
        trainer.load_state_dict(content)
        best, score, before, trainer.last_checkpoint = content["best"], content["score"], content["seconds"], str(last)
        earlier, start = (content.get("privacy", {}).get(key) for key in ("history", "start"))
        stats = content.get("unvalidated")  # of an epoch that was stopped before its validation was through
        if trainer.epoch >= trainer.epochs and not stats and (run.folder / "results.json").exists():
            run.finished()
    run.start()
    if run.resumed:
        run.rewind(trainer.epoch - (stats is not None))
        run.log(f"resuming at epoch {trainer.epoch}, step {trainer.step}{run.changes}")

    if trainer.precision.matmul != "highest":
        error = trainer.precision.error()
        run.log(f"float32 matrix products at precision {trainer.precision.matmul}: relative error {error:.0e} here")
    account = Account(trainer.defense, trainer.sample_rate(len(batches.dataset)), trainer.updates, earlier, start)
    if planned := account.guarantee(trainer.epochs * trainer.steps // trainer.accumulation):
        run.log(f"after the last epoch {describe_guarantee(planned)}")
    run.log(EPOCH_HEAD)

    def described() -> dict:
        return {**about, "best": best, "privacy": account.state(trainer.updates)}

    def seconds() -> float:
        return before + time.monotonic() - started

    def check_weights() -> None:
        if peers.any(not trainer.is_finite()):
            raise UserError(
                f"weights became NaN or infinite before epoch {trainer.epoch}, step {trainer.step}; last good "
                f"checkpoint: {trainer.last_checkpoint}; lower --optim.lr or use --optim.amp none"
            )

    def save() -> None:
        check_weights()
        content = {**described(), **trainer.state_dict(), "score": score, "seconds": seconds(), "unvalidated": stats}
        if peers.is_main:
            save_checkpoint(last, content)
            run.keep()
        peers.wait()  # who is told to stop goes when the file is written: launchers do not wait for the others long
        trainer.last_checkpoint, trainer.saved_at = str(last), time.monotonic()

    with trainer.stop:
        while trainer.epoch < trainer.epochs or stats:
            if stats is None:
                epoch = trainer.epoch
                batches.batch_sampler.set_epoch(epoch, trainer.step)
                shown = track(batches, trainer.steps, f"epoch {epoch}", log, done=trainer.step)
                stats = trainer.train_epoch(shown, save)
                name_unreadable(batches.dataset, trainer.unreadable, peers, log)
                peers.broadcast([*trainer.model.buffers(), *(trainer.ema.module.buffers() if trainer.ema else [])])
                check_weights()
            epoch, new = trainer.epoch - 1, evaluate(trainer.model, trainer.stop)
            if trainer.ema:
                new |= {f"ema_{key}": value for key, value in evaluate(trainer.ema.module, trainer.stop).items()}
            if peers.any(bool(trainer.stop.received)):
                save()
                raise trainer.stopped(", before its validation")
            score = new
            if score["acc1"] > best["acc1"]:
                best = {"acc1": score["acc1"], "epoch": epoch}
                if peers.is_main:
                    save_checkpoint(best_file, {**described(), **trainer.weights()})
            log_epoch(run, trainer.epoch, trainer.epochs, stats, score, best, seconds())
            if images_every and epoch % images_every == 0:
                for tag, picture in pictures().items():
                    run.image(epoch, tag, picture)
            stats = None
            if trainer.epoch % checkpoint_every == 0 or trainer.epoch == trainer.epochs:
                save()
    if guarantee := account.guarantee(trainer.updates):
        run.log(describe_guarantee(guarantee))
    return {**score, "best": best, "epochs": trainer.epoch, "seconds": seconds(), **guarantee}
