"""scoring.py, layers 'batchK' and label_flip: the options of Inverting Gradients, against their
formulas."""

import pytest
import timm
import torch
from torch import Tensor, nn

from attacks.matching.loop import draw_layers
from attacks.matching.objectives import OBJECTIVES, cosine, out_sim, select
from attacks.matching.options import MatchingOptions
from attacks.matching.priors import total_variation
from attacks.matching.problem import build_problem
from attacks.matching.scoring import Certainty
from attacks.threat_model.client import Client
from defenses import build_defense
from models.jigsaw import Jigsaw
from tests.attacks.small_victims import MEAN, STD, attack, client, generator, leaks_of, net, start_at
from utils.errors import UserError


def restarts(number: int = 4) -> Tensor:
    """Candidates (R, 1, 3, 8, 8) that differ in every score; one is not finite."""
    images = torch.rand(number, 1, 3, 8, 8, generator=generator(5), dtype=torch.float64)
    images[1] *= 0.3
    return images


def scored(monkeypatch, images: Tensor, **options):
    """Attack one leak with these restarts and no step."""
    start_at(monkeypatch, *images)
    return attack(client(net())[1], iterations=0, restarts=len(images), boxed=False, **options)


@pytest.fixture
def judge(tmp_path) -> dict[str, str]:
    """A small classifier of timm, as options of scoring_choice inception."""
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "judge.pth")
    return {"scoring_model": "test_resnet", "scoring_checkpoint": str(tmp_path / "judge.pth")}


def test_tv_chooses_the_smoothest_restart(monkeypatch):
    images = restarts()
    found = scored(monkeypatch, images, scoring_choice="tv")
    smoothest = int(torch.stack([total_variation(one) for one in images]).argmin())
    assert found.diagnostics["restart"] == smoothest == 1 and found.images.equal(images[smoothest])


def test_inception_chooses_what_the_classifier_is_surest_of(monkeypatch, judge):
    images = restarts()
    found = scored(monkeypatch, images, scoring_choice="inception", **judge)
    network = timm.create_model("test_resnet").double().eval()
    network.load_state_dict(torch.load(judge["scoring_checkpoint"]))
    config, entropies = network.pretrained_cfg, []
    for one in images:
        scale = [torch.tensor(value).view(3, 1, 1) for value in (STD, MEAN, config["mean"], config["std"])]
        pixels = one * scale[0] + scale[1]
        large = nn.functional.interpolate(pixels, size=config["input_size"][1:], mode="bilinear", align_corners=False)
        probabilities = network((large - scale[2]) / scale[3]).softmax(dim=1).detach()
        entropies.append(float(-(probabilities * probabilities.log()).sum()))
    assert found.diagnostics["restart"] == entropies.index(min(entropies))
    problem = build_problem([client(net())[1]], MatchingOptions(), [generator()])
    certainty = Certainty(judge["scoring_model"], judge["scoring_checkpoint"], problem)
    assert [float(certainty(one)) for one in images] == pytest.approx(entropies, rel=1e-6)


@pytest.mark.parametrize("choice", ["pixelmean", "pixelmedian"])
def test_averages_are_those_of_the_finite_restarts(monkeypatch, choice):
    images = restarts(5)
    images[2, 0, 0, 0, 0] = torch.nan
    found = scored(monkeypatch, images, scoring_choice=choice)
    kept = images[[0, 1, 3, 4]]
    expected = kept.mean(dim=0) if choice == "pixelmean" else kept.sort(dim=0).values[1]
    torch.testing.assert_close(found.images, expected)
    leak = client(net())[1]
    start_at(monkeypatch, expected)
    alone = attack(leak, iterations=0, boxed=False)
    assert found.diagnostics["objective"] == pytest.approx(alone.diagnostics["objective"], rel=1e-9)
    with pytest.raises(UserError, match="every restart left the finite numbers"):
        scored(monkeypatch, torch.full_like(images, torch.nan), scoring_choice=choice)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scoring_choice": "tvv"}, "did you mean 'tv'"),
        ({"scoring_choice": "inception"}, "give both or none"),
        ({"scoring_model": "resnet18"}, "give both or none"),
        ({"scoring_checkpoint": "a.pth"}, "give that too"),
        ({"layers": "batch", "layer_weights": "exp"}, "leave layer_weights at 'equal'"),
        ({"layers": "batch99"}, "draws from 6 shared gradients"),
        ({"layers": "lastk-3"}, "unknown rule"),
    ],
)
def test_what_does_not_go_together_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        attack(client(net(norm=True))[1], iterations=0, **options)


