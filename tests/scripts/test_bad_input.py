"""Wrong input ends in one line that says what, where and what to do, with status 2 and no traceback."""

import shutil

import pytest
import torch


def fails(outcome, *words: str) -> str:
    """Check the form of the error and that it has all `words`; return it."""
    assert outcome.status == 2, outcome
    assert "Traceback" not in outcome.err
    line = outcome.err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    for word in words:
        assert word in line, line
    return line


@pytest.fixture
def copy(images, tmp_path):
    """A copy of the images that a test may damage."""
    return shutil.copytree(images, tmp_path / "images")


@pytest.fixture
def train(call, tiny, tmp_path):
    """Run train.py with the small settings and more options."""
    return lambda *options: call("train.py", *tiny, "--output", tmp_path / "run", *options)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--optim.lrr", "1"], ["optim.lrr", "did you mean 'optim.lr'?"]),
        (["--model.name", "deit_smal"], ["model.name", "did you mean 'deit_small'?"]),
        (["--jigsaw.mask_sampler", "blok"], ["mask_sampler", "did you mean 'block'?"]),
        (["--jigsaw.mask_ratio", "1.2"], ["--jigsaw.mask_ratio must be between 0 and 1, got 1.2"]),
        (["--data.batch_size", "many"], ["--data.batch_size: expected int, got 'many'"]),
        (["--data.batch_size", "0"], ["--data.batch_size must be at least 1"]),
        (["--data.batch_size", "64"], ["24 training images", "lower --data.batch_size"]),
        (["--data.batch_size", "3", "--optim.mixup", "1"], ["even with mixup"]),
        (["--model.patch_size", "7"], ["image_size 32 is not divisible by patch_size 7"]),
        (["--model.num_heads", "5"], ["cannot build model"]),
        (["--data.path", "/no/such/folder"], ["/no/such/folder", "does not exist"]),
        (["--device", "gpu"], ["--device must be auto, cpu, cuda or cuda:i"]),
        (["--augment.rand_augment", "rand-m9-q3"], ["--augment.rand_augment 'rand-m9-q3'"]),
        (["--model.patch_size", "-4"], ["--model.patch_size must be at least 1"]),
        (["--optim.lr", "-1"], ["--optim.lr must be 0 or more, got -1"]),
        (["--optim.betas", "2,1"], ["--optim.betas must be in [0, 1)"]),
        (["--data.std", "0,0,0"], ["--data.std must be above 0"]),
        (["--augment.scale", "2,1"], ["--augment.scale must be two shares"]),
        (["--optim.amp", "fp16"], ["fp16 needs a GPU"]),
        (["--config", "/no/such.yaml"], ["/no/such.yaml", "does not exist"]),
        (["--init", "/no/such.pt"], ["'/no/such.pt' does not exist"]),
    ],
)
def test_wrong_options(train, options, words):
    fails(train(*options), *words)


def test_unknown_key_in_a_config_file(train, tmp_path):
    (tmp_path / "typo.yaml").write_text("jigsaw: {mask_ration: 0.5}\n")
    fails(train("--config", tmp_path / "typo.yaml"), "jigsaw.mask_ration", "did you mean 'jigsaw.mask_ratio'?")


def test_broken_yaml_names_its_file(train, tmp_path):
    (tmp_path / "broken.yaml").write_text("optim: {lr: 1\n")
    fails(train("--config", tmp_path / "broken.yaml"), "broken.yaml", "is not YAML")


def test_class_folders_that_differ(train, copy):
    (copy / "val" / "class_3").rename(copy / "val" / "class_x")
    fails(train("--data.path", copy), "different classes", "'class_3' is in train but not in val")


def test_empty_class(train, copy):
    for path in (copy / "train" / "class_2").iterdir():
        path.unlink()
    fails(train("--data.path", copy), "class_2", "holds no images")


