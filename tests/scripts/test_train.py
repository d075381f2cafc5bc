"""train.py as a user meets it: the run folder, exact resume, several processes, and runs that go wrong."""

import json
import os
import shutil
import signal
import sysconfig
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.models.vision_transformer import VisionTransformer

from models.checkpoints import save_checkpoint


def weights(folder) -> dict:
    return torch.load(folder / "last.pt", weights_only=True)["model"]


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def assert_close(one: dict, other: dict) -> None:
    for key in one:
        torch.testing.assert_close(
            one[key], other[key], rtol=1e-4, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_run_folder_keeps_its_contract(trained):
    names = {path.name for path in trained.iterdir()}
    assert names == {
        "run.json",
        "config.yaml",
        "environment.json",
        "log.txt",
        "metrics.jsonl",
        "tb",
        "results.json",
        "last.pt",
        "best.pt",
    }
    results = json.loads((trained / "results.json").read_text())
    assert results["epochs"] == 3 and results["images"] == 17 and results["best"]["acc1"] >= results["acc1"]
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    content = torch.load(trained / "last.pt", weights_only=True)
    assert content["format"] == "mjp" and content["classes"] == [f"class_{label}" for label in range(4)]
    steps = [int(state["step"]) for state in content["optimizer"]["state"].values()]
    assert max(steps) == 3 * 4  # three epochs of all 24 images in batches of 6


def test_the_first_of_equally_good_epochs_is_the_best(call, tiny, tmp_path):
    still = ["--optim.lr", 0, "--optim.warmup_lr", 0, "--optim.min_lr", 0, "--optim.epochs", 2]
    outcome = call("train.py", *tiny, *still, "--output", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    accuracies = [row["val/acc1"] for row in rows]
    assert len(set(accuracies)) == 1 and len(accuracies) == 2
    assert json.loads((tmp_path / "run" / "results.json").read_text())["best"]["epoch"] == 0


def test_tensorboard_holds_scalars_and_pictures(trained):
    events = EventAccumulator(str(trained / "tb"))
    events.Reload()
    assert {"train/loss", "train/localization", "val/acc1"} <= set(events.Tags()["scalars"])
    assert [point.step for point in events.Scalars("val/acc1")] == [0, 1, 2]
    assert set(events.Tags()["images"]) == {"shuffled_inputs", "pos_embed_similarity"}
    for tag in events.Tags()["images"]:  # every 20 epochs, from the first on
        assert [picture.step for picture in events.Images(tag)] == [0]


def test_saved_config_repeats_the_run_bit_for_bit(trained, call, tmp_path):
    assert call("train.py", "--config", trained / "config.yaml", "--output", tmp_path / "again").status == 0
    assert_same(weights(trained), weights(tmp_path / "again"))


def test_number_of_workers_changes_nothing(trained, call, tiny, tmp_path):
    assert call("train.py", *tiny, "--data.workers", 2, "--output", tmp_path / "run").status == 0
    assert_same(weights(trained), weights(tmp_path / "run"))


@pytest.mark.parametrize(
    "options",
    [
        ["--optim.epochs", 40, "--optim.accumulation", 2],
        ["--optim.epochs", 60, "--data.batch_size", 24],  # one step an epoch: stops after its last
    ],
)
def test_interrupted_and_resumed_equals_straight(start, tiny, tmp_path, options):
    """By SIGTERM; tests/faults does the same with SIGKILL."""
    long = [*tiny, "--optim.mixup", "0.8", "--model.drop_path", "0.1", "--optim.ema", "0.9", *options]
    straight = start(1, "train.py", *long, "--output", tmp_path / "straight")
    broken = start(1, "train.py", *long, "--output", tmp_path / "broken", "--resume", "auto")
    while not (tmp_path / "broken" / "last.pt").exists():
        assert broken.poll() is None, broken.finish().err
        time.sleep(0.01)
    broken.send_signal(signal.SIGTERM)
    stopped = broken.finish()
    assert stopped.status == 143, stopped.err
    assert "state saved at epoch" in stopped.err and "--resume auto" in stopped.err
    resumed = start(1, "train.py", *long, "--output", tmp_path / "broken", "--resume", "auto").finish()
    assert resumed.status == 0 and "resuming at epoch" in resumed.out, resumed.err
    assert straight.finish().status == 0
    assert_same(weights(tmp_path / "straight"), weights(tmp_path / "broken"))
    straight_rows, resumed_rows = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("straight", "broken")
    )
    for one, other in zip(straight_rows, resumed_rows, strict=True):
        assert one.keys() == other.keys()
        assert {key for key in one if one[key] != other[key]} <= {"train/images_per_second"}


def test_stop_signal_to_the_whole_process_group_saves_before_workers_go(start, tiny, tmp_path):
    """Launchers and schedulers signal every process of a job, loader workers included."""
    options = [*tiny, "--optim.epochs", 400, "--data.workers", 2, "--output", tmp_path / "run"]
    running = start(1, "train.py", *options)
    while not (tmp_path / "run" / "last.pt").exists():
        assert running.poll() is None, running.finish().err
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGTERM)
    outcome = running.finish()
    assert outcome.status == 143 and "state saved at epoch" in outcome.err, outcome.err


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find the second process")
def test_stop_signal_to_one_of_two_processes_stops_both_in_order(start, tiny, tmp_path):
    options = [*tiny, "--optim.epochs", 200, "--data.batch_size", 3, "--output", tmp_path / "run"]
    running = start(2, "train.py", *options)
    while not (tmp_path / "run" / "last.pt").exists():
        assert running.poll() is None, running.finish().err
        time.sleep(0.01)
    workers = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGTERM)
    outcome = running.finish()
    assert outcome.status != 0 and outcome.err.count("state saved at epoch") == 2, outcome.err
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert 0 < saved["epoch"] < 200


