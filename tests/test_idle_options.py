"""Options that would change nothing are refused: who gives one believes that it did."""

import pytest

from options import AttackConfig, EvalConfig, TrainConfig
from utils.commandline import load
from utils.errors import UserError

GIVEN = ["--model=deit_tiny", "--images=pictures", "--output=run"]


@pytest.mark.parametrize(
    "options, words",
    [
        (["--local_lr=0.5"], "--local_lr must be used with --local_steps above 1"),
        (["--local_batch_size=2"], "--local_batch_size must be used with --local_steps above 1"),
        (["--pretrain_lr=0.1"], "--pretrain_lr must be used with --pretrain_steps"),
        (["--success_tokens=0.5"], "--success_tokens must be used with --data.kind text"),
        (["--data.path=sentences"], "--data.path must be used with --data.kind text"),
        (["--metric_only", "--defense=noise"], "--defense must be left out with --metric_only"),
        (["--metric_only", "--local_steps=2"], "--local_steps must be left out with --metric_only"),
    ],
)
def test_an_idle_option_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        load(AttackConfig, [*GIVEN, *options])


def test_options_that_are_used_are_not():
    for options in (["--local_steps=2", "--local_lr=0.5"], ["--pretrain_steps=1", "--pretrain_lr=0.1"],
                    ["--metric_only", "--withhold=pos_embed"]):  # fmt: skip
        load(AttackConfig, [*GIVEN, *options])


TEXT = "--data.kind=text --model.name=text_small --optim.mixup=0 --optim.cutmix=0 "
MASKS = "--jigsaw.mask_ratio=0.5 "


@pytest.mark.parametrize(
    "options, words",
    [
        ("--jigsaw.probability=1", "--jigsaw.probability must be used with --jigsaw.mask_ratio above 0, got 1.0"),
        ("--jigsaw.per_sample", "--jigsaw.per_sample must be used with --jigsaw.mask_ratio"),
        (MASKS + "--optim.epochs=20", "--jigsaw.start_epoch must be below --optim.epochs 20 with --jigsaw.mask_ratio"),
        (MASKS + "--jigsaw.window=4", "--jigsaw.window must be used with --data.kind text"),
        ("--jigsaw.shuffle=pps --jigsaw.mask_sampler=uniform", "--jigsaw.mask_sampler must be left out with"),
        (TEXT + MASKS + "--jigsaw.max_block=9", "--jigsaw.max_block must be used with --data.kind image"),
        (TEXT + "--data.mean=0.5", "--data.mean must be used with --data.kind image"),
        (TEXT + "--augment.flip=0", "--augment.flip must be used with --data.kind image, got 0.0"),
        (TEXT + "--log.images_every=5", "--log.images_every must be used with --data.kind image"),
        ("--data.text.max_length=9", "--data.text.max_length must be used with --data.kind text, got 9"),
        ("--data.download", "--data.download must be left out with --data.dataset folder"),
        ("--data.image_size=32 --augment.scale=0.5,1", "--augment.scale must be used with --augment.crop resized"),
        ("--augment.color_jitter=0.1", "--augment.color_jitter must be used with --augment.rand_augment null"),
        ("--augment.erasing=0 --augment.erasing_count=2", "--augment.erasing_count must be used with"),
        ("--model.unit_targets=true", "--model.unit_targets must be used with --model.localization"),
        ("--model.tie=4", "--model.tie must be used with --model.positions tied"),
        ("--model.positions=rotary --model.pos_embed_std=1", "--model.pos_embed_std must be left out with"),
        ("--model.localization=linear --optim.localization_weight=0", "--optim.localization_weight must be above 0"),
        ("--optim.localization_weight=0.1", "--optim.localization_weight must be used with --model.localization"),
        ("--optim.optimizer=sgd --optim.eps=1e-6", "--optim.eps must be used with --optim.optimizer adamw"),
        ("--optim.momentum=0.5", "--optim.momentum must be used with --optim.optimizer sgd"),
        ("--optim.schedule=linear --optim.min_lr=0", "--optim.min_lr must be used with --optim.schedule cosine"),
        ("--optim.decay_rate=0.5", "--optim.decay_rate must be used with --optim.schedule step"),
        ("--optim.warmup_epochs=0 --optim.warmup_lr=1", "--optim.warmup_lr must be used with --optim.warmup_epochs"),
        ("--optim.mixup=0 --optim.mixup_switch=0", "--optim.mixup_switch must be used with --optim.mixup and"),
        ("--optim.cutmix=0.5 --optim.cutmix_minmax=0.2,0.8", "--optim.cutmix must be left out with"),
        ("--optim.recipe=auto --optim.amp=bf16", "--optim.amp must be left out with --optim.recipe auto"),
        ("--defense_options.std=0.1", "unknown option 'defense_options.std': it takes none"),
    ],
)
def test_an_idle_option_of_a_training_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        load(TrainConfig, ["--output=run", *options.split()])


@pytest.mark.parametrize(
    "options",
    [
        "--jigsaw.start_epoch=5 --jigsaw.min_block=2 --jigsaw.max_block=9 --optim.decay_epochs=30",  # as recipes say
        "--optim.localization_weight=0 --augment.color_jitter=0 --model.unit_targets=false",
        "--optim.cutmix=0 --optim.cutmix_minmax=0.2,0.8 --optim.mixup_switch=0.9",
        "--jigsaw.shuffle=pps --jigsaw.mask_ratio=0.5 --jigsaw.probability=1",
        MASKS + "--jigsaw.probability=1 --jigsaw.per_sample --optim.epochs=21",
        TEXT + MASKS + "--jigsaw.window=4 --data.text.max_length=9 --log.images_every=0 --jigsaw.per_sample",
        "--model.positions=sinusoidal --model.unknown=true --model.pos_embed_std=1",
        "--data.dataset=cifar10 --data.download",
    ],
)
def test_options_of_a_training_that_are_used_are_not(options):
    load(TrainConfig, ["--output=run", *options.split()])


def test_evaluation_of_sentences_refuses_options_of_images():
    with pytest.raises(UserError, match="--data.crop must be used with --data.kind image, got False"):
        load(EvalConfig, ["--checkpoint=f", "--output=run", "--data.kind=text", "--data.crop=false"])
