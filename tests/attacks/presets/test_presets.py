"""The published attacks as options of one loop: the runs of their own code, step by step, and how users reach them."""

from dataclasses import fields
from functools import partial
from inspect import signature

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attacks import ATTACKS
from attacks.matching import MatchingOptions, gradient_matching, loop, problem
from attacks.presets.april_matching import april_matching
from attacks.presets.dlg import dlg, idlg
from attacks.presets.gradinversion import gradinversion
from attacks.presets.gradvit import gradvit
from attacks.presets.inverting_gradients import inverting_gradients, modern
from attacks.threat_model.client import prepare, share
from attacks.threat_model.leak import Leak, LocalSteps, Reconstruction
from defenses import no_defense
from models import build_model
from models.checkpoints import save_checkpoint
from models.jigsaw import Jigsaw
from utils.commandline import options
from utils.errors import UserError

PRESETS = {name: attack for name, attack in ATTACKS.items() if type(getattr(attack, "preset", None)) is MatchingOptions}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Recorded:
    """An attack with its start replaced, and what its loop saw: `totals` and `images` of the first problem."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, images: Tensor, logits: Tensor | None = None):
        monkeypatch.setattr(problem, "first_images", lambda leak, init, restarts, own: images[None])
        if logits is not None:
            monkeypatch.setattr(problem, "first_labels", lambda leak, rule, classes, restarts, own: logits[None])
        self.totals: list[float] = []
        self.images: list[Tensor] = []
        update = loop.Best.update

        def record(best, images, targets, total, distance):
            self.totals.append(float(total[0]))
            self.images.append(images[0].clone())
            update(best, images, targets, total, distance)

        monkeypatch.setattr(loop.Best, "update", record)

    def __call__(self, attack, leak: Leak, **chosen) -> Reconstruction:
        return attack(leak, generator=generator(), **chosen)


class SmallNet(nn.Module):
    """The network of golden attack_trajectory."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(216, 6)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(nn.functional.avg_pool2d(self.conv(images).sigmoid(), 2).flatten(1))


# Our attack, what the recorded run had turned off or set, and the gradients behind one recorded step.
TRAJECTORIES = {
    "invertinggradients": (inverting_gradients, {"tv": 0.2, "tv_form": "padded", "iterations": 90}, 1),
    "modern_without_features": (modern, {"features": 0.0, "warmup": 10, "iterations": 90}, 1),
    "seethroughgradients_no_noise_no_bn": (
        gradinversion,
        {"batch_norm": 0.0, "group": 0.0, "restarts": 1, "langevin": 0.0, "warmup": 10, "iterations": 90},
        1,
    ),
    "tag_like": (
        gradient_matching(MatchingOptions(objective="tag", optimizer="adamw", boxed=False, clip=1.0)),
        {"lr": 0.05, "schedule": "linear", "warmup": 8, "iterations": 90},
        1,
    ),
    "lbfgs_known_labels": (idlg, {"objective": "euclidean", "stop_below": 0.0, "iterations": 240}, 20),
}


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_runs_follow_breaching_step_by_step(golden, monkeypatch, name):
    stored, about = golden("attack_trajectory"), golden("attack_trajectory.json")
    mean, std = about["mean_std"]
    net = SmallNet().double()
    net.load_state_dict({key[4:]: torch.tensor(value) for key, value in stored.items() if key.startswith("net/")})
    gradients = {key[5:]: torch.tensor(value) for key, value in stored.items() if key.startswith("grad/")}
    leak = Leak(net, gradients, (3, 12, 12), 2, torch.tensor(stored["labels"]), tuple(mean), tuple(std))
    run = Recorded(monkeypatch, torch.tensor(stored["init"]))
    attack, chosen, every = TRAJECTORIES[name]
    result = run(attack, leak, **chosen)

    expected, run_of = stored[f"{name}/objective"], about["results"][name]
    horizon, found = run_of["horizon_rel1e_6"], np.array(run.totals[::every])
    np.testing.assert_allclose(found[:horizon], expected[:horizon], rtol=1e-5)
    assert len(found) == len(expected) + 1  # we also judge where the last step has led
    pixels = result.images * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    truth = torch.tensor(stored["images"]).permute(0, 3, 1, 2) / 255
    assert float((pixels - truth).square().mean()) == pytest.approx(run_of["mse_pixels"], rel=0.1)


