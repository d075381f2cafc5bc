"""One training run: python train.py --config configs/train/deit_small_mjp.yaml --data.path DIR --output DIR

Images, or sentences with --data.kind text (configs/train/text_demo.yaml).
Many processes: torchrun --nproc_per_node=8 train.py ... (or ./train.sh). Continue a stopped run with --resume auto.
"""

from options import TrainConfig
from utils.commandline import read_options
from utils.errors import run_command


def main(argv: list[str] | None = None) -> None:
    config, resolved = read_options(TrainConfig, argv)  # torch loads below: --help need not wait
    from data.sources import open_source
    from defenses import build_defense
    from defenses.base import Recipe
    from defenses.training import describe_start
    from models import build_model
    from models.checkpoints import start_from
    from training.fastest import choose_recipe
    from training.fit import fit, label_order
    from training.masking import build_policy
    from training.trainer import Trainer
    from utils.distributed import number_of_processes, processes
    from utils.runs import open_run

    defense = build_defense(config.defense, config.defense_options, config.data.kind)
    defense.check_training(Recipe(processes=number_of_processes(), **config.recipe()))
    order = {"seed": config.seed, "accumulation": config.optim.accumulation}
    with processes(config.device) as peers, open_run(config.output, resolved, peers, **config.folder()) as run:
        log = run.log if peers.is_main else None
        source = open_source(peers, config.data, config.augment, **order, log=log)
        classes = label_order(source.train, source.val, run)
        model = build_model(seed=config.seed, num_classes=len(classes), **source.model, **config.network())
        model.loss = source.loss
        optim = choose_recipe(model.to(peers.device), config.optim, config.data.batch_size, peers, log)
        start = config.init and describe_start(config.init, start_from(model, config.init, run), classes)
        trainer = Trainer(
            model,
            peers,
            build_policy(model, config.jigsaw, config.seed),
            optim,
            config.log,
            steps=source.train.batch_sampler.steps,
            batch_size=config.data.batch_size,
            num_classes=len(classes),
            seed=config.seed,
            normalize=source.normalize,
            defense=defense,
        )
        run.results(fit(trainer, source, classes, run, start=start))


if __name__ == "__main__":
    run_command(main)
