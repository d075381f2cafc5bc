"""What holds for every defence: zero strength changes no bit, options are checked, draws follow the seed."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from attacks.threat_model.client import Client
from defenses import DEFENSES, build_defense
from defenses.base import Step
from models import build_model
from models.jigsaw import Jigsaw
from utils.errors import UserError

TERMS = {"reveal_labels": True, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)}
MODELS = {
    "vit": {"image_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2},
    "lenet": {"image_size": 16},
}
IMAGES = "mixup", "ats"  # the others act on gradients


def leak_of(name: str, options: dict, *, model: str = "vit", batch: int = 4, seed: int = 0, index: int = 0):
    victim = build_model(model, num_classes=5, **MODELS[model]).eval()
    generator = torch.Generator().manual_seed(7)
    pixels = torch.randint(256, (batch, 3, 16, 16), generator=generator) / 255
    images = (pixels - torch.tensor(TERMS["mean"]).view(3, 1, 1)) / torch.tensor(TERMS["std"]).view(3, 1, 1)
    defense = build_defense(name, options)
    defense.check(victim)
    client = Client(victim, Jigsaw(victim.grid, 0), defense, seed, TERMS, ["a", "b"])
    private, leak, _ = client.round(index, images, ["a", "b", "a", "b"][:batch])
    return private, leak


def off(name: str) -> dict:
    return {DEFENSES[name].strength: DEFENSES[name].off} if DEFENSES[name].strength else {}


@pytest.mark.parametrize("name", DEFENSES)
@pytest.mark.parametrize("model", MODELS)
def test_zero_strength_is_bit_identical_to_no_defence(name, model):
    _, plain = leak_of("none", {}, model=model)
    private, defended = leak_of(name, off(name), model=model)
    assert not build_defense(name, off(name)).active
    assert private.model_input.equal(private.images) and private.targets is None
    assert defended.gradients.keys() == plain.gradients.keys()
    for key, gradient in plain.gradients.items():
        assert defended.gradients[key].equal(gradient), key


@pytest.mark.parametrize("name", [name for name in DEFENSES if name != "none"])
def test_every_defence_acts_by_default_and_follows_its_seed(name):
    private, plain = leak_of("none", {})
    _, one = leak_of(name, {})
    _, same = leak_of(name, {})
    acts = one.gradients.keys() != plain.gradients.keys()
    for key, gradient in one.gradients.items():
        assert gradient.equal(same.gradients[key]) and gradient.isfinite().all()
        acts |= not gradient.equal(plain.gradients[key])
    assert acts and build_defense(name, {}).active
    assert build_defense(name, {}).strength in str(build_defense(name, {}))


@pytest.mark.parametrize("name", ["noise", "laplace", "dp_sgd", "mixup", "ats"])
def test_draws_differ_from_victim_to_victim(name):
    leaks = [leak_of(name, {}, seed=seed, index=index)[1] for seed, index in ((0, 0), (0, 1), (1, 0))]
    firsts = [leak.gradients["patch_embed.proj.weight"] for leak in leaks]
    assert not firsts[0].equal(firsts[1]) and not firsts[0].equal(firsts[2])


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("noise", {"std": -1.0}, "std must be 0 or more, got -1"),
        ("laplace", {"scale": -0.1}, "scale must be 0 or more"),
        ("dp_sgd", {"clip": -1.0}, "clip must be 0 or more"),
        ("dp_sgd", {"noise_multiplier": -1}, "noise_multiplier must be 0 or more"),
        ("dp_sgd", {"accountant": "moments"}, "accountant must be rdp, prv or gdp"),
        ("prune", {"ratio": 1.0}, "ratio must be in"),
        ("prune", {"scope": "layer"}, "scope must be tensor or global"),
        ("quantize", {"bits": -1}, "bits must be from 0 to 16"),
        ("quantize", {"bits": 1, "rounding": "stochastic"}, "rounding must be nearest for 1 bit"),
        ("half_precision", {"format": "float8"}, "format must be one of float32, float16, bfloat16"),
        ("soteria", {"percent": 100.0}, "percent must be in"),
        ("mixup", {"mixed": 0}, "mixed must be at least 1"),
        ("mixup", {"largest": 0.1}, "largest must be in"),
        ("ats", {"policies": "3-1-50"}, "operation 50, and the library has 0 to 49"),
        ("ats", {"policies": "3-x"}, "not a chain of operations"),
        ("ats", {"policies": "3-1++7"}, "not a chain of operations"),
        ("noise", {"sd": 1.0}, "did you mean 'std'"),
        ("nois", {}, "did you mean 'noise'"),
    ],
)
def test_wrong_options_are_named(name, options, words):
    with pytest.raises(UserError, match=words):
        build_defense(name, options)


def test_defences_that_do_not_apply_say_so():
    convnet = build_model("convnet", num_classes=5, width=2, image_size=32)
    with pytest.raises(UserError, match="'dp_sgd' does not apply to this model: BatchNorm in 'body.1'"):
        build_defense("dp_sgd", {}).check(convnet)
    with pytest.raises(UserError, match="'withhold' does not apply to this model: 'pos_embed' names none"):
        build_defense("withhold", {}).check(convnet)
    bottlenecked = build_model("convnet", num_classes=5, width=2, image_size=32, bottleneck=4)
    with pytest.raises(UserError, match="'soteria' does not apply to this model"):
        build_defense("soteria", {}).check(bottlenecked)
    with pytest.raises(UserError, match="mixes 4 images of a batch, and this one has 1"):
        leak_of("mixup", {}, batch=1)


def test_noise_has_the_stated_strength():
    gradients = {"a": torch.zeros(300, 200), "b": torch.zeros(3, dtype=torch.float64)}
    for name, options, deviation in (("noise", {"std": 0.1}, 0.1), ("laplace", {"scale": 0.1}, 0.1 * math.sqrt(2))):
        noisy = build_defense(name, options).gradients(gradients, generator=torch.Generator().manual_seed(0))
        assert noisy["a"].std().item() == pytest.approx(deviation, rel=0.02) and noisy["b"].dtype == torch.float64
        assert abs(noisy["a"].mean().item()) < 3e-3


def test_dp_sgd_clips_every_image_and_averages():
    _, leak = leak_of("dp_sgd", {"clip": 0.5, "noise_multiplier": 0.0})
    singles = []
    for place in range(4):
        victim = build_model("vit", num_classes=5, **MODELS["vit"]).eval()
        private, _ = leak_of("none", {})
        loss = torch.nn.functional.cross_entropy(victim(private.model_input[place][None]), private.labels[place][None])
        gradients = torch.autograd.grad(loss, list(victim.parameters()))
        norm = torch.stack([value.norm() for value in gradients]).norm()
        singles.append([value * min(1.0, 0.5 / (norm.item() + 1e-6)) for value in gradients])
    for given, parts in zip(leak.gradients.values(), zip(*singles, strict=True), strict=True):
        assert torch.allclose(given, sum(parts) / 4, atol=1e-6)
    noisy = [
        leak_of("dp_sgd", {"clip": 0.5, "noise_multiplier": z})[1].gradients["blocks.0.mlp.fc1.weight"] for z in (0, 2)
    ]
    assert (noisy[1] - noisy[0]).std().item() == pytest.approx(2 * 0.5 / 4, rel=0.05)


def test_dp_sgd_accounts_with_opacus_or_says_why_not(monkeypatch):
    defense = build_defense("dp_sgd", {"noise_multiplier": 1.0})
    assert build_defense("dp_sgd", {"noise_multiplier": 0}).account(0.1, 10)["epsilon"] is None
    try:
        import opacus  # noqa: F401
    except ImportError:
        found = defense.account(0.01, 1000)
        assert found["epsilon"] is None and "Opacus is not installed" in found["privacy"]
    else:
        one, longer = (defense.account(0.01, steps)["epsilon"] for steps in (1000, 4000))
        assert 1 < one < longer < 10


def test_pruning_keeps_the_largest_entries():
    gradients = {"a": torch.tensor([3.0, -1.0, 0.5, -4.0]), "b": torch.tensor([[0.1, -0.2]])}
    one = build_defense("prune", {"ratio": 0.5}).gradients(gradients, generator=None)
    assert one["a"].tolist() == [3.0, 0, 0, -4.0] and one["b"][0].tolist() == pytest.approx([0, -0.2])
    both = build_defense("prune", {"ratio": 0.5, "scope": "global"}).gradients(gradients, generator=None)
    assert both["a"].tolist() == [3.0, -1.0, 0, -4.0] and not both["b"].any()


def test_quantisation_levels():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    signs = build_defense("quantize", {"bits": 1}).gradients({"a": values}, generator=generator)["a"]
    assert signs.equal(values.sign() * values.abs().mean())
    for rounding in ("nearest", "stochastic"):
        defense = build_defense("quantize", {"bits": 4, "rounding": rounding})
        given = defense.gradients({"a": values}, generator=generator)["a"]
        spacing = values.abs().max() / 7
        assert len(given.unique()) <= 15 and (given - values).abs().max() <= spacing * (
            1 if rounding != "nearest" else 0.5
        )
    many = torch.stack([defense.gradients({"a": values}, generator=generator)["a"] for _ in range(400)]).mean(0)
    assert (many - values).abs().max() < spacing / 8
    assert (
        build_defense("quantize", {}).gradients({"a": torch.zeros(3)}, generator=generator)["a"].equal(torch.zeros(3))
    )


def test_half_precision_is_of_its_format_and_stays_finite():
    values = torch.tensor([1 + 2**-10, 1 + 2**-12, 1e6, -1e-9], dtype=torch.float64)
    one, other = (
        build_defense("half_precision", {"format": name}).gradients({"a": values}, generator=None)["a"]
        for name in ("float16", "bfloat16")
    )
    assert one.tolist() == [1 + 2**-10, 1.0, 65504.0, 0.0] and other[:2].tolist() == [1.0, 1.0]
    assert other[2].item() == pytest.approx(1e6, rel=2**-8) and other[3] < 0 and one.dtype == values.dtype


@pytest.mark.parametrize("model, head", [("vit", "head"), ("lenet", "fc")])
def test_soteria_zeroes_the_features_that_move_least(model, head):
    _, plain = leak_of("none", {}, model=model)
    private, leak = leak_of("soteria", {"percent": 50.0}, model=model)
    victim = build_model(model, num_classes=5, **MODELS[model]).eval()
    scores = torch.zeros(plain.gradients[f"{head}.weight"].shape[1])
    for image in private.model_input:
        derivative = torch.autograd.functional.jacobian(lambda x: victim.features(x[None])[0], image)
        scores += derivative.flatten(1).norm(dim=1) / (victim.features(image[None])[0].abs() + 0.1)
    dropped = scores < scores.median() if len(scores) % 2 else scores < torch.quantile(scores, 0.5)
    for key, value in leak.gradients.items():
        wanted = plain.gradients[key]
        assert value.equal(wanted.masked_fill(dropped, 0) if key == f"{head}.weight" else wanted), key


def test_signed_soteria_divides_by_the_feature_itself():
    """score_f = |sum over the batch of |d r_f / d x| / (r_f + 0.1)|, as the official code has it."""
    _, plain = leak_of("none", {})
    private, leak = leak_of("soteria", {"percent": 50.0, "signed": True})
    victim = build_model("vit", num_classes=5, **MODELS["vit"]).eval()
    scores = torch.zeros(plain.gradients["head.weight"].shape[1])
    for image in private.model_input:
        derivative = torch.autograd.functional.jacobian(lambda x: victim.features(x[None])[0], image)
        scores += derivative.flatten(1).norm(dim=1) / (victim.features(image[None])[0] + 0.1)
    dropped = scores.abs() < torch.quantile(scores.abs(), 0.5)
    assert leak.gradients["head.weight"].equal(plain.gradients["head.weight"].masked_fill(dropped, 0))
    unsigned = leak_of("soteria", {"percent": 50.0})[1].gradients["head.weight"]
    assert not leak.gradients["head.weight"].equal(unsigned)


def test_soteria_scores_the_first_images_only_if_told_to(monkeypatch):
    _, plain = leak_of("none", {})
    private, leak = leak_of("soteria", {"percent": 50.0, "sample": 1})
    victim = build_model("vit", num_classes=5, **MODELS["vit"]).eval()
    derivative = torch.autograd.functional.jacobian(lambda x: victim.features(x[None])[0], private.model_input[0])
    score = derivative.flatten(1).norm(dim=1) / (victim.features(private.model_input[:1])[0].abs() + 0.1)
    dropped = score < torch.quantile(score, 0.5)
    assert leak.gradients["head.weight"].equal(plain.gradients["head.weight"].masked_fill(dropped, 0))


def test_mixup_mixes_images_and_labels_alike():
    private, _ = leak_of("mixup", {"mixed": 3})
    weights = torch.linalg.lstsq(private.images.flatten(1).T, private.model_input.flatten(1).T).solution.T
    assert ((weights > 1e-4).sum(dim=1) == 3).all() and weights.max() <= 0.65 + 1e-4
    assert torch.allclose(weights.sum(dim=1), torch.ones(4), atol=1e-4)
    one_hot = torch.nn.functional.one_hot(private.labels, 5).float()
    assert torch.allclose(private.targets, weights @ one_hot, atol=1e-4)


def test_withheld_gradients_are_absent():
    _, leak = leak_of("withhold", {"names": "pos_embed, blocks.*"})
    assert "pos_embed" not in leak.gradients and "head.weight" in leak.gradients
    assert not any(name.startswith("blocks.") for name in leak.gradients)


def test_gradients_of_single_images_need_a_single_step():
    victim = build_model("vit", num_classes=5, **MODELS["vit"]).eval()
    client = Client(
        victim, Jigsaw(victim.grid, 0), build_defense("dp_sgd", {}), 0, TERMS | {"local": (2, 0.1, 2)}, ["a"]
    )
    with pytest.raises(UserError, match="not an update of local steps"):
        client.round(0, torch.rand(2, 3, 16, 16), ["a", "a"])


def test_soteria_looks_at_what_the_client_trains_on():
    """Hidden positions change the features, and with them which ones the image moves least."""
    client = build_model("vit", num_classes=5, unknown=True, **MODELS["vit"]).double().eval()
    nn.init.normal_(client.unknown_pos_embed, generator=torch.Generator().manual_seed(1))
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mask = torch.zeros(2, client.grid[0] * client.grid[1], dtype=torch.bool)
    mask[:, 0] = True
    scores = torch.zeros(client.features(images, mask).shape[1], dtype=torch.float64)
    for image, hidden in zip(images, mask, strict=True):
        look = partial(lambda x, hidden: client.features(x[None], hidden[None])[0], hidden=hidden)
        derivative = torch.autograd.functional.jacobian(look, image)
        scores += derivative.flatten(1).norm(dim=1) / (look(image).detach().abs() + 0.1)
    found = build_defense("soteria", {}).scores(Step(client, images, torch.tensor([0, 1]), mask, None))
    torch.testing.assert_close(found, scores)
