"""Starts of one colour, stages of resolution, and labels by exhaustion: every hypothesis a restart."""

from dataclasses import replace

import pytest
import torch

from attacks.matching import gradient_matching
from attacks.matching.initialization import first_images
from attacks.matching.loop import block_side
from attacks.matching.options import MatchingOptions
from attacks.matching.priors import in_blocks
from tests.attacks.small_victims import MEAN, STD, attack, client, generator, leaks_of, net
from utils.errors import UserError


@pytest.mark.parametrize("name, levels", [("light", (1, 1, 1)), ("dark", (0, 0, 0)), ("green", (0, 1, 0))])
def test_a_start_of_one_colour_is_that_colour_for_people(name, levels):
    images = first_images(client(net())[1], name, 2, generator())
    pixels = images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    expected = torch.tensor(levels, dtype=pixels.dtype).view(3, 1, 1).expand(2, 1, 3, 8, 8)
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)


def test_grey_pictures_have_no_colours_but_light_and_dark():
    grey = replace(client(net())[1], image_shape=(1, 8, 8), mean=(0.5,), std=(0.25,))
    assert first_images(grey, "dark", 1, generator()).unique().tolist() == [-2.0]
    with pytest.raises(UserError, match="init 'red' is of pictures in colour, and the images have 1 channel"):
        first_images(grey, "red", 1, generator())


def test_exhaustive_labels_find_the_batch_by_its_objective():
    """15 multisets of two labels of five classes; the right one matches the gradient best. Nothing tells the label."""
    for private, leak in [client(net(), number=2, seed=seed, hidden=True) for seed in range(2)]:
        found = attack(leak, labels="exhaustive", restarts=15, iterations=60, lr=0.1)
        assert found.labels.tolist() == sorted(private.labels.tolist())


def test_exhaustive_labels_ask_for_their_restarts():
    leak = leaks_of(net(), victims=1, hidden=True)[0]
    with pytest.raises(UserError, match="each of the 5 ways to label 1 images with 5 classes.*restarts to 5"):
        attack(leak, labels="exhaustive", restarts=3)
    with pytest.raises(UserError, match="leave scoring_choice at 'loss'"):
        attack(leak, labels="exhaustive", restarts=5, scoring_choice="tv")


def test_resolution_grows_in_stages():
    sides = [block_side(iteration, MatchingOptions(iterations=12, stages=3)) for iteration in range(12)]
    assert sides == [4] * 4 + [2] * 4 + [1] * 4 and block_side(5, MatchingOptions()) == 1
    images = torch.arange(2 * 15.0).view(1, 2, 3, 5)
    coarse = in_blocks(images, 2)
    assert coarse.shape == images.shape and coarse[0, 0, :2, :2].unique().tolist() == [3.0]
    assert coarse[0, 0, 2, 4] == images[0, 0, 2, 4]  # a block of one pixel at the corner
    leak = client(net())[1]
    early = attack(leak, iterations=6, stages=3, lr=0.05, stop_below=1e9)  # done at once: the start is returned
    late = attack(leak, iterations=60, stages=3, lr=0.05)
    assert late.diagnostics["objective"] < early.diagnostics["objective"] / 10
    with pytest.raises(UserError, match="stages must be at least 1, got 0"):
        attack(leak, stages=0)


def test_images_of_the_first_stage_are_blocks():
    leak, seen = client(net())[1], []
    match = gradient_matching(MatchingOptions(iterations=4, stages=2))

    def watch(iteration, iterations, snapshot):
        seen.append(snapshot()[0].clone())

    match([leak], generator=[generator()], watch=watch)
    assert all(in_blocks(images[0], 2).allclose(images[0]) for images in seen[1:3])
