"""models/jigsaw.py: patches, masks and permutations, also against the official implementation's numbers."""

import io
import math
import random

import pytest
import torch
from scipy.ndimage import label

from models.jigsaw import (
    MASK_SAMPLERS,
    Jigsaw,
    block_mask,
    exact_block_mask,
    patchify,
    pixel_patch_shuffle,
    shuffle_patches,
    uniform_mask,
    unpatchify,
)
from utils.errors import UserError

GRID = (14, 14)
# mjp.md 2.1, 4000 masks of the official sampler: cells asked for, mean size, share of full masks, of empty masks.
TABLE = {
    0.03: (5, 3.8, 0.45, 0.155),
    0.10: (19, 18.6, 0.69, 0.0),
    0.50: (98, 97.8, 0.83, 0.0),
    0.90: (176, 173.0, 0.41, 0.0),
}


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_patches_are_row_major_cells_of_the_image():
    x = images(2, 3, 24, 16)
    patches = patchify(x, 8)
    assert patches.shape == (2, 6, 192)
    for row in range(3):
        for column in range(2):
            cell = x[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            assert patches[:, 2 * row + column].equal(cell.flatten(1))


def test_patches_are_flattened_like_a_patch_embedding_kernel():
    x, kernel = images(2, 3, 16, 24).double(), images(5, 3, 8, 8, seed=1).double()
    embedded = torch.nn.functional.conv2d(x, kernel, stride=8).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patchify(x, 8) @ kernel.flatten(1).T, embedded, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("height", "width", "patch_size"), [(32, 32, 8), (16, 48, 4), (24, 8, 8), (16, 16, 16)])
def test_unpatchify_inverts_patchify(height, width, patch_size):
    x = images(2, 3, height, width)
    grid = height // patch_size, width // patch_size
    assert unpatchify(patchify(x, patch_size), patch_size, grid).equal(x)


@pytest.mark.parametrize("rows", [1, 4])
def test_shuffle_moves_masked_contents_and_nothing_else(rows):
    x = images(4, 3, 32, 24)
    mask, source = Jigsaw((8, 6), 0.5, "uniform").draw(rows)
    before, after = patchify(x, 4), patchify(shuffle_patches(x, source, 4), 4)
    moved = 0
    for image in range(4):
        row = image % rows
        assert after[image, ~mask[row]].equal(before[image, ~mask[row]])
        assert after[image].equal(before[image, source[row]])
        assert sorted(after[image].tolist()) == sorted(before[image].tolist())
        moved += int((after[image] != before[image]).any(1).sum())
    assert moved > 40  # 24 masked patches in each of 4 images


@pytest.mark.parametrize("patch_size", [4, 8, 16])
def test_shuffle_equals_the_official_one(golden, patch_size):
    data = golden("mjp_shuffle")
    mask = torch.tensor(data[f"p{patch_size}/mask"]).bool()
    source = torch.arange(len(mask))
    source[mask] = torch.tensor(data[f"p{patch_size}/src"])
    shuffled = shuffle_patches(torch.tensor(data["x32"]), source[None], patch_size)
    assert shuffled.equal(torch.tensor(data[f"p{patch_size}/out"]))
    assert shuffled.equal(torch.tensor(data["x32"])) == source[mask].equal(mask.nonzero()[:, 0])


def test_shuffle_at_224_pixels_equals_the_official_one(golden):
    """Stored is where the official shuffle took each of the 196 patches of a photograph from."""
    data = golden("mjp_shuffle")
    mask = torch.tensor(data["i224/mask"]).bool()
    source = torch.arange(196)
    source[mask] = torch.tensor(data["i224/src"])
    before = images(1, 3, 224, 224)
    after = patchify(shuffle_patches(before, source[None], 16), 16)[0]
    origin = torch.tensor(data["i224/patch"]).long()
    assert after.equal(patchify(before, 16)[0, origin])
    assert (origin != torch.arange(196)).sum() > 40


class Given(random.Random):
    """A generator whose permutations are known."""

    def __init__(self, *permutations: list[int]):
        super().__init__(0)
        self.permutations = list(permutations)

    def sample(self, population, k):
        permutation = self.permutations.pop(0)
        assert sorted(permutation) == list(population) and k == len(permutation)
        return permutation


def test_pixel_patch_shuffle_equals_the_official_one(golden):
    data = golden("mjp_shuffle")
    rng = Given(data["pps/pixel_perm"].tolist(), data["pps/patch_perm"].tolist())
    assert pixel_patch_shuffle(torch.tensor(data["x32"]), 8, rng).equal(torch.tensor(data["pps/out"]))