def test_another_global_batch_may_begin_an_epoch_but_not_end_one(trained, call, tiny, tmp_path):
    """As after a lost node, whose processes are not replaced."""
    content = torch.load(trained / "last.pt", weights_only=True)
    for name, epoch, step in (("boundary", 2, 0), ("inside", 1, 2)):
        (tmp_path / name).mkdir()
        save_checkpoint(tmp_path / name / "last.pt", content | {"epoch": epoch, "step": step})
    smaller = [*tiny, "--data.batch_size", 3, "--resume", "auto", "--output"]
    outcome = call("train.py", *smaller, tmp_path / "boundary")
    assert outcome.status == 0 and "resuming at epoch 2, step 0" in outcome.out, outcome.err
    outcome = call("train.py", *smaller, tmp_path / "inside")
    line = outcome.err.strip().splitlines()[-1]
    assert outcome.status == 2 and "stopped inside an epoch of 4 steps, and now an epoch has 8" in line
    assert "same global batch" in line
    assert call("train.py", *tiny, "--resume", "auto", "--output", tmp_path / "inside").status == 0


def test_accumulated_gradients_equal_a_larger_batch(trained, call, tiny, tmp_path):
    options = ("--data.batch_size", 3, "--optim.accumulation", 2, "--output", tmp_path / "run")
    assert call("train.py", *tiny, *options).status == 0
    content = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    # A batch has one mask however many parts it comes in, so only the steps before the jigsaw starts can agree.
    assert content["epoch"] == 3
    before = ("--jigsaw.mask_ratio", 0)
    assert call("train.py", *tiny, *before, "--output", tmp_path / "whole").status == 0
    assert call("train.py", *tiny, *before, *options[:-1], tmp_path / "parts").status == 0
    assert_close(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_gradient_checkpointing_changes_nothing(trained, call, tiny, tmp_path):
    assert call("train.py", *tiny, "--optim.grad_checkpointing", "true", "--output", tmp_path / "run").status == 0
    assert_close(weights(trained), weights(tmp_path / "run"))


@pytest.mark.skipif(
    not (shutil.which("g++") and Path(sysconfig.get_path("include"), "Python.h").exists()),
    reason="torch.compile needs a C++ compiler and Python's headers",
)
def test_compiled_step_trains_the_same_model(trained, call, tiny, tmp_path):
    assert call("train.py", *tiny, "--optim.compile", "--output", tmp_path / "run").status == 0
    assert_close(weights(trained), weights(tmp_path / "run"))


@pytest.mark.parametrize(
    "options",
    [
        ["--optim.amp", "bf16"],
        ["--jigsaw.shuffle", "pps"],
        ["--model.unknown", "false", "--model.localization", "none"],
        ["--model.index_embed", "true", "--jigsaw.per_sample", "true"],
        ["--model.localization", "pca", "--optim.decay_pos_embed", "true", "--model.pos_embed_std", "1.0"],
        ["--optim.mixup", "0.8", "--optim.cutmix", "1.0", "--augment.repeats", "3"],
        ["--optim.schedule", "linear", "--optim.clip", "0", "--optim.fused", "false"],
        ["--optim.schedule", "step", "--jigsaw.mask_ratio", "1.0", "--jigsaw.mask_sampler", "uniform"],
        ["--data.crop", "false", "--augment.crop", "resized", "--augment.rand_augment", "null"],
        ["--optim.optimizer", "sgd", "--optim.momentum", "0.8", "--data.interpolation", "random"],
        ["--optim.mixup", "0.8", "--optim.cutmix", "1", "--optim.mixup_mode", "elem", "--optim.mixup_switch", "0.9"],
        ["--optim.cutmix_minmax", "[0.2,0.5]", "--augment.erasing_mode", "const", "--augment.erasing_count", "3"],
    ],
)
def test_options_train_to_a_finite_loss(call, tiny, tmp_path, options):
    outcome = call("train.py", *tiny, *options, "--optim.epochs", 2, "--output", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    assert torch.tensor(json.loads((tmp_path / "run" / "results.json").read_text())["loss"]).isfinite()


def test_pps_shuffles_whatever_the_mask_ratio(call, tiny, tmp_path):
    pps = ["--jigsaw.shuffle", "pps", "--jigsaw.probability", 1]
    for ratio in (0, 0.5):
        assert (
            call("train.py", *tiny, *pps, "--jigsaw.mask_ratio", ratio, "--output", tmp_path / str(ratio)).status == 0
        )
    assert call("train.py", *tiny, "--jigsaw.mask_ratio", 0, "--output", tmp_path / "plain").status == 0
    assert_same(weights(tmp_path / "0"), weights(tmp_path / "0.5"))
    assert not torch.equal(weights(tmp_path / "0")["head.weight"], weights(tmp_path / "plain")["head.weight"])


def test_options_changed_on_resume_take_effect(call, tiny, tmp_path):
    assert call("train.py", *tiny, "--optim.epochs", 2, "--output", tmp_path / "run").status == 0
    changed = ["--optim.epochs", 3, "--optim.weight_decay", 0.3, "--optim.ema", 0.5, "--resume", "auto"]
    outcome = call("train.py", *tiny, *changed, "--output", tmp_path / "run")
    assert outcome.status == 0 and "optim.weight_decay 0.05 -> 0.3" in outcome.out, outcome.err
    content = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert {group["weight_decay"] for group in content["optimizer"]["param_groups"]} == {0.0, 0.3}
    assert content["model_ema"] is not None


def test_hiding_every_patch_in_every_step_keeps_the_localization_finite(call, tiny, tmp_path):
    everything = ["--jigsaw.mask_ratio", 1, "--jigsaw.mask_sampler", "uniform", "--jigsaw.probability", 1]
    outcome = call("train.py", *tiny, *everything, "--jigsaw.start_epoch", 0, "--output", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["train/masked"] == 1 and row["train/localization"] == 0 for row in rows)


def test_ema_weights_are_averaged_and_can_be_loaded(call, tiny, tmp_path, images):
    assert call("train.py", *tiny, "--optim.ema", "0.9", "--output", tmp_path / "run").status == 0
    content = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert any(not torch.equal(content["model"][key], content["model_ema"][key]) for key in content["model"])
    options = ["--checkpoint", tmp_path / "run" / "last.pt", "--data.path", images, "--data.workers", 0]
    assert call("eval.py", *options, "--ema", "--output", tmp_path / "eval").status == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert json.loads((tmp_path / "eval" / "results.json").read_text())["accuracy"][0]["acc1"] == results["ema_acc1"]
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert best["model_ema"].keys() == best["model"].keys()


def test_init_starts_from_a_checkpoint(trained, call, tiny, tmp_path):
    still = ["--optim.lr", 0, "--optim.warmup_lr", 0, "--optim.min_lr", 0, "--optim.epochs", 2]
    assert call("train.py", *tiny, *still, "--init", trained / "last.pt", "--output", tmp_path / "run").status == 0
    assert_same(weights(trained), weights(tmp_path / "run"))


def test_fine_tuning_keeps_what_the_file_lacks_new_and_says_so(call, tiny, tmp_path):
    plain = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=7)
    torch.save(plain.state_dict(), tmp_path / "timm.pth")
    still = ["--optim.lr", 0, "--optim.warmup_lr", 0, "--optim.min_lr", 0, "--optim.epochs", 2]
    outcome = call("train.py", *tiny, *still, "--init", tmp_path / "timm.pth", "--output", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    assert "newly initialised: unknown_pos_embed, head.weight, head.bias, localization" in outcome.out
    trained = weights(tmp_path / "run")
    kept = {key: value for key, value in plain.state_dict().items() if not key.startswith("head.")}
    assert_same({key: trained[key] for key in kept}, kept)


def test_exploding_loss_stops_and_names_where(call, tiny, tmp_path):
    outcome = call("train.py", *tiny, "--optim.lr", "1e30", "--optim.clip", 0, "--output", tmp_path / "run")
    assert outcome.status == 2
    line = outcome.err.strip().splitlines()[-1]
    assert "NaN or infinite at epoch" in line and "step" in line and "last good checkpoint" in line


def test_finished_and_unfinished_folders_are_safe(trained, call, tiny):
    before = (trained / "last.pt").read_bytes()
    outcome = call("train.py", *tiny, "--output", trained)
    assert outcome.status == 2 and "holds a finished run" in outcome.err and "--overwrite" in outcome.err
    assert (trained / "last.pt").read_bytes() == before
    assert call("train.py", *tiny, "--output", trained, "--resume", "auto").status == 0
    assert_same(torch.load(trained / "last.pt", weights_only=True)["model"], weights(trained))


@pytest.mark.parametrize(
    "variables, launched",
    [
        ({}, "--standalone --nproc_per_node=1 --max-restarts=3"),
        ({"GPUS": "4", "RESTARTS": "0"}, "--standalone --nproc_per_node=4 --max-restarts=0"),
        (
            {"GPUS": "8", "NNODES": "1:2", "MASTER": "host0"},
            "--nnodes=1:2 --rdzv_backend=c10d --rdzv_endpoint=host0:29500 --rdzv_id=run --nproc_per_node=8 "
            "--max-restarts=3",
        ),
    ],
)
def test_train_sh_launches_torchrun(shell, variables, launched):
    """Its command line, by a python that only says it; test_world_sizes.py runs it."""
    outcome = shell("train.sh", "--optim.epochs", 1, DATA="images", OUT="runs/run", PYTHON="echo", **variables)
    run = "train.py --config configs/train/deit_small_mjp.yaml --data.path images --output runs/run --resume auto"
    assert outcome.out.strip() == f"-m utils.launch {launched} {run} --optim.epochs 1"