@pytest.fixture(scope="session")
def victim(golden):
    """DLG's recorded victim: (leak with hidden label, image, first image, first logits, stored numbers, scalars)."""
    stored, about = golden("dlg"), golden("dlg.json")
    net = build_model("lenet", num_classes=100).double().eval()
    weights = {key[3:].replace("fc.0.", "fc."): torch.tensor(stored[key]) for key in stored if key.startswith("sd/")}
    net.load_state_dict(weights)
    image = (torch.tensor(stored["image"]).permute(2, 0, 1)[None] / 255).double()
    labels = torch.tensor(stored["label"])
    private = prepare(net, image, labels, Jigsaw(net.grid, 0.0), 0)
    leak = share(net, private, partial(no_defense, generator=generator()), reveal_labels=False)
    for key in (key for key in stored if key.startswith("grad/body")):
        torch.testing.assert_close(leak.gradients[key[5:]], torch.tensor(stored[key]), rtol=1e-9, atol=1e-12)
    start = torch.tensor(stored["dummy_data_init"]).double(), torch.tensor(stored["dummy_label_init"]).double()
    return leak, image, *start, stored, {key: entry["value"] for key, entry in about["scalars"].items()}


def test_dlg_evaluates_what_its_own_code_evaluates(victim, monkeypatch):
    leak, image, first, logits, stored, scalars = victim
    run = Recorded(monkeypatch, first, logits)
    result = run(dlg, leak, iterations=100)
    horizon = scalars["closure_horizon_rel1e-6"]
    np.testing.assert_allclose(run.totals[:horizon], stored["f64/closures"][:horizon], rtol=1e-5)
    outer = scalars["horizon_rel1e-6"]
    np.testing.assert_allclose(run.totals[: 20 * outer : 20], stored["f64/before"][:outer], rtol=1e-4)
    # Chaotic from here on; after 5 calls of torch's optimizer the two are still equally far.
    assert run.totals[100] == pytest.approx(stored["f64/after"][4], rel=0.5)
    assert float((result.images - image).square().mean()) == pytest.approx(stored["f64/mse"][4], rel=0.05)
    assert result.labels.tolist() == stored["label"].tolist() == [scalars["f64_summary"]["recovered_label"]]
    assert result.diagnostics["objective"] == min(run.totals)


def test_the_first_derivative_of_dlg(victim, monkeypatch):
    leak, _, first, logits, stored, _ = victim
    run = Recorded(monkeypatch, first, logits)
    run(dlg, leak, iterations=1)
    slope = torch.tensor(stored["f64/dobj_ddata0"])
    size = slope.abs().sum() + torch.tensor(stored["f64/dobj_dlabel0"]).abs().sum()  # the first step has L1 norm 1
    torch.testing.assert_close(run.images[1], first - slope / size.clamp_min(1), rtol=1e-8, atol=1e-10)


def test_idlg_reads_the_label_and_searches_the_image(victim, monkeypatch):
    leak, image, first, _, stored, scalars = victim
    run = Recorded(monkeypatch, first)
    result = run(idlg, leak, iterations=100)
    assert result.labels.tolist() == [scalars["idlg"]["label_pred"]] == stored["label"].tolist()
    np.testing.assert_allclose(run.totals[:41:20], stored["idlg/before"][:3], rtol=1e-3)
    assert float((result.images - image).square().mean()) == pytest.approx(stored["idlg/mse"][4], rel=0.05)


def test_presets_are_the_loop_and_take_several_leaks():
    assert PRESETS.keys() == {
        *("dlg", "idlg", "inverting_gradients", "modern", "gradinversion", "gradvit", "april_matching"),
        *("defense_aware", "beyond_inferring", "wei", "dimitrov"),
    }
    assert all(attack.vectorized for attack in PRESETS.values())
    assert [ATTACKS[name] for name in ("dlg", "gradvit", "april_matching")] == [dlg, gradvit, april_matching]


