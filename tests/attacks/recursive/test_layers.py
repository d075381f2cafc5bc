"""layers.py: matrices against autograd, ranks against singular values, solutions against dense ones."""

import numpy as np
import pytest
import torch
from torch import nn

from attacks.recursive.layers import INVERSES, Layer, chain, measured_rank, nearest_solution, predicted_rank
from models import build_model
from models.chains import TARGETS
from utils.errors import UserError

GEOMETRIES = [  # channels in, out, kernel, stride, padding, side; also where the stride loses border pixels
    (3, 2, 3, 1, 0, 8),
    (3, 6, 4, 2, 0, 9),
    (2, 3, 5, 2, 2, 10),
    (3, 4, 3, 2, 1, 9),
    (1, 5, 5, 3, 2, 11),
    (2, 2, 3, 3, 0, 8),
    (4, 1, 3, 1, 1, 7),
    (2, 7, 1, 2, 0, 7),
    (2, 3, 2, 3, 0, 8),
]


def conv(channels, out, kernel, stride, padding, side, **options) -> Layer:
    torch.manual_seed(0)
    module = nn.Conv2d(channels, out, kernel, stride, padding, dtype=torch.float64, **options)
    return Layer("body.0", module, nn.Identity(), (channels, side, side))


def delta_of(layer: Layer) -> torch.Tensor:
    return torch.randn(layer.out_shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_matrices_are_the_convolution_and_its_weight_gradient(geometry):
    check_matrices(conv(*geometry))


def test_matrices_of_dilated_and_oblong_convolutions_and_of_linear_layers():
    check_matrices(conv(2, 3, 3, 1, 1, 9, dilation=2))
    check_matrices(conv(2, 3, (3, 5), (1, 2), (0, 2), 9))
    check_matrices(Layer("fc", nn.Linear(12, 5, dtype=torch.float64), nn.Identity(), (12, 1, 1)))


def check_matrices(layer: Layer):
    x = torch.randn(layer.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z = layer.module(x.flatten() if layer.is_linear else x)
    delta = delta_of(layer)
    (z.view(layer.out_shape) * delta).sum().backward()
    flat = x.flatten().numpy()
    bias = layer.module.bias.detach().numpy().repeat(z.numel() // layer.out_shape[0])
    np.testing.assert_allclose(layer.forward_matrix @ flat + bias, z.detach().flatten().numpy(), atol=1e-10)
    gradient = layer.gradient_matrix(delta) @ flat
    np.testing.assert_allclose(gradient, layer.module.weight.grad.flatten().numpy(), atol=1e-10)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_rank_from_shapes_is_that_of_the_singular_values(geometry):
    layer = conv(*geometry)
    assert predicted_rank(layer) == measured_rank(layer, delta_of(layer))
    assert measured_rank(layer, 1e-9 * delta_of(layer)) == predicted_rank(layer)  # small gradients lose no rank


def test_both_halves_of_a_system_share_c_out_squared_equations():
    layer = conv(3, 2, 3, 1, 0, 8)
    delta = delta_of(layer)
    weight, forward = layer.weight.flatten(1).numpy(), layer.forward_matrix.toarray().reshape(2, -1, 192)
    gradient = layer.gradient_matrix(delta).toarray().reshape(2, 27, 192)
    by_gradient = np.einsum("ot,utx->uox", weight, gradient)  # <delta_u, z_o> as a function of x, both ways
    by_forward = np.einsum("ur,orx->uox", delta.flatten(1).numpy(), forward)
    np.testing.assert_allclose(by_gradient, by_forward, atol=1e-12)


def test_solutions_are_those_of_dense_least_squares():
    layer, rng = conv(3, 4, 4, 2, 0, 9), np.random.default_rng(0)
    system, right = layer.forward_matrix, rng.normal(size=layer.forward_matrix.shape[0])
    dense = np.linalg.lstsq(system.toarray(), right)[0]
    options = {"tolerance": 1e-14, "unique": False}
    found = nearest_solution(system, right, **options)
    np.testing.assert_allclose(found.x, dense, atol=1e-10)
    start = rng.normal(size=len(dense))
    nearest = start + np.linalg.lstsq(system.toarray(), right - system @ start)[0]
    np.testing.assert_allclose(nearest_solution(system, right, start=start, **options).x, nearest, atol=1e-10)
    overdetermined = conv(3, 6, 3, 1, 1, 8).forward_matrix
    right = rng.normal(size=overdetermined.shape[0])
    found = nearest_solution(overdetermined, right, tolerance=1e-14, unique=True)
    np.testing.assert_allclose(found.x, np.linalg.lstsq(overdetermined.toarray(), right)[0], atol=1e-9)
    assert found.residual == pytest.approx(np.linalg.norm(overdetermined @ found.x - right) / np.linalg.norm(right))


@pytest.mark.parametrize(
    "act", [nn.Identity(), nn.LeakyReLU(0.2), nn.Sigmoid(), nn.Tanh(), nn.Softplus(), nn.Softplus(3)]
)
def test_activations_are_undone(act):
    layer = Layer("body.0", nn.Conv2d(1, 1, 1), act, (1, 1, 1))
    z = torch.cat([torch.linspace(-4, 4, 41, dtype=torch.float64), torch.tensor([1e-9, 0, -1e-9])])
    torch.testing.assert_close(layer.invert(act(z)), z, rtol=1e-9, atol=1e-9)
    step = 1e-6
    torch.testing.assert_close(
        layer.slope(z[:40] + 0.01),
        (act(z[:40] + 0.01 + step) - act(z[:40] + 0.01 - step)) / (2 * step),
        rtol=1e-6,
        atol=1e-8,
    )
    assert type(act) in INVERSES


def test_softplus_is_undone_where_it_would_overflow():
    layer = Layer("body.0", nn.Conv2d(1, 1, 1), nn.Softplus(), (1, 1, 1))
    z = torch.tensor([30.0, 800.0, -30.0], dtype=torch.float64)
    torch.testing.assert_close(layer.invert(layer.act(z)), z, rtol=1e-12, atol=0)


def test_outputs_outside_the_range_are_seen_and_moved():
    layer = Layer("body.0", nn.Conv2d(1, 1, 1), nn.Sigmoid(), (1, 1, 1))
    y = torch.tensor([-0.1, 0, 0.5, 1, 2])
    assert layer.outside(y, 0).tolist() == [True, True, False, True, True]
    assert layer.outside(torch.tensor([0.01, 0.5]), 0.1).tolist() == [True, False]
    assert layer.invert(layer.clip(y)).isfinite().all()


def test_every_target_is_a_chain():
    for name in TARGETS:
        model = build_model(name, num_classes=10, image_size=32)
        layers = chain(model, (3, 32, 32), "hybrid")
        assert [layer.name for layer in layers][-1] == "fc" and layers[0].shape[0] in (3, 3 * 32 * 32)
        assert layers[-1].unknowns == model.num_features


@pytest.mark.parametrize(
    "name, options, named",
    [
        ("convnet", {"width": 4}, r"'body.1' \(BatchNorm2d\)"),
        ("resnet20_4", {"width": 4}, r"'body.1' \(BatchNorm2d\)"),
        ("lenet", {"activation": "relu"}, r"'body.1' \(ReLU\)"),
        ("vit", {"image_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 1}, "VisionTransformer"),
    ],
)
def test_what_cannot_be_taken_apart_is_named(name, options, named):
    with pytest.raises(UserError, match=named):
        chain(build_model(name, num_classes=10, **options), (3, 32, 32), "hybrid")
