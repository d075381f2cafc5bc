"""models/convnets.py and ResNet-18: the victims of the attack papers, weight for weight, and their derivatives."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, replace_all_batch_norm_modules_, vmap
from torchvision.models.resnet import BasicBlock

from models import build_model
from models.convnets import ACTIVATIONS
from utils.errors import UserError

SMALL = {
    "lenet": {},
    "convnet": {"width": 4},
    "resnet20_4": {"width": 4},
    "resnet32_10": {"width": 4},
    "resnet18": {"image_size": 32, "patch_size": 4},
    "resnet20_4_unpooled": {"width": 4},
    "mlp": {"width": 8},
    "densenet40": {"growth": 2},
    "irevnet": {"width": 4, "blocks": 2, "dropout": 0.0},
}


def build(name: str, dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    """A small model with ten classes; BatchNorm has seen images that are not quite normalised."""
    model = build_model(name, num_classes=10, **{**SMALL[name], **options}).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(std=0.1, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def pictures(number: int, channels: int = 3, side: int = 32) -> Tensor:
    return torch.randn(number, channels, side, side, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def count(name: str, **options) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(name, num_classes=10, **options).parameters())


@pytest.mark.parametrize("name", SMALL)
def test_the_interface(name):
    model = build(name)
    logits = model(pictures(2), None)
    assert logits.shape == (2, 10) and logits.std() > 0
    assert model.features(pictures(2)).shape == (2, model.num_features)
    torch.testing.assert_close(model.fc(model.features(pictures(2))), logits)
    assert (model.hides_positions, model.grid, model.patch_size) == (False, (8, 8), 4)
    assert model.arguments == {"name": name, "num_classes": 10, "image_size": 32, **SMALL[name]}
    assert build(name, patch_size=8).grid == (4, 4)


@pytest.mark.parametrize("name", ["lenet", "convnet", "resnet20_4", "resnet32_10"])
def test_weights_follow_the_seed(name):
    one, same, other = (build_model(name, **SMALL[name], seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(same[key].equal(one[key]) for key in one)
    assert not other["fc.weight"].equal(one["fc.weight"])


def test_sizes_are_those_of_the_papers():
    assert count("convnet") == 2_904_970
    assert count("resnet20_4", width=16) == 272_474  # ResNet-20 with projections, 0.27 M in He et al.
    assert count("resnet32_10", width=16) == 466_906
    assert count("lenet") == 12 * (75 + 300 + 300) + 36 + 7690
    assert count("lenet", in_chans=1, image_size=28) == 12 * (25 + 300 + 300) + 36 + 5890  # 588 features


def test_victims_of_inverting_gradients_by_name():
    """Parameters counted from the published definitions, for ten classes."""
    for depth, blocks in {20: 3, 32: 5, 44: 7, 56: 9, 110: 18}.items():
        assert count(f"resnet{depth}") == resnet_parameters(16, blocks), depth
    assert count("resnet20_10") == resnet_parameters(160, 3) and count("resnet28_10") == resnet_parameters(160, 4)
    assert count("resnet20_nostride") == count("resnet20") and count("resnet20_4_unpooled") == count("resnet20_4")
    assert count("mlp") == 3072 * 1024 + 2 * 1024**2 + 3 * 1024 + 10250
    assert count("mlp2") == 3072 * 2048 + 2048 + 20490
    assert count("irevnet") == irevnet_parameters()
    assert count("densenet40") == densenet_parameters(12) and count("densenet40_4") == densenet_parameters(48)


def resnet_parameters(width: int, blocks: int) -> int:
    stem, total = 27 * width + 2 * width, 0
    for stage in range(3):
        after = width << stage
        before = after if stage == 0 else after // 2
        first = 9 * before * after + 9 * after**2 + 4 * after + (before * after + 2 * after) * (stage > 0)
        total += first + (blocks - 1) * (18 * after**2 + 4 * after)
    return stem + total + 4 * width * 10 + 10


def densenet_parameters(growth: int) -> int:
    channels = 2 * growth
    total = 27 * channels
    for block in range(3):
        for _ in range(6):
            total += 2 * channels + channels * 4 * growth + 8 * growth + 9 * 4 * growth**2
            channels += growth
        if block < 2:
            total += 2 * channels + channels * (channels // 2)
            channels //= 2
    return total + 2 * channels + 10 * channels + 10


@torch.no_grad()
def test_irevnet_can_be_inverted():
    """Backwards through its blocks the image comes back, and the channels that were empty are."""
    body, images = build("irevnet").body, pictures(2)
    one, other = body.halves(images)
    assert one.shape == other.shape == (2, 64, 8, 8)
    for block in reversed(body.blocks):
        before = nn.functional.pixel_shuffle(one, block.stride)
        one, other = nn.functional.pixel_shuffle(other - block.branch(before), block.stride), before
    found = torch.cat([one, other], dim=1)
    torch.testing.assert_close(found[:, :3], images, rtol=0, atol=1e-10)
    assert found[:, 3:].abs().max() < 1e-10


def irevnet_parameters() -> int:
    """Of CIFAR's with ten classes: 18 blocks in each of three stages, of 16, 64 and 256 channels a half."""
    total, before = 0, 16
    for stage in range(3):
        after = 16 * 4**stage
        for place in range(18):
            inner = after // 4
            total += 2 * before * (stage + place > 0) + 9 * (before * inner + inner**2 + inner * after) + 4 * inner
            before = after
    return total + 4 * 256 + 10 * 512 + 10


