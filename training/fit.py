"""A whole training run: epochs, validation, the files that keep it, and what it tells of its privacy."""

import time
from pathlib import Path

from torch import nn
from torch.utils.data import DataLoader

from data.decode import in_words
from data.loaders import name_unreadable
from data.sources import Source
from defenses.training import Account, describe_guarantee
from eval.accuracy import accuracy
from models.checkpoints import read_checkpoint, save_checkpoint
from models.jigsaw import Jigsaw
from training.pictures import training_pictures
from training.trainer import Trainer
from utils.errors import UserError
from utils.progress import EPOCH_HEAD, log_epoch, track
from utils.runs import Run
from utils.stopping import Interruptible


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


class Progress:
    """What a run has reached beside its trainer's state, and the files that keep both: last.pt, from which a run is
    continued exactly, and best.pt, the weights of its best epoch."""

    def __init__(self, trainer: Trainer, run: Run, about: dict, examples: int, start: str | None):
        """Begin at nothing, or with what last.pt of a resumed run says.

        Args:
            about: what every checkpoint holds besides the trainer's state.
            examples: in the training set.
            start: what a guarantee of privacy must say of the weights the run began with.
        """
        self.trainer, self.run, self.about, self.peers = trainer, run, about, trainer.processes
        self.last, self.best_file = run.folder / "last.pt", run.folder / "best.pt"
        self.started, self.before = time.monotonic(), 0.0
        self.best, self.score = {"acc1": -1.0, "epoch": -1}, {}
        self.unvalidated: dict | None = None  # means of an epoch that was stopped before its validation was through
        earlier = []  # updates of this run before it was resumed, as defenses.accounting keeps them
        if run.resumed:
            earlier, start = self._resume()
        self.account = Account(trainer.defense, trainer.sample_rate(examples), trainer.updates, earlier, start)

    def _resume(self) -> tuple:
        """Put trainer and progress where last.pt says, and return what it says of privacy: history and start."""
        content = read_checkpoint(self.last)
        if any(content[key] != self.about[key] for key in ("arguments", "classes")):
            raise UserError(
                f"'{self.last}' is of another model or data set: choose another --output, or pass --overwrite"
            )
        self.trainer.load_state_dict(content)
        self.best, self.score, self.before = content["best"], content["score"], content["seconds"]
        self.unvalidated, self.trainer.last_checkpoint = content.get("unvalidated"), str(self.last)
        if not self.open and (self.run.folder / "results.json").exists():
            self.run.finished()
        return tuple(content.get("privacy", {}).get(key) for key in ("history", "start"))

    @property
    def open(self) -> bool:
        """Return whether an epoch, or its validation, is left to do."""
        return self.trainer.epoch < self.trainer.options.epochs or bool(self.unvalidated)

    @property
    def seconds(self) -> float:
        """Return the seconds the run has taken, those before it was resumed included."""
        return self.before + time.monotonic() - self.started

    def announce(self) -> None:
        """Write what the run starts from, and what it will have spent of its privacy, to the log."""
        trainer, run = self.trainer, self.run
        if run.resumed:
            run.rewind(trainer.epoch - (self.unvalidated is not None))
            run.log(f"resuming at epoch {trainer.epoch}, step {trainer.step}{run.changes}")
        if trainer.precision.matmul != "highest":
            error = trainer.precision.error()
            run.log(f"float32 matrix products at precision {trainer.precision.matmul}: relative error {error:.0e} here")
        updates = trainer.options.epochs * trainer.steps // trainer.options.accumulation
        if planned := self.account.guarantee(updates):
            run.log(f"after the last epoch {describe_guarantee(planned)}")
        run.log(EPOCH_HEAD)

    def check_weights(self) -> None:
        """Raise UserError, on every process, where a weight is not a number."""
        trainer = self.trainer
        if self.peers.any(not trainer.is_finite()):
            raise UserError(
                f"weights became NaN or infinite before epoch {trainer.epoch}, step {trainer.step}; last good "
                f"checkpoint: {trainer.last_checkpoint}; lower --optim.lr or use --optim.amp none"
            )

    def _described(self) -> dict:
        return {**self.about, "best": self.best, "privacy": self.account.state(self.trainer.updates)}

    def save(self) -> None:
        """Write last.pt, once every weight is a number."""
        self.check_weights()
        reached = {"score": self.score, "seconds": self.seconds, "unvalidated": self.unvalidated}
        content = {**self._described(), **self.trainer.state_dict(), **reached}
        if self.peers.is_main:
            save_checkpoint(self.last, content)
            self.run.keep()
        self.peers.wait()  # who is told to stop goes when the file is written: launchers do not wait for others long
        self.trainer.last_checkpoint, self.trainer.saved_at = str(self.last), time.monotonic()

    def note(self, score: dict) -> None:
        """Take the score of the epoch that is through, write best.pt where it is the best, and log the epoch."""
        trainer, self.score = self.trainer, score
        if score["acc1"] > self.best["acc1"]:
            self.best = {"acc1": score["acc1"], "epoch": trainer.epoch - 1}
            if self.peers.is_main:
                save_checkpoint(self.best_file, {**self._described(), **trainer.weights()})
        epochs = trainer.options.epochs
        log_epoch(self.run, trainer.epoch, epochs, self.unvalidated, score, self.best, self.seconds)
        self.unvalidated = None

    def results(self) -> dict:
        """Return the final numbers, and log what the run has spent of its privacy."""
        if guarantee := self.account.guarantee(self.trainer.updates):
            self.run.log(describe_guarantee(guarantee))
        return {
            **self.score,
            "best": self.best,
            "epochs": self.trainer.epoch,
            "seconds": self.seconds,
            **guarantee,
        }