@pytest.mark.parametrize("name", PRESETS)
def test_users_set_options_and_nothing_else(name):
    attack = ATTACKS[name]
    given = {"iterations": "12", "tv": "1e-3", "tv_form": "padded", "compile": "true", "lr": 1}
    chosen = options(given, attack, "attack_options")
    assert chosen == {"iterations": 12, "tv": 1e-3, "tv_form": "padded", "compile": True, "lr": 1}
    for internal in ("watch", "generator", "leaks"):
        with pytest.raises(UserError, match=f"unknown option 'attack_options.{internal}'"):
            options({internal: "1"}, attack, "attack_options")
    with pytest.raises(UserError, match="unknown option 'attack_options.iteratons': did you mean 'iterations'"):
        options({"iteratons": 3}, attack, "attack_options")
    with pytest.raises(UserError, match="--attack_options.iterations: expected int, got 'many'"):
        options({"iterations": "many"}, attack, "attack_options")
    defaults = {key: item.default for key, item in signature(attack).parameters.items()}
    for field in fields(MatchingOptions):
        chosen = getattr(attack.preset, field.name)
        assert defaults[field.name] == chosen and type(chosen) is type(field.default), field.name


SETTINGS = {  # what makes each attack the one of its paper
    "dlg": {"objective": "l2", "optimizer": "lbfgs", "lr": 1.0, "labels": "joint", "boxed": False, "tv": 0.0},
    "idlg": {"objective": "l2", "optimizer": "lbfgs", "lr": 1.0, "labels": "idlg", "boxed": False, "tv": 0.0},
    "inverting_gradients": {"objective": "cosine", "signed": "hard", "schedule": "step", "boxed": True},
    "modern": {"objective": "cosine", "signed": "soft", "init": "patterned-4", "features": 0.1},
    "gradinversion": {"batch_norm": 0.1, "group": 0.01, "labels": "yin", "langevin": 0.01},
    "gradvit": {"second_phase": 0.5, "image_prior": 0.2, "patch_prior": 1e-4, "iterations": 120000},
    "april_matching": {"objective": "l2", "pos_embed_cosine": 1.0, "tv": 0.0},
    "beyond_inferring": {
        "objective": "euclidean",
        "optimizer": "lbfgs",
        "tv": 0.2352,
        "tv_form": "wang",
        "boxed": True,
    },
    "wei": {"objective": "euclidean", "optimizer": "lbfgs", "init": "patterned-16", "task": 1.0, "boxed": True},
    "dimitrov": {"objective": "cosine", "epoch_order": 1e-6, "tv": 1e-4, "lr": 1.0, "iterations": 8000},
    "defense_aware": {"objective": "likelihood", "init": "closed_form", "signed": "none"},
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_keep_what_defines_them(name):
    defaults = {key: item.default for key, item in signature(ATTACKS[name]).parameters.items()}
    assert {key: defaults[key] for key in SETTINGS[name]} == SETTINGS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_run_as_they_are(name, tmp_path):
    if name in ("gradvit", "april_matching", "defense_aware"):
        shape = {"image_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
        model = build_model("vit", num_classes=10, **shape).eval()
    else:
        model = build_model("resnet20_4", num_classes=10, image_size=16, width=4).eval()
    chosen = {"iterations": 4} | ({"defense": "noise"} if name == "defense_aware" else {})
    if name == "gradvit":
        cnn = build_model("resnet20_4", num_classes=10, image_size=32, width=4)
        save_checkpoint(tmp_path / "cnn.pt", {"arguments": cnn.arguments, "model": cnn.state_dict()})
        chosen["image_prior_checkpoint"] = str(tmp_path / "cnn.pt")
    number, side = 1 if name == "idlg" else 2, model.arguments["image_size"]
    images, labels = torch.rand(number, 3, side, side, generator=generator()), torch.arange(3, 3 + number)
    private = prepare(model, images, labels, Jigsaw(model.grid, 0.0), 0)
    steps = {"local": LocalSteps(2, 0.01, 2)} if name == "dimitrov" else {}  # two epochs
    leak = share(model, private, partial(no_defense, generator=generator()), reveal_labels=False, **steps)
    result = ATTACKS[name](leak, generator=generator(), **chosen)
    assert result.images.shape == images.shape and result.images.isfinite().all()
    assert len(result.labels) == number
    assert result.diagnostics["diverged"] == 0 and result.diagnostics["iterations"] == 4