def test_folder_without_classes(train, tmp_path):
    (tmp_path / "empty" / "train").mkdir(parents=True)
    (tmp_path / "empty" / "val").mkdir()
    fails(train("--data.path", tmp_path / "empty"), "has no class folders")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_corrupt_image_is_named(train, copy, workers, damage):
    victim = copy / "train" / "class_1" / "02.jpg"
    content = {"truncated": victim.read_bytes()[:300], "text": b"not an image", "empty": b""}[damage]
    victim.write_bytes(content)
    line = fails(train("--data.path", copy, "--data.workers", workers), str(victim), "--data.on_corrupt skip")
    assert line.startswith("error: cannot read image")


def test_error_in_a_worker_ends_the_process(start, tiny, copy, tmp_path):
    (copy / "train" / "class_1" / "02.jpg").write_bytes(b"not an image")
    options = [*tiny, "--data.path", copy, "--data.workers", 2, "--output", tmp_path / "run"]
    outcome = start(1, "train.py", *options).finish()
    assert outcome.status == 2 and "cannot read image" in outcome.err.strip().splitlines()[-1]


def test_corrupt_images_can_be_skipped_and_are_counted(train, call, copy, tmp_path):
    for name in ("train/class_1/02.jpg", "val/class_0/01.jpg", "val/class_3/00.jpg"):
        (copy / name).write_bytes(b"not an image")
    outcome = train("--data.path", copy, "--data.on_corrupt", "skip")
    assert outcome.status == 0, outcome.err
    assert "skipped unreadable images: 1 in training, 2 in validation" in outcome.out
    options = ["--data.path", copy, "--data.workers", 0, "--data.on_corrupt", "skip", "--output", tmp_path / "eval"]
    outcome = call("eval.py", "--checkpoint", tmp_path / "run" / "last.pt", *options)
    assert outcome.status == 0 and '"images": 15' in (tmp_path / "eval" / "results.json").read_text()


def test_class_list_selects_classes_and_is_checked(train, tmp_path):
    (tmp_path / "classes.txt").write_text("# two of four\nclass_2\nclass_0\n")
    assert train("--data.classes", tmp_path / "classes.txt").status == 0
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["classes"] == ["class_2", "class_0"]
    (tmp_path / "classes.txt").write_text("class_2\nclas_0\n")
    fails(train("--data.classes", tmp_path / "classes.txt", "--overwrite"), "'clas_0'", "did you mean 'class_0'?")


def test_checkpoint_of_another_architecture(train, trained):
    fails(train("--init", trained / "last.pt", "--model.embed_dim", 32), "does not fit", "different shape", "cls_token")
    fails(train("--init", trained / "last.pt", "--model.depth", 2), "missing", "blocks.1.norm1.weight")
    fails(train("--init", trained / "last.pt", "--model.unknown", "false"), "unexpected", "unknown_pos_embed")


@pytest.mark.parametrize("content", [None, b"not a checkpoint", b""])
def test_truncated_checkpoint(call, trained, images, tmp_path, content):
    path = tmp_path / "cut.pt"
    path.write_bytes((trained / "last.pt").read_bytes()[:5000] if content is None else content)
    options = ["--checkpoint", path, "--data.path", images, "--output", tmp_path / "run"]
    fails(call("eval.py", *options), "cut.pt", "truncated or not a checkpoint")


def test_data_of_other_classes(call, trained, copy, tmp_path):
    for split in ("train", "val"):
        (copy / split / "class_3").rename(copy / split / "zebra")
    options = ["--checkpoint", trained / "last.pt", "--data.path", copy, "--output", tmp_path / "run"]
    fails(call("eval.py", *options), "'zebra' is new to it")


@pytest.mark.parametrize(
    "options, words",
    [
        (["--mask_ratios", "0,1.5"], ["mask_ratios must be between 0 and 1, got 1.5"]),
        (["--seeds", "0"], ["--seeds must be at least 1"]),
        (["--ema"], ["holds no averaged weights"]),
        (["--data.image_size", "30"], ["not divisible by patch_size 8"]),
    ],
)
def test_wrong_evaluation_options(call, trained, images, tmp_path, options, words):
    base = ["--checkpoint", trained / "last.pt", "--data.path", images, "--output", tmp_path / "run"]
    fails(call("eval.py", *base, *options), *words)