def test_unpooled_takes_the_maximum_and_nostride_keeps_the_side():
    mean, largest = (build_model(name, width=2).eval() for name in ("resnet20_4", "resnet20_4_unpooled"))
    largest.load_state_dict(mean.state_dict())
    maps = mean.body[:-2](pictures(2).float())
    assert maps.shape[-1] == 8
    torch.testing.assert_close(largest.features(pictures(2).float()), maps.amax(dim=(2, 3)))
    torch.testing.assert_close(mean.features(pictures(2).float()), maps.mean(dim=(2, 3)))
    assert build_model("resnet20_nostride", width=2).eval().body[:-2](pictures(1).float()).shape[-1] == 32


@pytest.mark.parametrize("side", [26, 27, 28, 29])
def test_lenet_takes_pictures_of_any_side(side):
    model = build("lenet", image_size=side, patch_size=1, in_chans=1)
    assert model(pictures(1, 1, side)).shape == (1, 10)
    assert model.grid == (side, side)


def test_lenet_starts_uniform_in_weights_and_biases():
    for name, parameter in build_model("lenet", num_classes=100).named_parameters():
        assert parameter.abs().max() <= 0.5
        assert parameter.abs().max() > 0.4 - 1 / len(parameter), name
    weight = build_model("lenet", num_classes=100).fc.weight
    assert weight.mean().abs() < 0.005
    assert weight.std().item() == pytest.approx(12**-0.5, rel=0.01)


def test_lenets_activation_is_a_choice():
    for name, activation in ACTIVATIONS.items():
        model, values = build("lenet", activation=name), torch.linspace(-3, 3, 7)
        for place in (1, 3, 5):
            expected = getattr(torch.nn.functional, name)(values)
            assert activation()(values).equal(expected) and model.body[place](values).equal(expected)
    assert isinstance(build("lenet").body[5], nn.Sigmoid)
    with pytest.raises(UserError, match="did you mean 'sigmoid'"):
        build("lenet", activation="sigmod")


def test_lenets_gradients_are_the_published_ones(golden):
    reference = golden("dlg")
    model = build_model("lenet", num_classes=100)
    weights = {key[3:].replace("fc.0.", "fc."): torch.tensor(value) for key, value in reference.items() if "sd/" in key}
    model.load_state_dict(weights)
    model.double()
    image = (torch.tensor(reference["image"]).permute(2, 0, 1)[None] / 255).double()
    loss = nn.functional.cross_entropy(model(image), torch.tensor(reference["label"]))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
        expected = torch.tensor(reference[f"grad/{name.replace('fc.', 'fc.0.')}"])
        gradient = gradient[::10] if name == "fc.weight" else gradient  # every tenth row is stored
        rtol = 1e-9 if expected.dtype == torch.float64 else 1e-6
        torch.testing.assert_close(gradient, expected.double(), rtol=rtol, atol=rtol * float(expected.abs().max()))


