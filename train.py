"""One training run: python train.py --config configs/train/deit_small_mjp.yaml --data.path DIR --output DIR

Images, or sentences with --data.kind text (configs/train/text_demo.yaml).
Many processes: torchrun --nproc_per_node=8 train.py ... (or ./train.sh). Continue a stopped run with --resume auto.
"""

from dataclasses import asdict

from options import TrainConfig
from utils.commandline import read_options
from utils.errors import run_command


def main(argv: list[str] | None = None) -> None:
    config, resolved = read_options(TrainConfig, argv)  # torch loads below: --help need not wait
    from data.sources import open_images, open_texts
    from data.transforms import training_scale
    from defenses import build_defense
    from defenses.base import Recipe
    from defenses.training import describe_start
    from eval.accuracy import accuracy
    from models import build_model
    from models.checkpoints import start_from
    from models.jigsaw import Jigsaw
    from training.pictures import training_pictures
    from training.recipe import MaskPolicy, TokenPolicy
    from training.trainer import Trainer, fit, label_order
    from utils.distributed import number_of_processes, processes
    from utils.runs import open_run
    from utils.stopping import Interruptible

    kind, augment = config.data.kind, asdict(config.augment)
    normalize = training_scale(config.data.mean, config.data.std, config.data.dataset, config.data.grey)
    order = {"seed": config.seed, "accumulation": config.optim.accumulation}
    folder = {"overwrite": config.overwrite, "resume": config.resume == "auto", "inputs": config.inputs()}
    defense = build_defense(config.defense, config.defense_options, kind)
    defense.check_training(Recipe(processes=number_of_processes(), **config.recipe()))
    with processes(config.device) as peers, open_run(config.output, resolved, peers, **folder) as run:
        log = run.log if peers.is_main else None
        if kind == "text":
            encoding = config.data.text.encoding()
            source = open_texts(peers, data=config.data.options(), encoding=encoding, order=order, log=log)
            source.model["window"] = config.jigsaw.window
        else:
            order, data = order | {"repeats": augment.pop("repeats")}, config.data.options()
            data["image_size"] = config.data.image_size or 224
            source = open_images(peers, data=data, augment=augment, order=order, normalize=normalize)
        classes = label_order(source.train, source.val, run)
        model = build_model(seed=config.seed, num_classes=len(classes), **source.model, **config.model.options())
        model.loss = source.about.setdefault("loss", "cross_entropy")
        saved = start_from(model, config.init, run) if config.init else None
        drawn = TokenPolicy if kind == "text" else MaskPolicy
        policy, clean = drawn(model.grid, config.seed, **config.jigsaw.policy(kind)), Jigsaw(model.grid, 0)
        trainer = Trainer(
            model.to(peers.device),
            peers,
            policy,
            steps=source.train.batch_sampler.steps,
            **{"batch_size": config.data.batch_size, "num_classes": len(classes), "seed": config.seed},
            **config.log.between_steps(),
            defense=defense,
            **{"normalize": normalize, "loss": model.loss},
            **asdict(config.optim),
        )
        results = fit(
            trainer,
            source.train,
            run,
            about={"arguments": model.arguments, "classes": classes, **source.about},
            evaluate=lambda network, stop: accuracy(network, Interruptible(source.val, stop), peers, [clean], log)[0],
            pictures=lambda: training_pictures(model, source.val, policy.jigsaw, **normalize),
            checkpoint_every=config.log.checkpoint_every,
            images_every=config.log.images_every if kind == "image" else 0,
            start=saved and describe_start(config.init, saved, classes),
        )
        run.results(results)


if __name__ == "__main__":
    run_command(main)
