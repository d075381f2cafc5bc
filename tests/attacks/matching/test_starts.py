"""Starts of one colour, and labels by exhaustion: every hypothesis a restart."""

from dataclasses import replace

import pytest
import torch

from attacks.matching.initialization import first_images
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
