"""What a stranger's network cannot do is said in one line before a campaign, with the network's own error."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attacks import ATTACKS, attack_together
from attacks.label_recovery import classifier_of
from attacks.threat_model.applicable import unmet_requirement
from attacks.threat_model.client import Client
from attacks.threat_model.local_step import classes_of
from attacks.threat_model.rehearsal import rehearse
from defenses import build_defense
from defenses.base import Defense
from models.external import adopt
from models.jigsaw import Jigsaw
from utils.errors import UserError


class Plain(nn.Module):
    """A small network for 8 x 8 pictures; its kinds below each do one thing that networks of strangers do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, stride=4)
        self.norm = nn.BatchNorm1d(16)
        self.fc = nn.Linear(16, 5)

    def body(self, images: Tensor) -> Tensor:
        return self.conv(images).sigmoid().flatten(1)

    def forward(self, images: Tensor):
        return self.fc(self.body(images))


class Viewed(Plain):
    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.conv(images).sigmoid().view(1, -1))


class Pooled(Plain):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).mean(dim=0, keepdim=True)


class Normed(Plain):
    def body(self, images: Tensor) -> Tensor:
        return self.norm(super().body(images))


class Constant(Plain):
    def forward(self, images: Tensor) -> Tensor:
        return self.fc.bias.expand(len(images), -1)


class Detached(Plain):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).detach()


class Rooted(Plain):  # sqrt has no derivative at 0
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + (0 * self.fc.bias).sqrt()


class Named(Plain):  # a dict in training mode alone, as networks with auxiliary classifiers give
    def forward(self, images: Tensor):
        logits = super().forward(images)
        return {"logits": logits} if self.training else logits


class InPlace(Plain):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.mul_(2))


class Blind(Plain):
    """Features of a frozen encoder, as linear probes have them."""

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            seen = self.body(images)
        return self.fc(seen)


class Reentrant(Plain):
    def forward(self, images: Tensor) -> Tensor:
        return checkpoint(self.fc, self.body(images), use_reentrant=True)


def client_of(kind: type[nn.Module], defense: str = "none", **terms) -> Client:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind().double()
    adopt(model, "net.py:net", 8)
    terms = {"reveal_labels": True, "mean": (0.0,) * 3, "std": (1.0,) * 3} | terms
    return Client(model, Jigsaw(model.grid, 0.0), build_defense(defense, {}), 0, terms, [])


@pytest.mark.parametrize(
    "kind, size, terms, words",
    [
        (Viewed, 2, {}, "on 2 images in evaluation mode (RuntimeError: mat1 and mat2 shapes"),
        (Pooled, 3, {}, "the model must map 3 inputs to logits (3, 5), and gives (1, 5)"),
        (Normed, 1, {"training": True}, "BatchNorm cannot train on one value per channel"),
        (Named, 2, {"training": True}, "to logits (2, 5), and gives dict"),
        (Constant, 2, {}, "gives the same gradient for two different batches"),
        (Detached, 2, {}, "in evaluation mode (RuntimeError: element 0 of tensors does not require grad"),
        (Rooted, 2, {}, "gives a gradient that is NaN or infinite (of 'fc.bias')"),
        (Viewed, 4, {"local": (2, 0.1, 2)}, "on 2 images in evaluation mode"),
    ],
)
def test_a_step_that_fails_is_one_line(kind, size, terms, words):
    with pytest.raises(UserError) as raised:
        rehearse(client_of(kind, **terms), [size])
    assert words in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of a forward pass alone
def test_what_a_client_can_train_passes():
    for kind, size, terms in (
        (Viewed, 1, {}),
        (Viewed, 2, {"local": (2, 0.1, 1)}),
        (Normed, 2, {"training": True}),
        (Normed, 1, {}),
        (Named, 1, {}),
        (InPlace, 2, {}),
        (Reentrant, 2, {}),
    ):
        rehearse(client_of(kind, **terms), [size])


def test_zero_classifiers_still_leak():
    """Logits that are 0 for every image do not mean that the gradient is the same for every image."""
    client = client_of(Plain)
    nn.init.zeros_(client.model.fc.weight)
    rehearse(client, [2])


def test_a_batch_too_small_for_the_defence_is_found_before_it_comes():
    with pytest.raises(UserError, match="mixes 4 images of a batch, and this one has 3"):
        rehearse(client_of(Plain, "mixup"), [8, 3])


class SeenError(Exception):
    """Ends a rehearsal once the defence has been called."""


class Watching(Defense):
    """A defence that notes where what it is given lies."""

    def images(self, *tensors, **terms):
        self.devices = {tensor.device for tensor in tensors}
        raise SeenError


def test_the_defence_gets_images_and_labels_where_the_model_is():
    client = replace(client_of(Plain), defense=Watching())
    client.model.to("meta")
    with pytest.raises(SeenError):
        rehearse(client, [2])
    assert client.defense.devices == {torch.device("meta")}


def test_a_network_may_change_its_input():
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    before = images.clone()
    changed, plain = (client_of(kind).round(0, 1.0 * images, ["", ""]) for kind in (InPlace, Plain))
    assert changed.private.images.equal(before) and changed.private.model_input.equal(before)
    doubled = client_of(Plain).round(0, 2.0 * images, ["", ""])
    assert changed.leak.gradients["fc.weight"].equal(doubled.leak.gradients["fc.weight"])
    assert not changed.leak.gradients["fc.weight"].equal(plain.leak.gradients["fc.weight"])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("kind, error", [(InPlace, "in-place"), (Reentrant, "use_reentrant")])
def test_a_network_that_cannot_be_matched_is_one_line(kind, error):
    rounds = [client_of(kind).round(0, torch.rand(2, 3, 8, 8, dtype=torch.float64), ["", ""])]
    with pytest.raises(UserError) as raised:
        attack_together(ATTACKS["inverting_gradients"], rounds, None, {"iterations": 1, "restarts": 1})
    assert "model 'net.py:net' fails under this attack (RuntimeError: " in str(raised.value)
    assert error in str(raised.value) and "\n" not in str(raised.value)


def test_a_network_that_lets_no_gradient_through_is_said_to_before_the_work():
    """Matching would return its start, and the report would say that no image comes back."""
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    leak = client_of(Blind).round(0, images, ["", ""]).leak
    assert "runs under torch.no_grad() or is detached" in unmet_requirement("dlg", leak, {})
    with pytest.raises(UserError, match="does not carry them that far"):
        ATTACKS["dlg"](leak, generator=torch.Generator())
    assert not unmet_requirement("dlg", client_of(InPlace).round(0, images, ["", ""]).leak, {})


def test_networks_of_ours_keep_their_traceback():
    client = client_of(InPlace)
    del client.model.spec
    rounds = [client.round(0, torch.rand(1, 3, 8, 8, dtype=torch.float64), [""])]
    with pytest.raises(RuntimeError):
        attack_together(ATTACKS["inverting_gradients"], rounds, None, {"iterations": 1, "restarts": 1})


def test_what_a_pass_tells_of_a_network_is_asked_once_until_it_changes():
    model, passes = Plain(), []
    model.register_forward_hook(lambda *_: passes.append(1))
    for _ in range(2):
        assert (classes_of(model, (3, 8, 8)), classifier_of(model, (3, 8, 8))) == (5, "fc")
    assert len(passes) == 2
    model.fc = nn.Linear(16, 7)
    assert classes_of(model, (3, 8, 8)) == 7