def test_pixel_patch_shuffle_has_one_pixel_order_for_all_patches_and_channels():
    x = images(2, 3, 12, 8)
    places, pixels = random.Random(1).sample(range(6), 6), random.Random(2).sample(range(16), 16)
    shuffled = patchify(pixel_patch_shuffle(x, 4, Given(pixels, places)), 4).unflatten(2, (3, 16))
    original = patchify(x, 4).unflatten(2, (3, 16))
    for place, origin in enumerate(places):
        for pixel, pixel_origin in enumerate(pixels):
            assert shuffled[:, place, :, pixel].equal(original[:, origin, :, pixel_origin])


@pytest.mark.parametrize("seed", [11, 12, 13, 14])
@pytest.mark.parametrize("ratio", ["0.10", "0.27"])
def test_block_masks_equal_the_official_ones_draw_for_draw(golden, seed, ratio):
    rng = random.Random(seed)
    drawn = [block_mask(GRID, int(196 * float(ratio)), rng) for _ in range(3)]
    expected = golden("mjp_mask_stats")[f"exact/seed{seed}_r{ratio}"]
    assert torch.tensor(drawn).view(3, 14, 14).equal(torch.tensor(expected).bool())
    assert torch.tensor(drawn[0]).equal(Jigsaw(GRID, float(ratio), seed=seed).draw()[0][0])


def test_block_masks_are_distributed_like_the_official_ones(golden):
    facts, arrays = golden("mjp_mask_stats.json")["scalars"], golden("mjp_mask_stats")
    draws = 1500
    for name, entry in facts.items():
        official, ratio = entry["value"], float(name.removeprefix("g14_r"))
        rng = random.Random(f"distribution {name}")
        masks = torch.tensor([block_mask(GRID, official["target"], rng) for _ in range(draws)])
        sizes = masks.sum(1).double()
        components = torch.tensor([label(mask.view(GRID).numpy())[1] for mask in masks]).double()
        assert official["target"] == int(196 * ratio)
        for value, mean, std in (
            (sizes, official["mean"], official["std"]),
            (components, official["comp4_mean"], official["comp4_std"]),
        ):
            error = math.sqrt(value.var() / draws + std**2 / official["draws"])
            assert abs(value.mean() - mean) <= 4 * error, name
        for share, expected in (
            ((sizes == official["target"]).double().mean(), official["frac_hit_target"]),
            ((sizes == 0).double().mean(), official["frac_empty"]),
        ):
            error = math.sqrt(expected * (1 - expected) * (1 / draws + 1 / official["draws"]))
            assert abs(share - expected) <= 4 * error, name
        # The largest of 196 errors, each of at most half over the square root of the draws.
        marginal = masks.double().mean(0).view(GRID)
        assert (marginal - torch.tensor(arrays[f"{name}/marginal"])).abs().max() < 0.06, name


@pytest.mark.parametrize("ratio", TABLE)
def test_block_masks_match_the_published_table(ratio):
    count, mean, full, empty = TABLE[ratio]
    draws, table_draws, rng = 1000, 4000, random.Random(7)
    assert int(196 * ratio) == count
    sizes = torch.tensor([sum(block_mask(GRID, count, rng)) for _ in range(draws)]).double()
    spread = 1 / draws + 1 / table_draws
    assert abs(sizes.mean() - mean) <= 4 * math.sqrt(sizes.var() * spread) + 0.05  # the table is rounded
    for share, expected in (((sizes == count).double().mean(), full), ((sizes == 0).double().mean(), empty)):
        assert abs(share - expected) <= 4 * math.sqrt(expected * (1 - expected) * spread) + 0.005


@pytest.mark.parametrize("grid", [(14, 14), (4, 9), (56, 56)])
def test_block_masks_never_cover_more_than_asked_for(grid):
    rng, number, sizes = random.Random(0), grid[0] * grid[1], []
    for share in range(21):
        count = number * share // 20
        mask = block_mask(grid, count, rng)
        assert len(mask) == number
        assert sum(mask) <= count
        sizes.append(sum(mask))
    assert max(sizes) > number / 2


def test_no_block_spans_the_grid_so_a_single_row_gets_none():
    rng = random.Random(0)
    assert not any(any(block_mask((1, 20), 20, rng, 1, 20)) for _ in range(20))
    assert any(any(block_mask((2, 20), 20, rng, 1, 20)) for _ in range(20))


class Recording(random.Random):
    """A generator that remembers the limits it was asked to draw between."""

    def __init__(self, seed: int):
        super().__init__(seed)
        self.limits: list[tuple[float, float]] = []

    def uniform(self, low, high):
        self.limits.append((low, high))
        return super().uniform(low, high)


@pytest.mark.parametrize("sampler", [block_mask, exact_block_mask])
def test_blocks_are_drawn_between_the_size_limits_until_less_is_left(sampler):
    rng = Recording(0)
    sampler(GRID, 150, rng, 20, 60)
    areas = [limits for limits in rng.limits if limits[0] == 20]
    assert areas[0] == (20, 60)
    assert max(high for _, high in areas) == 60
    assert min(high for _, high in areas) < 60


