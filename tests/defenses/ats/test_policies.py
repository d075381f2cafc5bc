"""Policies: notation, draws, what they do to images, and the scores on cases with known answers."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from defenses.ats import transforms
from defenses.ats.policies import apply, candidates, parse, transform, write
from defenses.ats.scores import accuracy_score, first_of_class, privacy_score, rank
from defenses.ats.search import functions, hybrid
from defenses.ats.transforms import FUNCTIONS
from utils.errors import UserError

PIXELS = torch.randint(256, (3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
IMAGE = Image.fromarray(PIXELS.permute(1, 2, 0).numpy())


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("text, policies", [("3-1-7+43-18-18", [(3, 1, 7), (43, 18, 18)]), ("", [()]), ("26", [(26,)])])
def test_notation(text, policies):
    assert parse(text) == policies and write(parse(text)) == text


def test_fifty_entries_are_29_functions_two_of_them_identities():
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(low, high, (32, 32, 3)).astype(np.uint8)) for low, high in ((0, 256), (60, 200))
    ]
    results = [
        tuple(operation(picture, sign).tobytes() for picture in pictures for sign in (1, -1))
        for operation in transforms.LIBRARY
    ]
    same = tuple(picture.tobytes() for picture in pictures for _ in range(2))
    assert len({(operation.name, operation.magnitude) for operation in transforms.LIBRARY}) == 29
    assert len(set(results)) == 28  # the two identities, 28 and 39, do the same
    assert [index for index, result in enumerate(results) if result == same] == [28, 39]


def test_operations_run_from_left_to_right_each_in_its_direction():
    shift, contrast = transforms.LIBRARY[3], transforms.LIBRARY[1]
    assert apply(IMAGE, (3, 1), [-1, 1]).tobytes() == contrast(shift(IMAGE, -1), 1).tobytes()
    assert apply(IMAGE, (3, 1), [-1, 1], [True, False]).tobytes() == contrast(IMAGE, 1).tobytes()
    moved = np.asarray(shift(IMAGE, 1))
    assert (moved[:, -14:] == 0).all() and (moved[:, :17] == np.asarray(IMAGE)[:, 15:]).all()  # 14.5 pixels to the left


def test_an_image_draws_one_policy_and_fair_signs():
    expected = {apply(IMAGE, (3,), [sign]).tobytes() for sign in (1, -1)} | {apply(IMAGE, (0,), [1]).tobytes()}
    generator, counts = seeded(), Counter()
    for _ in range(400):
        drawn = transform(PIXELS, parse("3+0"), generator)
        counts[Image.fromarray(drawn.permute(1, 2, 0).numpy()).tobytes()] += 1
    assert set(counts) == expected
    assert sorted(counts.values())[0] > 70 and sorted(counts.values())[-1] > 160  # 100, 100 and 200 expected
    assert transform(PIXELS, [()], generator).equal(PIXELS)


def test_listed_probabilities_are_an_option():
    never = transform(PIXELS, [(29,)], seeded(), listed_probability=True)  # invert, listed with probability 0
    assert never.equal(PIXELS) and not transform(PIXELS, [(29,)], seeded()).equal(PIXELS)
    changed = sum(not transform(PIXELS, [(0,)], seeded(seed), True).equal(PIXELS) for seed in range(200))
    assert 5 < changed < 40  # listed with 0.1


def test_a_policy_that_changes_the_image_size_is_refused(monkeypatch):
    monkeypatch.setitem(transforms.FUNCTIONS, "invert", lambda image, v: image.resize((16, 16)))
    with pytest.raises(
        UserError, match=r"operation 0 \(invert\) of policy '1-0' changes the image size from 32 x 32 to 16"
    ):
        apply(IMAGE, (1, 0), [1, 1])


def test_candidates_are_different_policies_of_the_library():
    found = candidates(300, seeded())
    assert found == candidates(300, seeded()) and len(set(found)) == 300
    assert {len(policy) for policy in found} == {1, 2, 3} and {i for p in found for i in p} == set(range(50))
    with pytest.raises(UserError, match="only 50"):
        candidates(51, seeded(), length=1)


def test_known_scores():
    assert privacy_score(torch.full((2, 21), 0.3)).tolist() == pytest.approx([0.3, 0.3])
    ramp = torch.arange(21).float()[None] / 20
    assert privacy_score(ramp).item() == pytest.approx(0.5)
    rows = torch.linalg.qr(torch.randn(200, 9, generator=seeded(), dtype=torch.float64)).Q.T
    rows = torch.linalg.qr(torch.cat([torch.ones(1, 200), rows]).T.double()).Q.T[1:]  # orthogonal and centred
    assert accuracy_score(rows) == pytest.approx(-9, abs=1e-3)
    assert accuracy_score(torch.cat([rows, rows[:1]])) < -9e4  # two equal images
    assert first_of_class(torch.tensor([3, 1, 3, 0, 1])).tolist() == [0, 1, 3]


def test_ranking_filters_by_accuracy_and_can_ignore_variance():
    privacy = np.array([[0.1, 0.5], [0.4, 0.4], [0.2, 0.2]])
    accuracy = np.array([[-1.0], [-1.0], [-2.0]])
    assert [place for place, _ in rank(privacy, accuracy, -1.5, weight=1.0)] == [0, 1]
    assert [place for place, _ in rank(privacy, accuracy, -3, weight=0.2)] == [2, 1, 0]


def test_hybrids_share_no_function():
    assert functions((42, 20)) == functions((48, 34))
    assert hybrid([(3, 1, 7), (3, 18), (42, 18), (48, 18)]) == [(3, 1, 7), (42, 18)]


@pytest.mark.parametrize("name", ["shearX", "translateX", "shearY", "translateY"])
@pytest.mark.parametrize("strength", [0.25, -0.25])
def test_shears_and_shifts_move_along_one_axis_only(name, strength):
    """Stripes along the motion stay where they are, but for the black that comes in from outside."""
    stripes = np.repeat(np.arange(40, 240, 10, dtype=np.uint8), 20).reshape(20, 20)
    stripes = stripes if name.endswith("X") else stripes.T
    image = Image.fromarray(np.stack([stripes] * 3, axis=2))
    moved = np.asarray(FUNCTIONS[name](image, strength))[..., 0]
    inside = moved > 0
    assert (moved[inside] == stripes[inside]).all() and 150 < inside.sum() < 400
