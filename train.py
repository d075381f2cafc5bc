"""One training run: python train.py --config configs/train/deit_small_mjp.yaml --data.path DIR --output DIR

Many processes: torchrun --nproc_per_node=8 train.py ... (or ./train.sh). Continue a stopped run with --resume auto.
"""

from dataclasses import asdict

from config import TrainConfig
from data.loaders import open_eval, open_train
from data.transforms import IMAGENET_MEAN, IMAGENET_STD
from defenses import build_defense
from engine import Interruptible, Trainer, fit
from eval.accuracy import accuracy
from eval.pictures import training_pictures
from models import build_model
from models.checkpoints import FINE_TUNED, load_weights, read_checkpoint, weights_of
from models.jigsaw import Jigsaw
from recipe import MaskPolicy
from utils.commandline import load
from utils.distributed import processes
from utils.errors import run_command
from utils.runs import open_run


def main(argv: list[str] | None = None) -> None:
    config, resolved = load(TrainConfig, argv)
    data, augment = asdict(config.data), asdict(config.augment)
    data["image_size"] = config.data.image_size or 224
    normalize = {"mean": config.data.mean or IMAGENET_MEAN, "std": config.data.std or IMAGENET_STD}
    order = {"seed": config.seed, "repeats": augment.pop("repeats"), "accumulation": config.optim.accumulation}
    inputs = (config.data.path if not config.data.download else None, config.data.classes, config.init)
    folder = {"overwrite": config.overwrite, "resume": config.resume == "auto", "inputs": inputs}
    defense = build_defense(config.defense, config.defense_options)
    with processes(config.device) as peers, open_run(config.output, resolved, peers, **folder) as run:
        val_batches = open_eval(peers, **data | normalize)
        train_batches = open_train(peers, augment=augment, **order, **data | normalize)
        classes = list(train_batches.dataset.base.classes)
        size = {"num_classes": len(classes), "image_size": data["image_size"]}
        model = build_model(seed=config.seed, **size, **asdict(config.model))
        if config.init:
            new = load_weights(model, weights_of(read_checkpoint(config.init), config.init), config.init, FINE_TUNED)
            run.log(f"starting from {config.init}" + f"; newly initialised: {', '.join(new)}" * bool(new))
        log = run.log if peers.is_main else None
        policy = MaskPolicy(model.grid, config.seed, **asdict(config.jigsaw))
        trainer = Trainer(
            model.to(peers.device),
            peers,
            policy,
            steps=train_batches.batch_sampler.steps,
            batch_size=config.data.batch_size,
            num_classes=len(classes),
            seed=config.seed,
            check_every=config.log.every,
            defense=defense,
            normalize=normalize,
            **asdict(config.optim),
        )
        results = fit(
            trainer,
            train_batches,
            run,
            about={"arguments": model.arguments, "classes": classes, "normalize": normalize},
            evaluate=lambda network, stop: accuracy(
                network, Interruptible(val_batches, stop), peers, [Jigsaw(network.grid, 0)], log
            )[0],
            pictures=lambda: training_pictures(model, val_batches, policy.jigsaw, **normalize),
            checkpoint_every=config.log.checkpoint_every,
            images_every=config.log.images_every,
        )
        run.results(results)


if __name__ == "__main__":
    run_command(main)