@pytest.mark.parametrize("sampler", ["block_exact", "uniform"])
@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("grid", [(14, 14), (4, 9)])
def test_exact_samplers_cover_exactly_the_number_asked_for(sampler, ratio, grid):
    masks, _ = Jigsaw(grid, ratio, sampler).draw(20)
    assert masks.sum(1).tolist() == [int(grid[0] * grid[1] * ratio)] * 20
    if ratio == 1:
        assert masks.all()


def test_exact_blocks_contain_the_blocks_of_the_same_draw():
    short = 0
    for seed in range(100):
        blocks = torch.tensor(block_mask(GRID, 19, random.Random(seed)))
        exact = torch.tensor(exact_block_mask(GRID, 19, random.Random(seed)))
        assert not (blocks & ~exact).any()
        short += int(blocks.sum() < exact.sum())
    assert short > 10


def test_uniform_masks_hide_every_cell_equally_often():
    rng, draws = random.Random(0), 2000
    shares = torch.tensor([uniform_mask((4, 6), 6, rng) for _ in range(draws)]).double().mean(0)
    assert (shares - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / draws)


@pytest.mark.parametrize("sampler", MASK_SAMPLERS)
def test_a_draw_permutes_the_masked_patches_among_themselves(sampler):
    masks, sources = Jigsaw(GRID, 0.3, sampler, seed=3).draw(10)
    assert (masks.shape, masks.dtype) == ((10, 196), torch.bool)
    assert (sources.shape, sources.dtype) == ((10, 196), torch.int64)
    place = torch.arange(196)
    for mask, source in zip(masks, sources, strict=True):
        assert source[~mask].equal(place[~mask])
        assert source[mask].sort().values.equal(place[mask])
        assert not source[mask].equal(place[mask])
    assert len({tuple(mask.tolist()) for mask in masks}) == 10


@pytest.mark.parametrize("sampler", MASK_SAMPLERS)
def test_ratio_zero_masks_nothing_and_moves_nothing(sampler):
    jigsaw = Jigsaw(GRID, 0, sampler)
    for masks, sources in (jigsaw.draw(2), jigsaw.draw_for([0, 1])):
        assert not masks.any()
        assert sources.equal(torch.arange(196).expand(2, -1))


@pytest.mark.parametrize("sampler", MASK_SAMPLERS)
def test_evaluation_draws_depend_on_seed_and_image_alone(sampler):
    jigsaw = Jigsaw(GRID, 0.3, sampler, seed=5)
    masks, sources = jigsaw.draw_for([3, 7, 5])
    jigsaw.draw(4)
    for position, index in enumerate([3, 7, 5]):
        mask, source = jigsaw.draw_for(torch.tensor([index]))
        assert mask[0].equal(masks[position])
        assert source[0].equal(sources[position])
    assert not masks[0].equal(masks[1])
    assert not Jigsaw(GRID, 0.3, sampler, seed=6).draw_for([3])[0][0].equal(masks[0])


def test_evaluation_draws_leave_the_training_stream_alone():
    one, other = Jigsaw(GRID, 0.3, seed=5), Jigsaw(GRID, 0.3, seed=5)
    one.draw_for([0, 1, 2])
    assert one.draw()[1].equal(other.draw()[1])


def test_a_saved_jigsaw_continues_the_same_stream():
    jigsaw = Jigsaw(GRID, 0.3, seed=1)
    jigsaw.draw(3)
    file = io.BytesIO()
    torch.save(jigsaw.state_dict(), file)
    file.seek(0)
    restored = Jigsaw(GRID, 0.3, seed=2)
    restored.load_state_dict(torch.load(file, weights_only=True))
    expected, drawn = jigsaw.draw(3), restored.draw(3)
    assert drawn[0].equal(expected[0])
    assert drawn[1].equal(expected[1])
    assert not Jigsaw(GRID, 0.3, seed=1).draw(3)[0].equal(expected[0])


@pytest.mark.parametrize("ratio", [-0.1, 1.01, math.nan, math.inf])
def test_ratios_outside_zero_to_one_are_refused(ratio):
    with pytest.raises(UserError, match="mask_ratio must be between 0 and 1"):
        Jigsaw(GRID, ratio)


def test_an_unknown_sampler_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match="unknown mask sampler 'blok': did you mean 'block'"):
        Jigsaw(GRID, 0.1, "blok")


def test_one_mask_for_a_batch_is_that_of_its_first_image():
    each, one = (Jigsaw((4, 4), 0.5, min_block=2, max_block=8, per_batch=own) for own in (False, True))
    masks, sources = each.draw_for([7, 3, 5])
    mask, source = one.draw_for([7, 3, 5])
    assert mask.shape == source.shape == (1, 16)
    assert mask[0].equal(masks[0]) and source[0].equal(sources[0])
    assert not masks[0].equal(masks[1])
