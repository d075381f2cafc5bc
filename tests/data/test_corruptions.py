"""data/corruptions.py: the published definitions, where they can be computed, and what holds for every corruption."""

import numpy as np
import pytest
from skimage import data
from skimage.transform import resize

from data.corruption_filters import enlarge, plasma, streak
from data.corruptions import (
    CORRUPTIONS,
    EXTRA,
    SEVERITIES,
    STANDARD,
    frost_of,
    ice_pane,
    relief,
)
from utils.errors import UserError

DRAWN = {
    "gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "glass_blur", "motion_blur", "snow", "frost",
    "fog", "elastic_transform", "spatter",
}  # fmt: skip
TOLERANCE = {"pixelate": 0, "jpeg_compression": 0.5, "defocus_blur": 1e-2, "zoom_blur": 1e-2}  # of 255; else 1e-3


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def photograph(height: int = 96, width: int = 96) -> np.ndarray:
    return np.rint(255 * resize(data.astronaut(), (height, width), anti_aliasing=True)).astype(np.uint8)


def test_the_fifteen_and_the_four():
    assert (len(STANDARD), len(EXTRA), len(CORRUPTIONS)) == (15, 4, 19)
    assert all(corruption.name == name for name, corruption in CORRUPTIONS.items())
    assert all(len(corruption.parameters) == len(SEVERITIES) for corruption in CORRUPTIONS.values())


@pytest.mark.parametrize("name", sorted(CORRUPTIONS.keys() - DRAWN))
def test_published_values(golden, name):
    """Corners, centre and block means of the original's images; of a JPEG, which depends on the library, the means."""
    stored, cat = golden("corruptions"), data.chelsea()[20:244, 140:364]
    for severity in SEVERITIES:
        exact = CORRUPTIONS[name].exact(cat, severity, rng())
        found = {"pool14": exact.reshape(14, 16, 14, 16, 3).mean(axis=(1, 3))}
        if name != "jpeg_compression":
            found |= {"corner8": exact[:8, :8], "centre8": exact[108:116, 108:116]}
        for part, value in found.items():
            # the stored numbers are float32 and themselves 8e-6 off
            limit = TOLERANCE.get(name, 1e-3) + 1e-5
            np.testing.assert_allclose(value, stored[f"{name}/{severity}/{part}"], rtol=0, atol=limit)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(33, 50, 3), (41, 30, 1), (30, 41), (7, 5, 3), (1, 1, 3)])