def test_layers_drawn_anew_in_every_iteration():
    leaks, options = leaks_of(net(norm=True), 2), MatchingOptions(layers="batch3", restarts=2, iterations=3)
    problem = build_problem(leaks, options, [generator(0), generator(1)])
    drawn = [torch.stack(list(draw_layers(problem, options, last=False).values())) for _ in range(20)]
    for weights in drawn:  # (names, problems)
        assert weights.sum(dim=0).tolist() == [3.0] * 4 and set(weights.unique().tolist()) == {0.0, 1.0}
        assert weights[:, 0].equal(weights[:, 1]) and weights[:, 2].equal(weights[:, 3])
    assert torch.stack(drawn).float().mean(dim=(0, 2)).min() > 0.2  # each in its turn
    assert all(value.eq(1).all() for value in draw_layers(problem, options, last=True).values())
    assert len(select({name: torch.ones(1) for name in "abcdefghij"}, "batch")) == 10


@pytest.mark.parametrize("objective", ["cosine", "l2", "out_sim"])
def test_the_last_iterate_of_drawn_layers_is_judged_by_all(iterates, objective):
    leak = client(net())[1]
    found = attack(leak, iterations=5, layers="batch2", objective=objective)
    parameters = dict(net().named_parameters())
    logits = torch.func.functional_call(net(), parameters, (found.images,))
    loss = nn.functional.cross_entropy(logits, leak.labels)
    own = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    expected = OBJECTIVES[objective](own, leak.gradients)
    assert found.diagnostics["objective"] == pytest.approx(expected.item(), rel=1e-9)
    assert found.images.equal(iterates[-1][0][0])


def test_topk_is_written_in_two_ways():
    gradients = {"a": torch.ones(2), "b": torch.full((2,), 3.0), "c": torch.full((2,), 2.0)}
    assert select(gradients, "topk-2") == select(gradients, "top2") == ["b", "c"]


def test_out_sim_is_the_mean_over_rows_of_one_less_their_cosine():
    draw = {"generator": generator(1), "dtype": torch.float64}
    target = {"w": torch.randn(3, 2, 2, **draw), "b": torch.randn(3, **draw), "z": torch.randn(2, 4, **draw)}
    target["z"][1] = 0
    candidate = {name: torch.randn(value.shape, **draw) for name, value in target.items()}
    costs = []
    for name, value in target.items():
        rows = [(candidate[name], value)] if value.dim() < 2 else zip(candidate[name], value, strict=True)
        for one, other in rows:
            costs.append(1 - float(nn.functional.cosine_similarity(one.flatten(), other.flatten(), 0, 1e-10)))
    assert len(costs) == 3 + 1 + 2
    assert float(out_sim(candidate, target)) == pytest.approx(sum(costs) / len(costs), rel=1e-12)
    assert float(out_sim(target, target)) == pytest.approx(1 / 6, abs=1e-12)  # of the row that is zero
    weights = {"w": 1.0, "b": 0.5, "z": 0.0}
    weighted = sum(costs[:3]) + 0.5 * costs[3]
    assert float(out_sim(candidate, target, layer_weights=weights)) == pytest.approx(weighted / 3.5, rel=1e-12)
    moving = {name: value.clone().requires_grad_() for name, value in candidate.items()}
    slopes = torch.autograd.grad(out_sim(moving, target), list(moving.values()))
    assert all(slope.isfinite().all() for slope in slopes) and not slopes[2][1].any()
    assert float(cosine(candidate, target)) != pytest.approx(float(out_sim(candidate, target)))


@pytest.mark.parametrize("flip", [False, True])
def test_label_flip_trains_each_image_as_the_class_after_its_own(flip):
    model, images = net(), torch.rand(5, 3, 8, 8, generator=generator(), dtype=torch.float64)
    classes = {str(label): label for label in range(5)}
    terms = {"mean": MEAN, "std": STD, "reveal_labels": True}
    who = Client(model, Jigsaw(model.grid, 0), build_defense("none", {}, "image"), 0, terms, classes, flip)
    round_ = who.round(0, images, [str(label) for label in range(5)])
    expected = torch.tensor([1, 2, 3, 4, 0] if flip else [0, 1, 2, 3, 4])
    assert round_.leak.labels.equal(expected) and round_.private.labels.equal(expected)
    loss = nn.functional.cross_entropy(model(images), expected)
    for (name, _), gradient in zip(
        model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
    ):
        torch.testing.assert_close(round_.leak.gradients[name], gradient)


def test_the_clients_loss_and_wangs_total_variation_are_added_as_weighed(iterates):
    leak, model = client(net())[1], net()
    attack(leak, iterations=0, objective="l2", task=0.7, tv=0.3, tv_form="wang", boxed=False)
    images, total, distance = (value[0] for value in iterates[0])
    padded = nn.functional.pad(images, (0, 1, 0, 1))
    right = (padded[..., :-1, 1:] - padded[..., :-1, :-1]).abs() + 1e-8
    down = (padded[..., 1:, :-1] - padded[..., :-1, :-1]).abs() + 1e-8
    expected = (
        0.7 * nn.functional.cross_entropy(model(images), leak.labels) + 0.3 * ((right**2 + down**2) ** 1.25).mean()
    )
    torch.testing.assert_close(total - distance, expected.detach())
