"""The gradient-matching loop: its derivatives, what it keeps, and that no victim notices another."""

import copy
import math
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from attacks import matching, priors
from attacks.energy import TV_FORMS, Checked
from attacks.leak import Leak, LocalSteps, Reconstruction
from attacks.matching import match
from attacks.objectives import OBJECTIVES
from attacks.optimizers import Stepper
from attacks.victim import prepare, share
from defenses import no_defense
from models import build_model
from models.checkpoints import load_model, save_checkpoint
from models.jigsaw import Jigsaw
from utils.errors import UserError

UNDEFENDED = partial(no_defense, generator=torch.Generator())
MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.24, 0.26)
VIT = {"image_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)}


class Net(nn.Module):
    """Convolution, BatchNorm, dropout and a classifier for 8 x 8 pictures in four cells."""

    hides_positions, grid, patch_size = False, (2, 2), 4

    def __init__(self, norm: bool = False, dropout: float = 0.0):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(64, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = nn.functional.avg_pool2d(self.norm(self.conv(images)).sigmoid(), 2)
        return self.fc(self.drop(features.flatten(1)))


def net(seed: int = 0, **options) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Net(**options)
        if options.get("norm"):
            nn.init.uniform_(model.norm.running_var, 0.5, 2)
            nn.init.normal_(model.norm.running_mean)
        return model.double().eval()


def vit(**options) -> nn.Module:
    return build_model("vit", num_classes=5, **{**VIT, **options}).double().eval()


def swin() -> nn.Module:
    return build_model("swin_tiny", num_classes=5, **SWIN).double().eval()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def client(model: nn.Module, number: int = 1, seed: int = 0, ratio: float = 0.0, hidden: bool = False, **options):
    """(private batch, its leak): smooth pictures, normalised, with labels that differ."""
    own, side = generator(seed), model.grid[0] * model.patch_size
    coarse = torch.rand(number, 3, 4, 4, generator=own, dtype=torch.float64)
    pixels = nn.functional.interpolate(coarse, size=side, mode="bilinear")
    images = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    labels = torch.randperm(5, generator=own).repeat(2)[:number]
    dtype = next(model.parameters()).dtype
    private = prepare(model, images.to(dtype), labels, Jigsaw(model.grid, ratio, "uniform", seed=seed), 0)
    return private, share(model, private, UNDEFENDED, not hidden, mean=MEAN, std=STD, **options)


def leaks_of(model: nn.Module, victims: int = 3, **options) -> list[Leak]:
    return [client(model, seed=seed, **options)[1] for seed in range(victims)]


def attack(leaks: Leak | list[Leak], seeds: list[int] | None = None, **options):
    options = {"iterations": 4} | options
    if isinstance(leaks, Leak):
        return match(leaks, generator=generator(seeds[0] if seeds else 0), **options)
    return match(leaks, generator=[generator(seed) for seed in seeds or range(len(leaks))], **options)


def start_at(monkeypatch: pytest.MonkeyPatch, *restarts: Tensor) -> None:
    """Let every attack of the test start at these batches, one per restart."""
    monkeypatch.setattr(matching, "first_images", lambda leak, init, number, own: torch.stack(restarts))


@pytest.fixture
def derivative(monkeypatch) -> Callable[..., Tensor]:
    """The derivative by the images that `match` takes its first step along."""
    seen = []
    step = Stepper.step

    def record(stepper, gradients, iteration):
        seen.append(gradients[0].clone())
        step(stepper, gradients, iteration)

    monkeypatch.setattr(Stepper, "step", record)

    def first(leaks: Leak | list[Leak], **options) -> Tensor:
        seen.clear()
        attack(leaks, iterations=1, **options)
        return seen[0]

    return first


@pytest.fixture
def iterates(monkeypatch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(candidates, values of what is minimised, objectives) of every iteration."""
    seen = []
    update = matching.Best.update

    def record(best, images, targets, total, distance):
        seen.append((images.clone(), total.clone(), distance.clone()))
        update(best, images, targets, total, distance)

    monkeypatch.setattr(matching.Best, "update", record)
    return seen


def close(one: Tensor, other: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * max(1e-12, float(other.abs().max())))


def same(one: Reconstruction, other: Reconstruction, tolerance: float = 1e-8) -> None:
    torch.testing.assert_close(one.images, other.images, rtol=tolerance, atol=tolerance)
    assert one.labels.equal(other.labels)
    approximately = pytest.approx(other.diagnostics["objective"], rel=1e-6, abs=1e-15)
    assert one.diagnostics == other.diagnostics | {"objective": approximately}


# --- the derivative ---------------------------------------------------------------------------------------------------


def by_hand(model: nn.Module, leak: Leak, images: Tensor, objective: Callable) -> Tensor:
    """d objective / d images by two plain backward passes through cross_entropy."""
    images = images.clone().requires_grad_()
    parameters = {name: value for name, value in model.named_parameters() if name in leak.gradients}
    inputs = (images, leak.mask[None]) if leak.mask is not None else (images,)
    with sdpa_kernel(SDPBackend.MATH):
        loss = cross_entropy(model(*inputs), leak.labels)
        gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    return torch.autograd.grad(objective(dict(zip(parameters, gradients, strict=True)), leak.gradients), images)[0]


def squared(candidate: dict, target: dict) -> Tensor:
    return sum((candidate[name] - target[name]).square().sum() for name in target)


def one_minus_cosine(candidate: dict, target: dict) -> Tensor:
    one, other = (torch.cat([x[name].flatten() for name in target]) for x in (candidate, target))
    return 1 - nn.functional.cosine_similarity(one, other, dim=0)


@pytest.mark.parametrize("objective, formula", [("l2", squared), ("cosine", one_minus_cosine)])
@pytest.mark.parametrize("model", [net(), net(norm=True), vit(unknown=True)], ids=["net", "norm", "mjp"])
def test_the_derivative_is_that_of_two_backward_passes(derivative, monkeypatch, model, objective, formula):
    _, leak = client(model, number=2, ratio=0.25, tier="T2")
    leak = leak if model.hides_positions else replace(leak, mask=None)
    images = torch.randn(2, *leak.image_shape, generator=generator(), dtype=torch.float64)
    start_at(monkeypatch, images)
    expected = by_hand(model, leak, images, formula)
    assert expected.abs().max() > 1e-8
    close(derivative(leak, objective=objective)[0], expected)
    close(derivative([leak, leak], objective=objective)[1], expected)


def options_of_priors() -> dict[str, dict]:
    forms = {f"tv {form}": {"tv": 0.1, "tv_form": form} for form in TV_FORMS}
    plain = {name: {name: 0.1} for name in ("l2", "mean_square", "orthogonality", "batch_norm", "patch_prior")}
    return forms | plain | {"group": {"group": 0.1, "restarts": 2}, "features": {"features": 0.1}}


OBJECTIVE_OPTIONS = {name: {"objective": name} for name in OBJECTIVES}
OBJECTIVE_OPTIONS |= {
    "linear": {"layer_weights": "linear"},
    "exp": {"layer_weights": "exp", "objective": "l2"},
    "first": {"layers": "first2"},
    "last": {"layers": "last2", "objective": "l2"},
    "top": {"layers": "top3"},
    "weight": {"objective_weight": 7.0},
}


@pytest.mark.parametrize("options", [*OBJECTIVE_OPTIONS.values(), *options_of_priors().values()], ids=str)
def test_every_option_has_one_derivative_together_in_chunks_and_in_turn(derivative, options):
    model = net(norm=True)
    leaks = leaks_of(model, victims=3, number=2)
    together = derivative(leaks, **options)
    assert together.isfinite().all() and together.flatten(1).norm(dim=1).min() > 0
    for chunk in (1, 2):
        close(derivative(leaks, chunk=chunk, **options), together)
    if prior := options_of_priors().keys() & options.keys():
        assert not together.allclose(derivative(leaks, **options | dict.fromkeys(prior, 0.0)), rtol=1e-6, atol=0)


CLIENTS = {
    "local steps": {"local": LocalSteps(3, 0.1, 2)},
    "training": {"training": True},
    "training and local steps": {"training": True, "local": LocalSteps(2, 0.1, 1)},
    "withheld": {"withhold": ["conv.*"]},
}


@pytest.mark.parametrize("terms", CLIENTS.values(), ids=CLIENTS)
def test_every_client_has_one_derivative_together_and_in_turn(derivative, terms):
    leaks = leaks_of(net(norm=True), victims=2, number=2, **terms)
    together = derivative(leaks, objective="l2")
    assert together.flatten(1).norm(dim=1).min() > 0
    close(derivative(leaks, objective="l2", chunk=1), together)


def test_the_derivative_goes_through_local_steps(derivative, iterates, monkeypatch):
    _, leak = client(net(), number=3, local=LocalSteps(3, 0.5, 2))
    start = torch.randn(3, 3, 8, 8, generator=generator(1), dtype=torch.float64)
    direction = torch.randn(3, 3, 8, 8, generator=generator(2), dtype=torch.float64)
    start_at(monkeypatch, start)
    slope = float((derivative(leak, objective="l2")[0] * direction).sum())
    values = []
    for offset in (1e-5, -1e-5):
        start_at(monkeypatch, start + offset * direction)
        iterates.clear()
        attack(leak, objective="l2", iterations=0)
        values.append(float(iterates[0][1]))
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)
    plain = float((derivative(replace(leak, local=None), objective="l2")[0] * direction).sum())
    assert slope != pytest.approx(plain, rel=1e-3)


def test_joint_labels_have_a_derivative_of_their_own(monkeypatch):
    seen, step = [], Stepper.step

    def record(stepper, gradients, iteration):
        seen.append([value.clone() for value in gradients])
        step(stepper, gradients, iteration)

    monkeypatch.setattr(Stepper, "step", record)
    model = net()
    leaks = leaks_of(model, victims=2, number=2, hidden=True)
    images = torch.randn(2, 3, 8, 8, generator=generator(), dtype=torch.float64)
    logits = torch.randn(1, 2, 5, generator=generator(1), dtype=torch.float64)
    start_at(monkeypatch, images)
    monkeypatch.setattr(matching, "first_labels", lambda *given: logits)
    attack(leaks, objective="l2", labels="joint", iterations=1)
    attack(leaks[1], objective="l2", labels="joint", iterations=1)
    x, y = images.clone().requires_grad_(), logits[0].clone().requires_grad_()
    loss = -(y.softmax(dim=1) * model(x).log_softmax(dim=1)).sum(dim=1).mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    candidate = dict(zip(dict(model.named_parameters()), gradients, strict=True))
    expected = torch.autograd.grad(squared(candidate, leaks[1].gradients), (x, y))
    for found in ([value[1] for value in seen[0]], [value[0] for value in seen[1]]):
        assert len(found) == 2
        close(found[0], expected[0])
        close(found[1], expected[1])


def image_prior_file(folder: Path, **options) -> str:
    cnn = build_model("resnet20_4", num_classes=3, image_size=8, width=2, **options)
    for layer in cnn.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, generator=generator(3))
    normalize = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    content = {"arguments": cnn.arguments, "model": cnn.state_dict(), "normalize": normalize}
    save_checkpoint(folder / "cnn.pt", content)
    return str(folder / "cnn.pt")


def test_the_image_prior_reads_the_file_in_its_own_pixel_space(derivative, monkeypatch, tmp_path):
    file = image_prior_file(tmp_path)
    leaks = leaks_of(net(), victims=2)
    options = {"image_prior": 0.5, "image_prior_checkpoint": file, "objective_weight": 0.0}
    images = torch.randn(1, 3, 8, 8, generator=generator(), dtype=torch.float64)
    start_at(monkeypatch, images)
    together = derivative(leaks, **options)
    close(derivative(leaks, chunk=1, **options), together)

    cnn, x = load_model(file).double(), images.clone().requires_grad_()
    assert cnn.normalize == {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    mean, std, own_mean, own_std = (
        torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD, *cnn.normalize.values())
    )
    with priors.BatchNormStatistics(cnn) as seen:
        cnn((x * std + mean - own_mean) / own_std)
    expected = 0.0
    for name, (found_mean, found_variance) in zip(seen.names, seen.values, strict=True):
        layer = cnn.get_submodule(name)
        expected = expected + (found_mean - layer.running_mean).square().mean()
        expected = expected + (found_variance - layer.running_var).square().mean()
    close(together[0], torch.autograd.grad(0.5 * expected, x)[0])


def test_shared_statistics_are_each_victims_own(derivative, monkeypatch):
    model = net(norm=True)
    clients = [client(model, number=2, seed=seed, statistics=True) for seed in range(3)]
    leaks = [leak for _, leak in clients]
    options = {"batch_norm": 1.0, "objective_weight": 0.0}
    together = derivative(leaks, **options)
    assert together.flatten(1).norm(dim=1).min() > 0
    for k, leak in enumerate(leaks):
        close(derivative(leak, seeds=[k], **options)[0], together[k])
    running = derivative([replace(leak, statistics=None) for leak in leaks], **options)
    assert not running.allclose(together)
    start_at(monkeypatch, clients[1][0].shown)
    found = derivative(leaks, **options).flatten(1).norm(dim=1)
    assert found[1] < 1e-5 < found[0]  # its own statistics leave nothing to gain


@pytest.mark.parametrize(
    "model, terms",
    [
        (net(norm=True), {}),
        (net(norm=True), {"training": True, "number": 2, "hidden": True}),
        (net(dropout=0.5), {"training": True, "dropout_seed": 1}),
        (vit(unknown=True), {"ratio": 0.5}),
        (swin(), {}),
    ],
    ids=["net", "training", "dropout", "mjp", "swin"],
)
def test_a_small_finite_difference_is_nearly_the_second_derivative(derivative, model, terms):
    leaks = leaks_of(model, victims=2, **terms)
    options = {"tv": 0.01, "objective_weight": 3.0, "labels": "joint"}
    exact = derivative(leaks, **options)
    errors = []
    for step in (1e-4, 1e-7):
        for chunk in (0, 1):  # vectorised, and in turn with fused attention
            found = derivative(leaks, finite_difference=step, chunk=chunk, **options)
            errors.append(float((found - exact).norm() / exact.norm()))
    assert max(errors[2:]) < 1e-4
    assert max(errors[:2]) > 10 * max(errors[2:])  # the step is what makes the difference


def test_a_finite_difference_that_is_off_gives_way_to_the_exact_derivative(derivative, monkeypatch):
    leaks = leaks_of(vit(), victims=2)
    exact = derivative(leaks)
    for chunk in (0, 1):
        found = attack(leaks, finite_difference=1e-7, chunk=chunk)
        assert all(0.9999 < one.diagnostics["difference_cosine"] <= 1.0001 for one in found)
        close(derivative(leaks, finite_difference=100.0, chunk=chunk), exact)
        assert all(one.diagnostics["difference_cosine"] < 0.99 for one in attack(leaks, finite_difference=100.0))
    assert "difference_cosine" not in attack(leaks)[0].diagnostics
    # Good at first and off later: only the victim that is off goes on exactly, and only from the next check on.
    monkeypatch.setattr(Checked, "CHECK_EVERY", 2)

    def answer(first: Tensor, second: Tensor) -> tuple:
        return [torch.stack([first, second]).view(2, 1, 1, 1, 2)], torch.zeros(2), torch.zeros(2)

    good, off, truth = torch.tensor([1.0, 0.01]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    answers = iter([(good, good), (off, good), (off, good), (off, off)])
    checked = Checked(lambda *x: answer(*next(answers)), lambda *x: answer(truth, truth))
    seen = [checked(torch.zeros(2), None, {})[0][0][:, 0, 0, 0] for _ in range(4)]
    for found, expected in zip(seen, [(good, good), (off, good), (truth, good), (truth, off)], strict=True):
        assert found.equal(torch.stack(expected))
    assert checked.lowest[0] < 0.1 and checked.lowest[1] > 0.99


def test_priors_do_not_look_across_the_borders_of_masked_patches(derivative, monkeypatch):
    private, leak = client(vit(unknown=True), ratio=0.5, tier="T2")
    assert 1 < private.hidden.sum() < 16
    images = torch.randn(1, *leak.image_shape, generator=generator(), dtype=torch.float64)
    start_at(monkeypatch, images)
    seams = priors.shuffled_seams(private.hidden[0], (4, 4), 8)
    slopes = {
        "tv": lambda x: priors.total_variation(x, border="none", seams=seams),
        "patch_prior": lambda x: priors.patch_border(x, patch_size=8, seams=seams),
    }
    everywhere = {
        "tv": partial(priors.total_variation, border="none"),
        "patch_prior": partial(priors.patch_border, patch_size=8),
    }
    for name, formula in slopes.items():
        options = {"objective_weight": 0.0, name: 1.0}
        inferred = replace(leak, tier="T1", mask=None)
        for each in (leak, inferred):
            close(derivative([each, each], **options)[1, 0], torch.func.grad(formula)(images)[0])
        # Who knows the permutation optimises the picture before the shuffle, whose neighbours belong together.
        told = replace(leak, tier="T3", source=private.source[0])
        for each in (told, replace(leak, tier="T0", mask=None)):
            close(derivative(each, **options)[0], torch.func.grad(everywhere[name])(images))


def test_low_precision_is_close_and_leaves_no_setting_behind(derivative):
    model = vit().float()
    leaks = leaks_of(model, victims=2)
    exact = derivative(leaks)
    assert exact.dtype == torch.float32
    for precision, most in (("medium", 0.02), ("high", 0.02), ("bf16", 0.05)):
        found = derivative(leaks, precision=precision)
        assert found.dtype == torch.float32
        assert float((found - exact).norm() / exact.norm()) < most
        assert torch.get_float32_matmul_precision() == "highest"
    assert float((derivative(leaks, precision="bf16") - exact).norm() / exact.norm()) > 1e-4
    assert derivative(leaks, double=True).dtype == torch.float64
    for victim in (net(norm=True).float(), swin().float()):  # whose normalisation cannot be vectorised in bf16
        leaks = leaks_of(victim, victims=2, number=2)
        exact, found = derivative(leaks), derivative(leaks, precision="bf16")
        assert nn.functional.cosine_similarity(found.flatten(), exact.flatten(), dim=0) > 0.95


@pytest.mark.parametrize("build", [partial(vit, unknown=True), swin], ids=["vit", "swin"])
def test_attention_that_runs_fused_is_differentiated_twice(derivative, build):
    model = build()
    attention = [layer for layer in model.modules() if hasattr(layer, "fused_attn")]
    assert len(attention) == 2
    for layer in attention:
        layer.fused_attn = True
    leaks = leaks_of(model, victims=2, ratio=0.25)
    close(derivative(leaks), derivative(leaks, chunk=1))
    assert torch.backends.cuda.flash_sdp_enabled()  # as before
    assert attack(leaks[0]).diagnostics["objective"] > 0


def test_the_position_embeddings_direction_counts(derivative):
    leaks = leaks_of(vit(unknown=True), victims=2, ratio=0.25)
    options = {"objective": "l2", "pos_embed_cosine": 1.0}
    together = derivative(leaks, **options)
    close(derivative(leaks, chunk=1, **options), together)
    assert not together.allclose(derivative(leaks, objective="l2"), rtol=1e-6, atol=0)


needs_compiler = pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"))
    or not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="torch.compile needs a C++ compiler and Python's headers",
)


@needs_compiler
def test_compiled_attacks_take_the_same_steps():
    class Tiny(Net):
        def __init__(self):
            nn.Module.__init__(self)
            self.fc = nn.Linear(192, 5)

        def forward(self, images: Tensor) -> Tensor:
            return self.fc(images.flatten(1)).sigmoid()

    leaks = leaks_of(Tiny().double().eval(), victims=2)
    for one, other in zip(attack(leaks, compile=True, tv=0.1), attack(leaks, tv=0.1), strict=True):
        same(one, other)


# --- the truth is a zero ----------------------------------------------------------------------------------------------


TRUTHS = {
    "gradient": (net, {}),
    "batch": (net, {"number": 3}),
    "update": (net, {"number": 3, "local": LocalSteps(3, 0.1, 2)}),
    "batch statistics": (partial(net, norm=True), {"number": 3, "training": True}),
    "running statistics": (partial(net, norm=True), {"number": 3}),
    "dropout": (partial(net, dropout=0.5), {"number": 2, "training": True, "dropout_seed": 3}),
    "dropout over steps": (
        partial(net, dropout=0.5),
        {"number": 3, "training": True, "dropout_seed": 3, "local": LocalSteps(3, 0.1, 2)},
    ),
    "withheld": (net, {"withhold": ["fc.*"]}),
    "vit": (vit, {"number": 2}),
    "swin": (swin, {"number": 2}),
    "shuffled": (vit, {"ratio": 0.5}),
    "mask inferred": (partial(vit, unknown=True), {"number": 2, "ratio": 0.5}),
    "mask told": (partial(vit, unknown=True), {"number": 2, "ratio": 0.5, "tier": "T2"}),
    "mask after steps": (partial(vit, unknown=True), {"number": 2, "ratio": 0.5, "local": LocalSteps(2, 0.1, 1)}),
    "mask told, embedding withheld": (
        partial(vit, unknown=True),
        {"ratio": 0.5, "tier": "T2", "withhold": ["pos_embed"]},
    ),
}


@pytest.mark.parametrize("objective", ["l2", "cosine"])
@pytest.mark.parametrize("build, terms", TRUTHS.values(), ids=TRUTHS)
def test_what_the_model_was_shown_has_objective_zero(monkeypatch, build, terms, objective):
    private, leak = client(build(), **terms)
    start_at(monkeypatch, private.shown)
    assert abs(attack(leak, objective=objective, iterations=0).diagnostics["objective"]) < 1e-12
    start_at(monkeypatch, private.shown + 0.1)
    assert attack(leak, objective=objective, iterations=0).diagnostics["objective"] > 1e-9


@pytest.mark.parametrize("unknown", [True, False])
def test_knowing_the_permutation_makes_the_original_the_zero(monkeypatch, unknown):
    private, leak = client(vit(unknown=unknown), number=2, ratio=0.5, tier="T3")
    found = {}
    for name in ("original", "shown"):
        start_at(monkeypatch, getattr(private, name))
        found[name] = attack(leak, iterations=0).diagnostics["objective"]
    assert abs(found["original"]) < 1e-12
    assert (found["shown"] < 1e-12) == unknown  # under MJP no gradient knows the order of the masked patches


def test_a_model_in_training_mode_is_attacked_as_the_leak_says(monkeypatch):
    model = net(norm=True)
    private, leak = client(model, number=2)
    model.train()
    state = copy.deepcopy(model.state_dict())
    start_at(monkeypatch, private.shown)
    assert attack(leak, iterations=0).diagnostics["objective"] < 1e-12
    attack(leak, batch_norm=0.1, iterations=2)
    same(
        attack(leak, iterations=2),
        attack(replace(leak, model=copy.deepcopy(model).requires_grad_(False)), iterations=2),
    )
    assert model.training and all(value.equal(state[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_features_of_the_truth_are_the_target(iterates, monkeypatch):
    private, leak = client(net(dropout=0.5), training=True, dropout_seed=5)
    start_at(monkeypatch, private.shown)
    attack(leak, features=1.0, objective_weight=0.0, iterations=0)
    assert float(iterates[-1][1]) < 1e-15
    start_at(monkeypatch, private.shown + 0.1)
    attack(leak, features=1.0, objective_weight=0.0, iterations=0)
    assert float(iterates[-1][1]) > 1e-6


@pytest.mark.parametrize(
    "tier, terms, used",
    [
        ("T0", {}, "none"),
        ("T1", {}, "inferred"),
        ("T1", {"withhold": ["pos_embed"]}, "none"),
        ("T2", {}, "told"),
        ("T2", {"withhold": ["pos_embed"]}, "told"),
        ("T3", {}, "told"),
    ],
)
def test_tiers_decide_what_the_model_is_fed(monkeypatch, tier, terms, used):
    private, leak = client(vit(unknown=True), ratio=0.5, tier=tier, **terms)
    start_at(monkeypatch, private.original if tier == "T3" else private.shown)
    result = attack(leak, iterations=0)
    assert result.diagnostics["mask"] == used
    assert (result.diagnostics["objective"] < 1e-12) == (used != "none")


def test_models_without_a_mask_say_so():
    _, leak = client(vit(), ratio=0.5, tier="T2")
    assert attack(leak, iterations=0).diagnostics["mask"] == "none"


# --- company ----------------------------------------------------------------------------------------------------------


NEWTON = {"optimizer": "lbfgs", "objective": "l2", "lr": 1.0, "boxed": False, "iterations": 12}
LOOPS = {
    "adam": {"tv": 0.1},
    "signed": {"signed": "hard", "schedule": "step", "tv": 0.1, "restarts": 2},
    "lbfgs": NEWTON,
    "lbfgs and joint labels": NEWTON | {"labels": "joint", "restarts": 2},
    "joint labels": {"labels": "joint", "objective": "l2"},
    "group": {"group": 0.01, "restarts": 3, "langevin": 0.1, "batch_norm": 0.01},
    "noise": {"langevin": 0.5, "init": "rand", "schedule": "cosine", "warmup": 1, "clip": 0.1, "restarts": 2},
    "patterned": {"init": "patterned-3", "signed": "soft", "features": 0.1, "median_every": 2},
}


@pytest.mark.parametrize("options", LOOPS.values(), ids=LOOPS)
def test_a_victim_is_attacked_as_if_it_were_alone(options):
    hidden = options.get("labels") == "joint"
    leaks = leaks_of(net(norm=True), victims=3, number=2, hidden=hidden)
    alone = [attack(leak, [seed], **options) for leak, seed in zip(leaks, (5, 6, 7), strict=True)]
    for one, other in zip(attack(leaks, [5, 6, 7], **options), alone, strict=True):
        same(one, other)
    for one, other in zip(attack(leaks[::-1], [7, 6, 5], chunk=2, **options), alone[::-1], strict=True):
        same(one, other)
    same(attack(leaks[:2], [5, 6], chunk=1, **options)[1], alone[1])
    assert not alone[0].images.allclose(attack(leaks[0], [6], **options).images)
    assert all(result.diagnostics["iterations"] == options.get("iterations", 4) for result in alone)


def unlike(kind: str) -> tuple[list[Leak], dict]:
    """Two leaks that cannot be one vectorised problem."""
    hiding = vit(unknown=True)
    shuffled = {"ratio": 0.5, "seed": 1}
    return {
        "labels": ([client(net(), hidden=True)[1], client(net(), seed=1)[1]], {"labels": "joint"}),
        "batch": ([client(net())[1], client(net(), number=2, seed=1)[1]], {}),
        "model": ([client(net())[1], client(net(1), seed=1)[1]], {}),
        "tier": ([client(hiding, ratio=0.5, tier="T0")[1], client(hiding, **shuffled)[1]], {}),
        "step": ([client(net())[1], client(net(), seed=1, local=LocalSteps(2, 0.1, 1))[1]], {}),
        "withheld": ([client(net())[1], client(net(), seed=1, withhold=["fc.*"])[1]], {}),
        "box": ([client(net())[1], replace(client(net(), seed=1)[1], std=(0.05, 0.05, 0.05))], {"lr": 1.0}),
    }[kind]


@pytest.mark.parametrize("kind", ["labels", "batch", "model", "tier", "step", "withheld", "box"])
def test_leaks_that_are_unlike_are_attacked_one_by_one(kind):
    leaks, options = unlike(kind)
    for k, result in enumerate(attack(leaks, **options)):
        same(result, attack(leaks[k], [k], **options))


def test_the_largest_tensors_may_differ_from_victim_to_victim():
    model = net()
    leaks = leaks_of(model, victims=2)
    scaled = {name: value * (100.0 if name == "conv.bias" else 1.0) for name, value in leaks[1].gradients.items()}
    leaks[1] = replace(leaks[1], gradients=scaled)
    for k, result in enumerate(attack(leaks, layers="top1")):
        same(result, attack(leaks[k], [k], layers="top1"))


def test_a_victim_that_is_done_waits_for_no_other(monkeypatch):
    model = net()
    (private, easy), (_, hard) = client(model), client(model, seed=1)
    near = private.shown + 1e-3
    starts = {id(easy): near[None], id(hard): torch.zeros_like(near)[None]}
    monkeypatch.setattr(matching, "first_images", lambda leak, *_: starts[id(leak)])
    options = {"objective": "l2", "optimizer": "sgd", "lr": 1e-3, "boxed": False}
    reached = attack(easy, iterations=24, **options).diagnostics["objective"]
    options["iterations"] = 60
    alone = attack(easy, stop_below=reached, **options)
    assert alone.diagnostics["iterations"] == 30  # the first look after 24
    assert alone.diagnostics["objective"] < reached
    both = attack([easy, hard], stop_below=reached, **options)
    same(both[0], alone)
    assert both[1].diagnostics["iterations"] == 60
    starts[id(easy)] = torch.stack([torch.zeros_like(near), near])
    restarted = attack(easy, stop_below=reached, restarts=2, **options)  # one of them is enough
    assert restarted.diagnostics == alone.diagnostics | {"restart": 1, "objective": pytest.approx(reached, rel=0.5)}


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"tv": 5.0, "lr": 0.5}, {"objective": "l2", "median_every": 3}], ids=str)
def test_the_objective_belongs_to_the_image_that_is_returned(iterates, monkeypatch, options):
    _, leak = client(net(), number=2)
    result = attack(leak, iterations=12, restarts=2, **options)
    chosen = result.diagnostics["restart"]
    totals = torch.stack([total[chosen] for _, total, _ in iterates[1:]])
    images, _, distance = iterates[1 + int(totals.argmin())]
    assert result.images.equal(images[chosen])
    assert result.diagnostics["objective"] == float(distance[chosen])
    start_at(monkeypatch, result.images)
    again = attack(leak, iterations=0, **options)
    assert again.diagnostics["objective"] == pytest.approx(result.diagnostics["objective"], rel=1e-9)


def test_restarts_are_chosen_by_the_objective_alone(monkeypatch):
    private, leak = client(net())
    flat, near = torch.zeros_like(private.shown), private.shown + 0.01
    start_at(monkeypatch, flat, near, flat)
    result = attack(leak, restarts=3, tv=1e3, iterations=0)
    assert result.diagnostics["restart"] == 1
    assert result.images.equal(near)


def test_the_candidate_stays_in_the_box(iterates):
    _, leak = client(net(), number=2)
    low, high = ((torch.tensor(edge) - torch.tensor(MEAN)) / torch.tensor(STD) for edge in (0.0, 1.0))
    low, high = low.view(3, 1, 1) - 1e-6, high.view(3, 1, 1) + 1e-6
    result = attack(leak, lr=3.0, iterations=10, signed="hard")
    outside = [bool(((images < low) | (images > high)).any()) for images, *_ in iterates]
    assert outside == [True] + [False] * 10  # a normal start is not
    assert ((result.images >= low) & (result.images <= high)).all()
    touching = [bool((images[0, :, 0].amin() - low[0]).abs() < 1e-5) for images, *_ in iterates[1:]]
    assert all(touching)
    free = attack(leak, lr=3.0, iterations=10, signed="hard", boxed=False)
    assert ((iterates[-1][0] < low) | (iterates[-1][0] > high)).any() and free.images.isfinite().all()


def test_the_box_counts_even_where_the_start_was_best(monkeypatch):
    private, leak = client(net())
    outside = private.shown.clone()
    outside[..., 0, 0] = 9.0
    leak = replace(leak, gradients=share(net(), replace(private, shown=outside), UNDEFENDED, True).gradients)
    start_at(monkeypatch, outside)
    assert attack(leak, iterations=1, boxed=False).images.equal(outside)
    assert attack(leak, iterations=1).images.max() < 3


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
@pytest.mark.parametrize("victims", [1, 2])
def test_a_restart_that_diverges_is_left_out_and_counted(monkeypatch, optimizer, victims):
    leaks = leaks_of(net(), victims=victims)
    good = torch.randn(1, 3, 8, 8, generator=generator(9), dtype=torch.float64)
    options = {"optimizer": optimizer, "objective": "l2", "boxed": False, "iterations": 6}
    start_at(monkeypatch, good)
    alone = [attack(leak, **options) for leak in leaks]
    start_at(monkeypatch, torch.full_like(good, math.nan), good)
    results = attack(leaks, restarts=2, group=0.0, **options)
    for result, expected in zip(results, alone, strict=True):
        assert (result.diagnostics["restart"], result.diagnostics["diverged"]) == (1, 1)
        close(result.images, expected.images)
    start_at(monkeypatch, torch.full_like(good, math.nan), good)
    for result in attack(leaks, restarts=2, group=0.1, **options):
        assert result.diagnostics["diverged"] == 1 and result.images.isfinite().all()


def test_an_attack_that_diverges_says_so(iterates):
    _, leak = client(net())
    options = {"optimizer": "sgd", "lr": 1e200, "mean_square": 1.0, "boxed": False}
    result = attack(leak, restarts=2, iterations=5, **options)
    assert result.diagnostics["diverged"] == 2
    assert result.images.isfinite().all()  # the best before
    assert result.diagnostics["objective"] == float(iterates[0][2].min())


def test_the_median_filter_acts_when_asked(iterates):
    _, leak = client(net(), number=2)
    attack(leak, lr=0.0, boxed=False, median_every=2, iterations=4)
    images = [x[0] for x, *_ in iterates]
    once = priors.median_filter(images[0])
    expected = [images[0], images[0], once, once, priors.median_filter(once)]
    assert all(found.equal(wanted) for found, wanted in zip(images, expected, strict=True))
    assert not once.allclose(images[0])


def test_the_second_phase_brings_the_image_prior_and_forgets_earlier_totals(iterates, tmp_path):
    _, leak = client(net())
    prior = {"image_prior": 2.0, "image_prior_checkpoint": image_prior_file(tmp_path)}
    options = {"lr": 0.0, "iterations": 4, "objective_weight": 3.0, "second_objective_weight": 0.5, **prior}
    result = attack(leak, second_phase=0.5, boxed=False, **options)
    totals, distance = torch.stack([total[0] for _, total, _ in iterates]), iterates[0][2][0]
    expected = 2 * (totals[-1] - 0.5 * distance) / 2
    torch.testing.assert_close(totals[:2], 3 * distance.expand(2))
    torch.testing.assert_close(totals[2:], (0.5 * distance + expected).expand(3))
    assert expected > 1  # the prior, without which the second phase would seem better
    assert result.diagnostics["objective"] == float(distance)
    iterates.clear()
    attack(leak, boxed=False, **options)
    torch.testing.assert_close(iterates[0][1][0], 3 * distance + expected)
    iterates.clear()
    result = attack(leak, second_phase=0.5, **options | {"lr": 0.1, "image_prior": 200.0, "iterations": 8})
    totals = torch.stack([total[0] for _, total, _ in iterates])
    assert totals[:4].max() < totals[4:].min()
    assert result.images.equal(iterates[4 + int(totals[4:].argmin())][0][0])


def test_watchers_see_the_best_so_far_of_every_victim():
    leaks, seen = leaks_of(net(), victims=3, number=2), []

    def watch(iteration: int, iterations: int, snapshot: Callable) -> None:
        images, objectives = snapshot()
        seen.append((iteration, iterations, images.clone(), objectives.clone()))

    results = match(leaks, generator=[generator(k) for k in range(3)], iterations=5, restarts=2, watch=watch)
    assert [entry[:2] for entry in seen] == [(k, 5) for k in range(6)]
    assert seen[0][2].shape == (3, 2, 3, 8, 8) and seen[0][3].shape == (3,)
    assert seen[-1][2].equal(torch.stack([result.images for result in results]))
    assert seen[-1][3].tolist() == [result.diagnostics["objective"] for result in results]


def test_attacks_repeat_bit_by_bit_and_leave_the_global_generator_alone():
    _, leak = client(net(dropout=0.5), number=2, training=True, dropout_seed=2, hidden=True)
    options = {"langevin": 0.1, "restarts": 2, "init": "uniform", "labels": "analytic"}
    state = torch.get_rng_state()
    one, again, other = (attack(leak, [seed], **options) for seed in (1, 1, 2))
    assert one.images.equal(again.images) and one.diagnostics == again.diagnostics
    assert not one.images.allclose(other.images)
    assert torch.get_rng_state().equal(state)


def test_an_easy_victim_is_reconstructed():
    private, leak = client(net(), hidden=True)
    result = attack(leak, iterations=300, signed="hard", schedule="step", tv=1e-3)
    assert result.labels.equal(private.labels)
    assert float((result.images - private.shown).square().mean()) < 0.2 * float(private.shown.square().mean())
    start, end = attack(leak, iterations=0).diagnostics["objective"], result.diagnostics["objective"]
    assert end < 0.05 * start


# --- bad input --------------------------------------------------------------------------------------------------------


def broken(leak: Leak, name: str) -> Leak:
    gradient = leak.gradients[name].clone()
    gradient.flatten()[0] = math.nan
    return replace(leak, gradients=leak.gradients | {name: gradient})


BAD = {
    "unknown objective 'cosin': did you mean 'cosine'": {"objective": "cosin"},
    "unknown optimizer 'adan': did you mean 'adam'": {"optimizer": "adan"},
    "unknown schedule 'cosin': did you mean 'cosine'": {"schedule": "cosin"},
    "unknown init 'zero': choose randn": {"init": "zero"},
    "unknown init 'patterned-0'": {"init": "patterned-0"},
    "unknown label rule 'ying': did you mean 'yin'": {"labels": "ying"},
    "unknown tv_form 'round'": {"tv_form": "round"},
    "unknown layer_weights 'square'": {"layer_weights": "square"},
    "unknown value of 'signed' 'harsh'": {"signed": "harsh"},
    "unknown precision 'fp16'": {"precision": "fp16"},
    "unknown rule to select layers 'best3'": {"layers": "best3"},
    "layers 'top9' asks for 9 of 4": {"layers": "top9"},
    "restarts must be at least 1 and iterations at least 0, got 0 and 4": {"restarts": 0},
    "restarts must be at least 1 and iterations at least 0, got 1 and -1": {"iterations": -1},
    "the group prior compares restarts: set restarts to 2": {"group": 0.1},
    "the image prior needs a CNN with BatchNorm: pass image_prior_checkpoint": {
        "image_prior": 0.1,
        "second_phase": 0.9,
    },
    "checkpoint 'no.pt' does not exist": {"image_prior": 0.1, "image_prior_checkpoint": "no.pt"},
    "the batch_norm prior needs a victim with BatchNorm": {"batch_norm": 0.1},
    "the feature prior needs labels to start with": {"features": 0.1, "labels": "joint"},
    "precision 'bf16' is of float32 arithmetic": {"precision": "bf16"},
    "the position-embedding term needs the gradient of 'pos_embed'": {"pos_embed_cosine": 1.0},
}


@pytest.mark.parametrize("message, options", BAD.items(), ids=BAD)
@pytest.mark.parametrize("victims", [1, 2])
def test_options_that_cannot_be_are_one_clear_line(message, options, victims):
    leaks = leaks_of(net(), victims=victims, hidden=True)
    with pytest.raises(UserError, match=message) as error:
        attack(leaks, **options)
    assert "\n" not in str(error.value)


def test_leaks_that_cannot_be_matched_name_what_is_wrong(tmp_path):
    model = net()
    private, leak = client(model)
    with pytest.raises(UserError, match="the gradient of 'fc.weight' holds NaN"):
        attack(broken(leak, "fc.weight"))
    with pytest.raises(UserError, match="the gradient of 'fc.bias' holds NaN"):
        attack([leak, broken(leak, "fc.bias")])
    with pytest.raises(UserError, match="the gradient of 'fc.bias' holds NaN"):
        attack(broken(client(model, hidden=True)[1], "fc.bias"))
    with pytest.raises(UserError, match="needs at least one gradient: everything is withheld"):
        attack(client(model, withhold=["*"])[1])
    for part in ("weight", "bias"):
        with pytest.raises(
            UserError, match="the feature prior needs the gradients of the classifier's weight and bias"
        ):
            attack(client(model, withhold=[f"fc.{part}"])[1], features=0.1)
    with pytest.raises(UserError, match="needs the gradient of 'fc.bias'"):
        attack(client(model, withhold=["fc.bias"], hidden=True)[1])
    with pytest.raises(UserError, match="label rule 'idlg' reads one label, the batch has 2"):
        attack(client(model, number=2, hidden=True)[1], labels="idlg")
    with pytest.raises(UserError, match="label rule 'yin' finds a class once, but 6 images exceed 5 classes"):
        attack(client(model, number=6, hidden=True)[1], labels="yin")
    with pytest.raises(UserError, match="finite_difference works on single gradients"):
        attack(client(model, local=LocalSteps(2, 0.1, 1))[1], finite_difference=1e-6)
    with pytest.raises(UserError, match="the patch prior needs borders between patches"):
        attack(client(vit(patch_size=32))[1], patch_prior=0.1)
    attention = build_model("vit", num_classes=5, **VIT)
    save_checkpoint(tmp_path / "vit.pt", {"arguments": attention.arguments, "model": attention.state_dict()})
    with pytest.raises(UserError, match="has no BatchNorm layers: use a CNN such as ResNet-50"):
        attack(leak, image_prior=0.1, image_prior_checkpoint=str(tmp_path / "vit.pt"))
    convnet = build_model("convnet", num_classes=5, image_size=32, width=2)
    save_checkpoint(tmp_path / "convnet.pt", {"arguments": convnet.arguments, "model": convnet.state_dict()})
    with pytest.raises(UserError, match="cannot read 3x8x8 images"):
        attack(leak, image_prior=0.1, image_prior_checkpoint=str(tmp_path / "convnet.pt"))