def test_shape_and_dtype_are_kept_and_the_image_left_alone(name, shape):
    image = rng(1).integers(0, 256, shape, dtype=np.uint8)
    before = image.copy()
    for severity in (1, 3, 5):
        changed = CORRUPTIONS[name](image, severity, rng())
        assert changed.shape == shape
        assert changed.dtype == np.uint8
    assert np.array_equal(image, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_only_the_generator_is_drawn_from(name):
    image = photograph()
    first, again, other = (CORRUPTIONS[name](image, 3, rng(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert np.array_equal(first, other) == (name not in DRAWN)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severity_raises_the_error(name):
    """Over a few draws. The published parameters themselves are not monotone everywhere: those steps are named here."""
    image = photograph(160, 160)
    draws = range(4 if name in DRAWN else 1)
    errors = [
        np.mean([np.square(CORRUPTIONS[name](image, severity, rng(d)).astype(float) - image).mean() for d in draws])
        for severity in SEVERITIES
    ]
    known_falls = {"glass_blur": {1, 3}, "elastic_transform": {2}, "saturate": {2}, "snow": {2}, "frost": {3}}
    known_falls |= {"spatter": {3, 4}}  # from water to mud
    for step in range(1, 5):
        assert errors[step] > errors[step - 1] or step in known_falls.get(name, ()), (step, errors)
    assert errors[0] > 0


def test_flat_grey_knows_its_noise():
    """Standard deviations and shares on 300 x 300 x 3 values of mid grey, where nothing is clipped at severity 1."""
    grey = np.full((300, 300, 3), 128, np.uint8)
    value = 128 / 255
    deviation = {
        "gaussian_noise": 0.08,
        "shot_noise": (value / 60) ** 0.5,
        "speckle_noise": 0.15 * value,
    }
    for name, expected in deviation.items():
        assert CORRUPTIONS[name].exact(grey, 1, rng()).std() / 255 == pytest.approx(expected, rel=0.01), name
    changed = CORRUPTIONS["impulse_noise"](grey, 5, rng())
    assert (changed == 0).mean() == pytest.approx(0.135, abs=0.003)
    assert (changed == 255).mean() == pytest.approx(0.135, abs=0.003)
    assert ((changed == 0) | (changed == 255) | (changed == 128)).all()


@pytest.mark.parametrize(
    "name", ["gaussian_blur", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "pixelate"]
)
def test_blurs_leave_a_constant_image(name):
    flat = np.broadcast_to(np.array([40, 120, 250], np.uint8), (40, 52, 3))
    for severity in SEVERITIES:
        gain = {4: 1.013, 5: 1.011}.get(severity, 1) if name == "defocus_blur" else 1  # of the published kernels
        change = CORRUPTIONS[name].exact(flat, severity, rng()) - np.minimum(flat * gain, 255)
        # glass_blur truncates to bytes between its blurs
        assert np.abs(change).max() < (1.001 if name == "glass_blur" else 0.06 if gain > 1 else 1e-9)


def test_streak_runs_one_way_and_keeps_the_mass():
    point = np.zeros((41, 41, 1))
    point[20, 20] = 1
    blurred = streak(point, 5, 3, 0)[..., 0]
    weights = np.exp(-(np.arange(11) ** 2) / 18)
    np.testing.assert_allclose(blurred[20, 10:21], (weights / weights.sum())[::-1], atol=1e-12)
    assert np.count_nonzero(blurred) == 11
    down = streak(point, 5, 3, 90)[..., 0]
    np.testing.assert_allclose(down, blurred.T, atol=1e-12)


def test_enlarging_by_one_changes_nothing_and_keeps_the_centre():
    x = rng().random((21, 33, 3))
    np.testing.assert_allclose(enlarge(x, 1), x)
    ramp = np.broadcast_to(np.linspace(-1, 1, 101)[:, None, None], (101, 101, 1))
    np.testing.assert_allclose(enlarge(ramp, 2)[:, 0, 0], ramp[:, 0, 0] / 2, atol=0.02)


def test_glass_copies_values_of_near_pixels_only():
    """Without its blurs: rows of one value each, so that a copied value tells how far it came."""
    image = np.repeat(np.arange(40, dtype=np.uint8)[:, None, None] * 6, 40, axis=1).repeat(3, axis=2)
    function = CORRUPTIONS["glass_blur"].function
    moved = np.rint(function(image / 255, rng(), 0, 1, 1) * 255) / 6 - np.arange(40)[:, None, None]
    # a shift reaches one up; a value that already moved can be copied again, so single ones come from further below
    assert set(np.unique(moved.round())) <= set(range(-1, 1)) | {0.0}
    assert (moved.round() != 0).mean() > 0.3
    assert not moved[[0, 1]].any()


def test_plasma_spans_zero_to_one_and_is_smoother_with_a_higher_decay():
    for side in (5, 64, 100):
        field = plasma(side, side // 2 + 1, 2, rng())
        assert field.shape == (side, side // 2 + 1)
        assert field.min() >= 0 and field.max() <= 1
    whole = plasma(64, 64, 1.5, rng())
    assert (whole.min(), whole.max()) == (0, 1)
    rough, smooth = (np.diff(plasma(128, 128, decay, rng())).std() for decay in (1.4, 2))
    assert rough > 2 * smooth


def test_ice_is_brighter_than_its_shadow_and_bluish():
    panes = np.stack([ice_pane(60, 80, rng(seed)) for seed in range(4)])
    assert panes.shape == (4, 60, 80, 3)
    red, green, blue = panes.mean(axis=(0, 1, 2))
    assert 0.4 < red < green < blue < 0.8
    assert panes.std(axis=(1, 2)).min() > 0.03


def test_relief_of_no_drops_is_finite():
    assert np.isfinite(relief(np.zeros((12, 9)))).all()


def test_grey_images_are_treated_as_their_colour_twins():
    grey = photograph()[..., :1]
    for name in ("brightness", "contrast", "pixelate", "defocus_blur", "fog"):
        colour = CORRUPTIONS[name].exact(np.repeat(grey, 3, axis=2), 3, rng())
        np.testing.assert_allclose(CORRUPTIONS[name].exact(grey, 3, rng()), colour[..., :1], atol=1e-6)


@pytest.mark.parametrize(
    ("image", "severity", "message"),
    [
        (np.zeros((4, 4, 3)), 1, "takes a uint8 image .* not float64 of shape"),
        (np.zeros((4, 4, 4), np.uint8), 1, r"not uint8 of shape \(4, 4, 4\)"),
        (np.zeros((0, 4, 3), np.uint8), 1, "with pixels"),
        (np.zeros((4, 4, 3), np.uint8), 0, "severity must be from 1 to 5, got 0"),
    ],
)
def test_refusals(image, severity, message):
    with pytest.raises(UserError, match=message):
        CORRUPTIONS["fog"](image, severity, rng())


def test_frost_pastes_a_crop_of_a_photograph_where_it_has_some():
    image = photograph(40, 60)
    rows, columns = np.indices((80, 100))
    ice = np.stack([rows, columns, np.full_like(rows, 9)], axis=2).astype(np.uint8)  # says where a crop was cut
    pasted = frost_of([ice])
    for severity, (kept, added) in enumerate(CORRUPTIONS["frost"].parameters, start=1):
        exact = pasted.exact(image, severity, rng(3))
        draws = rng(3)
        draws.integers(1)
        left, top = draws.integers(100 - 60 + 1), draws.integers(80 - 40 + 1)
        crop = ice[top : top + 40, left : left + 60]
        np.testing.assert_allclose(exact, np.clip(kept * image + added * crop.astype(float), 0, 255), atol=1e-9)
    assert frost_of([ice[:10, :10]])(image, 1, rng()).shape == image.shape  # enlarged until it covers the image
    with pytest.raises(UserError, match="one photograph of frost or more"):
        frost_of([])