def train_epoch(trainer: Trainer, batches: DataLoader, progress: Progress) -> dict:
    """Run the rest of the current epoch and return its means; all processes then hold the same buffers."""
    log = progress.run.log if progress.peers.is_main else None
    batches.batch_sampler.set_epoch(trainer.epoch, trainer.step)
    shown = track(batches, trainer.steps, f"epoch {trainer.epoch}", log, done=trainer.step)
    stats = trainer.train_epoch(shown, progress.save)
    name_unreadable(batches.dataset, trainer.unreadable, progress.peers, log)
    averaged = trainer.ema.module.buffers() if trainer.ema else ()
    progress.peers.broadcast([*trainer.model.buffers(), *averaged])
    progress.check_weights()
    return stats


def validate(trainer: Trainer, batches: DataLoader, progress: Progress) -> dict:
    """Return acc1, acc5, loss and skipped of the clean validation set, and with EMA the same of the averaged weights.

    Once a stop signal came images may be left out: then the state is saved, and Stopped raised.
    """
    peers, log = progress.peers, progress.run.log if progress.peers.is_main else None
    clean = [Jigsaw(trainer.model.grid, 0)]

    def score(network: nn.Module) -> dict:
        return accuracy(network, Interruptible(batches, trainer.stop), peers, clean, log)[0]

    found = score(trainer.model)
    if trainer.ema:
        found |= {f"ema_{key}": value for key, value in score(trainer.ema.module).items()}
    if peers.any(bool(trainer.stop.received)):
        progress.save()
        raise trainer.stopped(", before its validation")
    return found


def fit(trainer: Trainer, source: Source, classes: list[str], run: Run, *, start: str | None = None) -> dict:
    """Train to the last epoch, from the start or from the run's last.pt, and return the final numbers.

    start: what a guarantee of privacy must say of the weights the run began with.
    """
    about = {"arguments": trainer.model.arguments, "classes": classes, **source.about}
    progress = Progress(trainer, run, about, len(source.train.dataset), start)
    run.start()
    progress.announce()
    log, pictured = trainer.log, not hasattr(trainer.model, "vocab_size")
    with trainer.stop:
        while progress.open:
            if progress.unvalidated is None:
                progress.unvalidated = train_epoch(trainer, source.train, progress)
            progress.note(validate(trainer, source.val, progress))
            epoch = trainer.epoch - 1
            if pictured and log.images_every and epoch % log.images_every == 0:
                shown = training_pictures(trainer.model, source.val, trainer.policy.jigsaw, **source.normalize)
                for tag, picture in shown.items():
                    run.image(epoch, tag, picture)
            if trainer.epoch % log.checkpoint_every == 0 or not progress.open:
                progress.save()
    return progress.results()