def test_convnet_is_eight_convolutions_and_two_poolings():
    model = build("convnet")
    kinds = [type(layer) for layer in model.body]
    stage = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert kinds == [*stage * 6, nn.MaxPool2d, *stage * 2, nn.MaxPool2d, nn.Flatten]
    convolutions = [layer for layer in model.body if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [4, 8, 8, 16, 16, 16, 16, 16]
    assert all(layer.kernel_size == (3, 3) and layer.bias is not None for layer in convolutions)
    assert build_model("convnet", num_classes=10).num_features == 2304


@pytest.mark.parametrize(("name", "blocks"), [("resnet20_4", 3), ("resnet32_10", 5)])
def test_the_resnets_for_small_pictures_are_made_of_torchvisions_blocks(name, blocks):
    def stage(before: int, after: int, stride: int) -> list[nn.Module]:
        shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        first = BasicBlock(before, after, stride, shortcut if stride > 1 else None)
        return [first, *(BasicBlock(after, after) for _ in range(blocks - 1))]

    stem = [nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    stages = [*stage(4, 4, 1), *stage(4, 8, 2), *stage(8, 16, 2)]
    body = nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double().eval()
    model = build(name)
    body.load_state_dict(model.body.state_dict())
    torch.testing.assert_close(model.features(pictures(2)), body(pictures(2)), rtol=1e-12, atol=1e-12)


def test_an_untrained_resnet18_has_gradients_everywhere():
    for options, everywhere in (({}, True), ({"zero_init_last": True}, False)):
        model = build("resnet18", **options)
        gradients = torch.autograd.grad(model(pictures(2)).square().sum(), list(model.parameters()))
        assert all(gradient.any() for gradient in gradients) is everywhere


def test_resnets_for_small_pictures_start_as_wide_as_their_outputs():
    for layer in build_model("resnet20_4", num_classes=10).body.modules():
        if isinstance(layer, nn.Conv2d):
            expected = (2 / (layer.out_channels * layer.kernel_size[0] ** 2)) ** 0.5
            assert layer.weight.std().item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_matching_gradients_vectorises_over_problems(name, training):
    """The derivative of an attack: of a distance between gradients, for several batches at once."""
    model = build(name).train(training)
    if training:
        replace_all_batch_norm_modules_(model)  # statistics of the batch, none kept
    parameters = {key: value.detach() for key, value in model.named_parameters()}
    labels = torch.tensor([3, 1])

    def loss(parameters: dict, images: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, parameters, (images,)), labels)

    def size(images: Tensor) -> Tensor:
        return sum(value.square().sum() for value in grad(loss)(parameters, images).values())

    images = pictures(6).unflatten(0, (3, 2))
    together = vmap(grad(size))(images)
    for problem in range(3):
        variable = images[problem].clone().requires_grad_()
        weights = list(model.parameters())
        loss_value = nn.functional.cross_entropy(model(variable), labels)
        gradients = torch.autograd.grad(loss_value, weights, create_graph=True)
        (alone,) = torch.autograd.grad(sum(value.square().sum() for value in gradients), variable)
        assert alone.abs().max() > 0
        torch.testing.assert_close(together[problem], alone, rtol=1e-7, atol=1e-9 * float(alone.abs().max()))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"drop_path": 0.1}, "set drop_path to 0"),
        ({"unknown": True}, "has no positions to hide, so MJP .* is not for it: take a ViT"),
        ({"widht": 3}, "has no option 'widht'"),
        ({"image_size": 0}, "image_size must be a whole number of at least 1, got 0"),
        ({"num_classes": 0}, "num_classes must be a whole number of at least 1, got 0"),
        ({"image_size": 30}, "not divisible by patch_size 4: choose 28"),
    ],
)
@pytest.mark.parametrize("name", ["lenet", "convnet", "resnet20_4"])
def test_what_these_networks_do_not_have_is_refused(name, options, problem):
    with pytest.raises(UserError, match=problem):
        build_model(name, **SMALL[name] | options)


@pytest.mark.parametrize("name", ["convnet", "resnet20_4"])
def test_a_network_without_values_is_refused_and_nothing_is_warned_of(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match="has no values, shape .*: raise its sizes"):
            build_model(name, **SMALL[name] | {"width": 0})