@pytest.mark.parametrize(
    "options, words",
    [
        ([], ["one of the two"]),
        (["--model", "deit_smal"], ["did you mean 'deit_small'?"]),
        (["--model", "deit_tiny", "--attack", "closed"], ["--attack", "did you mean 'closed_form'?"]),
        (["--model", "deit_tiny", "--mask_ratio", "2"], ["--mask_ratio must be between 0 and 1"]),
        (["--model", "deit_tiny", "--attack_options.steps", "3"], ["unknown option 'attack_options.steps'"]),
        (["--model", "deit_tiny", "--defense", "noise", "--defense_options.sd", "3"], ["did you mean 'std'?"]),
        (["--model", "deit_tiny", "--defense", "noise", "--defense_options.std", "abc"], ["expected float, got 'abc'"]),
        (["--model", "deit_tiny", "--defense", "noise", "--defense_options.std", "[1"], ["is not a value"]),
        (["--model", "deit_tiny", "--model_options.image_size", "64"], ["model_options.image_size must be given"]),
        (["--model", "deit_tiny", "--num_images", "1000"], ["holds only 17 images"]),
        (["--model", "resnet50", "--image_size", "64"], ["needs the gradient of"]),
        (["--model", "swin_tiny", "--model_options.absolute_pos_embed", "true"], ["right after the patch projection"]),
    ],
)
def test_wrong_attack_options(call, images, tmp_path, options, words):
    fails(call("attack.py", "--images", images / "val", "--output", tmp_path / "run", *options), *words)


def test_folder_without_images(call, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("no image")
    options = ["--model", "deit_tiny", "--images", tmp_path / "notes", "--output", tmp_path / "run"]
    fails(call("attack.py", *options), "holds no images")


def test_output_that_is_a_file(train, tmp_path):
    (tmp_path / "run").write_text("mine")
    fails(train(), "is a file")
    assert (tmp_path / "run").read_text() == "mine"


def test_inputs_are_never_overwritten(call, trained, images):
    before = (trained / "last.pt").read_bytes()
    options = ["--checkpoint", trained / "last.pt", "--data.path", images, "--output", trained, "--overwrite"]
    fails(call("eval.py", *options), "which this run reads")
    assert (trained / "last.pt").read_bytes() == before


def test_missing_input_is_noticed_before_anything_is_overwritten(train, tmp_path):
    assert train().status == 0
    fails(train("--overwrite", "--data.path", "/no/such/folder"), "/no/such/folder")
    assert (tmp_path / "run" / "last.pt").exists() and (tmp_path / "run" / "results.json").exists()


def test_resuming_needs_a_training_run_of_the_same_model(call, train, trained, images, tmp_path):
    options = ["--checkpoint", trained / "last.pt", "--data.path", images, "--data.workers", 0]
    assert call("eval.py", *options, "--output", tmp_path / "run").status == 0
    fails(train("--resume", "auto"), "holds a finished run")
    assert train("--overwrite").status == 0
    fails(train("--resume", "auto", "--model.depth", 2), "is of another model or data set")


def test_damaged_weights_are_named(call, trained, images, tmp_path):
    content = torch.load(trained / "last.pt", weights_only=True)
    content["model"]["head.weight"][:] = float("nan")
    torch.save(content, tmp_path / "nan.pt")
    options = ["--checkpoint", tmp_path / "nan.pt", "--data.path", images, "--data.workers", 0]
    fails(call("eval.py", *options, "--output", tmp_path / "run"), "NaN or infinite", "weights are damaged")


def test_overwrite_removes_only_what_a_run_writes(train, tmp_path):
    assert train().status == 0
    (tmp_path / "run" / "notes.txt").write_text("mine")
    fails(train(), "holds a finished run")
    assert train("--overwrite").status == 0
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
