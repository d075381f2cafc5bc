"""The attacks ours are timed against: a package called as its users call it, and two loops written anew.

Every peer is a function whose `tick` is called once per iteration (benchmarks/interleaved_timing.py).
"""

import copy
import io
import warnings
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy, mse_loss
from torchvision.models import resnet50

from attacks.label_recovery import first_labels
from attacks.matching.initialization import first_images
from attacks.matching.priors import total_variation
from attacks.threat_model.leak import Leak
from utils.errors import UserError


def unfused(model: nn.Module) -> nn.Module:
    """Return a copy whose attention has a second derivative."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def breaching(leak: Leak, generator: torch.Generator, tick: Callable, *, iterations: int, tv: float) -> Tensor:
    """Return the reconstruction (1, C, H, W) by the attacker class of the breaching package, 'invertinggradients'."""
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            from breaching import get_attack_config
            from breaching.attacks import prepare_attack

            options = [f"optim.max_iterations={iterations}", f"regularization.total_variation.scale={tv}"]
            config = get_attack_config("invertinggradients", options)
    except ImportError as error:
        raise UserError(f"the peer is missing ({error}): pip install breaching, or choose others by --only") from error
    model = unfused(leak.model)
    model.register_forward_pre_hook(lambda module, inputs: tick())
    about = SimpleNamespace(shape=leak.image_shape, mean=leak.mean, std=leak.std, modality="vision")
    payload = {"parameters": [*model.parameters()], "buffers": [*model.buffers()], "metadata": about}
    client = {"num_data_points": 1, "labels": leak.labels, "local_hyperparams": None}
    shared = {"gradients": [*leak.gradients.values()], "buffers": None, "metadata": client}
    start = first_images(leak, "randn", 1, generator)[0]
    attacker = prepare_attack(model, nn.CrossEntropyLoss(), config)
    return attacker.reconstruct([payload], [shared], {}, initial_data=start)[0]["data"]


def textbook_dlg(leak: Leak, generator: torch.Generator, tick: Callable, *, calls: int) -> Tensor:
    """Run DLG as its authors do: a closure with two backward passes in torch.optim.LBFGS, 20 gradients per call."""
    model, classes = leak.model, next(reversed(leak.gradients.values())).numel()
    images = first_images(leak, "randn", 1, generator)[0].requires_grad_()
    logits = first_labels(leak, "joint", classes, 1, generator)[0].requires_grad_()
    optimizer = torch.optim.LBFGS([images, logits])

    def closure() -> Tensor:
        tick()
        optimizer.zero_grad()
        loss = -(logits.softmax(dim=1) * model(images).log_softmax(dim=1)).sum(dim=1).mean()
        gradients = torch.autograd.grad(loss, [*model.parameters()], create_graph=True)
        distance = sum(((a - b) ** 2).sum() for a, b in zip(gradients, leak.gradients.values(), strict=True))
        distance.backward()
        return distance

    for _ in range(calls):
        optimizer.step(closure)
    return images.detach()


def official_gradvit(leak: Leak, file: str, generator: torch.Generator, tick: Callable, *, second_half: bool) -> None:
    """Repeat an iteration of the gradvit folder of the MJP code, written anew; 120,000 of them there.

    It builds the ResNet-50 and reads its file every time, evaluates it also while its weight is 0, draws a new random
    patch embedding for the patch prior, and differentiates for all parameters of the victim and the ResNet. Unlike the
    original, it has the true label, evaluation mode, all BatchNorm layers and our total variation, so that the terms
    common with `gradvit` are equal; none of that costs time.
    """
    images = first_images(leak, "uniform", 1, generator)[0].requires_grad_()
    optimizer = torch.optim.Adam([images], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 120000)
    model = unfused(leak.model)
    weights = {"matching": 2e-3 if second_half else 4e-3, "image": 0.2 if second_half else 0, "extra": 1e-4}
    for _ in range(120000):
        tick()
        model.zero_grad()
        terms = common_terms(leak, model, file, images)
        total = sum(weight * terms[name] for name, weight in weights.items()) + 1e-4 * random_patch_prior(images)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        scheduler.step()


def common_terms(leak: Leak, model: nn.Module, file: str, images: Tensor) -> dict[str, Tensor]:
    """Return the terms `official_gradvit` and `gradvit` share, unweighted."""
    loss = cross_entropy(model(images), leak.labels)
    gradients = torch.autograd.grad(loss, [*model.parameters()], create_graph=True)
    cnn = resnet50()
    cnn.load_state_dict(torch.load(file))
    cnn.eval()
    norms, inputs = [module for module in cnn.modules() if isinstance(module, nn.BatchNorm2d)], []
    for module in norms:
        module.register_forward_hook(lambda module, given, output: inputs.append(given[0]))
    cnn(images)
    image_prior = 0
    for norm, x in zip(norms, inputs, strict=True):
        image_prior = image_prior + mse_loss(x.mean((0, 2, 3)), norm.running_mean)
        image_prior = image_prior + mse_loss(x.var((0, 2, 3), correction=0), norm.running_var)
    return {
        "matching": sum(mse_loss(a, b) for a, b in zip(gradients, leak.gradients.values(), strict=True)),
        "image": image_prior,
        "extra": total_variation(images, border="none") + images.norm(),
    }


def random_patch_prior(images: Tensor) -> Tensor:
    """Return jumps between the facing edges of neighbours, in what a new random patch embedding makes of them."""
    patches = nn.Conv2d(3, 768, 16, stride=16)(images).flatten(2).mT.reshape(1, 14, 14, 3, 16, 16)
    total = 0
    for k in range(13):
        total = total + mse_loss(patches[:, k + 1, :, :, 0], patches[:, k, :, :, 15])
        total = total + mse_loss(patches[:, :, k + 1, ..., 0], patches[:, :, k, ..., 15])
    return total


def bare(leak: Leak, *, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
    """Map images (B, C, H, W) to d (1 - cosine) / d images by forward, backward and backward, and nothing else."""
    model = unfused(leak.model).to(dtype)
    parameters, targets = [*model.parameters()], [value.to(dtype) for value in leak.gradients.values()]

    def slope(images: Tensor) -> Tensor:
        images = images.to(dtype).detach().requires_grad_()
        gradients = torch.autograd.grad(cross_entropy(model(images), leak.labels), parameters, create_graph=True)
        return torch.autograd.grad(cosine_distance(gradients, targets), images)[0]

    return slope


def bare_compiled(leaks: list[Leak]) -> Callable[[Tensor], Tensor]:
    """Map images (V, B, C, H, W) to the same for V victims of one model, vectorised and compiled."""
    model, labels = leaks[0].model, torch.stack([leak.labels for leak in leaks])
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    targets = [torch.stack([leak.gradients[name] for leak in leaks]) for name in parameters]

    def distance(images: Tensor, label: Tensor, target: list[Tensor]) -> Tensor:
        gradients = grad(lambda own: cross_entropy(functional_call(model, own, images), label))(parameters)
        return cosine_distance(gradients.values(), target)

    slopes = torch.compile(vmap(grad(distance)), dynamic=False)
    return torch.no_grad()(lambda images: slopes(images, labels, targets))


def cosine_distance(gradients: Iterable[Tensor], targets: Iterable[Tensor]) -> Tensor:
    dot = own = other = 0
    for a, b in zip(gradients, targets, strict=True):
        dot, own, other = dot + (a * b).sum(), own + (a * a).sum(), other + (b * b).sum()
    return 1 - dot / (own.sqrt() * other.sqrt())
