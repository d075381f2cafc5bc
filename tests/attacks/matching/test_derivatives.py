"""The derivative the matching loop steps along: that of two backward passes, for every objective, prior and client."""

import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from attacks.matching import priors, problem
from attacks.matching.derivative import Checked
from attacks.matching.image_prior import open_prior
from attacks.matching.loss import TV_FORMS
from attacks.matching.objectives import OBJECTIVES
from attacks.matching.stepper import Stepper
from attacks.threat_model.leak import Leak, LocalSteps
from tests.attacks.small_victims import (
    MEAN,
    STD,
    Net,
    attack,
    client,
    close,
    generator,
    image_prior_file,
    leaks_of,
    net,
    same,
    start_at,
    swin,
    vit,
)


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
    _, leak = client(model, number=2, ratio=0.25, attacker_knowledge="mask")
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
    monkeypatch.setattr(problem, "first_labels", lambda *given: logits)
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


def timm_prior_file(folder) -> str:
    """A CNN of timm whose statistics are not those of a fresh one, as an image_prior_checkpoint."""
    network = timm.create_model("test_resnet")
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.running_mean, -1, 1, generator=generator())
    torch.save(network.state_dict(), folder / "resnet.pth")
    return f"timm:test_resnet={folder / 'resnet.pth'}"


@pytest.mark.parametrize("kind", ["ours", "timm"])
def test_the_image_prior_reads_the_file_in_its_own_pixel_space(derivative, monkeypatch, tmp_path, kind):
    file = image_prior_file(tmp_path) if kind == "ours" else timm_prior_file(tmp_path)
    scale = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    if kind == "timm":
        scale = {key: timm.get_pretrained_cfg("test_resnet").to_dict()[key] for key in ("mean", "std")}
    leaks = leaks_of(net(), victims=2)
    options = {"image_prior": 0.5, "image_prior_checkpoint": file, "objective_weight": 0.0}
    images = torch.randn(1, 3, 8, 8, generator=generator(), dtype=torch.float64)
    start_at(monkeypatch, images)
    together = derivative(leaks, **options)
    close(derivative(leaks, chunk=1, **options), together)

    cnn, x = open_prior(file, 8).double(), images.clone().requires_grad_()
    assert cnn.normalize == scale
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
    start_at(monkeypatch, clients[1][0].model_input)
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


@pytest.mark.parametrize("chunk", [0, 1])
def test_a_finite_difference_is_of_the_same_function(derivative, iterates, chunk):
    leaks, options = leaks_of(net(), victims=2), {"tv": 0.01, "objective_weight": 3.0, "chunk": chunk}
    for step in (0.0, 1e-7):
        derivative(leaks, finite_difference=step, **options)
    (_, total, distance), (_, again, apart) = iterates[0], iterates[len(iterates) // 2]
    close(again, total)
    close(apart, distance)
    assert not again.allclose(apart)


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
    private, leak = client(vit(unknown=True), ratio=0.5, attacker_knowledge="mask")
    assert 1 < private.mask.sum() < 16
    images = torch.randn(1, *leak.image_shape, generator=generator(), dtype=torch.float64)
    start_at(monkeypatch, images)
    seams = priors.shuffled_seams(private.mask[0], (4, 4), 8)
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
        inferred = replace(leak, attacker_knowledge="method", mask=None)
        for each in (leak, inferred):
            close(derivative([each, each], **options)[1, 0], torch.func.grad(formula)(images)[0])
        # Who knows the permutation optimises the picture before the shuffle, whose neighbours belong together.
        told = replace(leak, attacker_knowledge="permutation", source=private.source[0])
        for each in (told, replace(leak, attacker_knowledge="none", mask=None)):
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
            self.norm, self.fc = nn.BatchNorm2d(3), nn.Linear(192, 5)

        def forward(self, images: Tensor) -> Tensor:
            return self.fc(self.norm(images).flatten(1)).sigmoid()

    leaks = leaks_of(Tiny().double().eval(), victims=2)
    options = {"tv": 0.1, "batch_norm": 0.1}  # the second looks into the network by hooks
    for one, other in zip(attack(leaks, compile=True, **options), attack(leaks, **options), strict=True):
        same(one, other)
