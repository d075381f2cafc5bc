"""The Gauss-Newton matrix of shared gradients, against formulas."""

from functools import partial

import torch
from torch import nn

from models import build_model
from scripts.gauss_newton_spectrum import THRESHOLDS, flat_gradient, gauss_newton, measure

TARGET = nn.functional.one_hot(torch.tensor([1]), 5).double()


class Linear(nn.Module):
    """Logits W x + b of the pixels; its gradient is known."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 5).double()

    def forward(self, images):
        return self.fc(images.flatten(1))


def test_linear_model_has_the_known_matrix():
    torch.manual_seed(0)
    model, image = Linear(), torch.randn(3, 2, 2, dtype=torch.float64)
    found = gauss_newton(partial(flat_gradient, model, TARGET), image, at_once=5)
    x, weight = image.flatten(), model.fc.weight.detach()
    p = (weight @ x + model.fc.bias.detach()).softmax(dim=0)
    q = p - TARGET[0]  # dL/d logits
    slope = (torch.diag(p) - torch.outer(p, p)) @ weight  # its derivative, (5, 12)
    # dL/dW = q x^T and dL/db = q:
    mixed = torch.outer(x, slope.T @ q)
    expected = (q @ q) * torch.eye(12) + mixed + mixed.T + (x @ x + 1) * slope.T @ slope
    torch.testing.assert_close(found, expected)


def test_columns_are_differences_of_the_gradient_of_a_network_with_maxima():
    model = build_model("convnet", num_classes=5, image_size=9, patch_size=3, width=2).eval().double()
    image, direction = torch.rand(2, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradient = partial(flat_gradient, model, TARGET)
    ahead = (gradient(image + 1e-7 * direction) - gradient(image - 1e-7 * direction)) / 2e-7
    found = gauss_newton(gradient, image, at_once=128)
    torch.testing.assert_close(direction.flatten() @ found @ direction.flatten(), ahead @ ahead, rtol=1e-4, atol=0)


def test_measures_of_directions_that_the_gradient_sees_differently():
    # Pixels count 1, 1e-2 and 1e-4 times: eigenvalues 1, 1e-4 and 1e-8.
    strength = torch.tensor([1.0, 1e-2, 1e-4] * 4, dtype=torch.float64)
    image = torch.tensor([1.0, -1.0, 2.0] * 2 + [-1.0, 1.0, -2.0] * 2, dtype=torch.float64).view(1, 4, 3)
    row = measure(lambda pixels: strength * pixels.flatten(), image, torch.ones(1, 1, 1, dtype=torch.float64))
    left = {threshold: step for threshold, step in zip(THRESHOLDS, row["left"], strict=True)}
    assert (row["n"], row["rank"]) == (12, 12)
    assert [left[t]["directions"] for t in (THRESHOLDS[0], THRESHOLDS[4], THRESHOLDS[9])] == [4, 8, 12]
    assert abs(left[THRESHOLDS[0]]["energy_below"] - 5 / 6) < 1e-12
    assert abs(left[THRESHOLDS[4]]["energy_below"] - 4 / 6) < 1e-12
    assert left[THRESHOLDS[4]]["residual"] < 2e-4 < 1e-3 < left[THRESHOLDS[0]]["residual"]
    assert left[THRESHOLDS[4]]["psnr"] < 0 and left[THRESHOLDS[9]]["psnr"] > 150
