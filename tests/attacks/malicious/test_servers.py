"""Malicious servers: what their attacks read is the private batch, and honest models are refused in one line."""

import pytest
import torch

from attacks import ATTACKS
from attacks.malicious import SERVERS
from attacks.malicious.sending import sent_model
from attacks.malicious.server import POWERS, Knowledge
from attacks.threat_model.client import prepare, share
from attacks.threat_model.leak import LocalSteps
from models import build_model
from models.jigsaw import Jigsaw, patchify
from models.partial import Adapters
from utils.errors import UserError

SCALE = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
VIT = {"image_size": 16, "patch_size": 4, "embed_dim": 72, "depth": 3, "num_heads": 3, "num_classes": 12}


def pictures(number: int, seed: int = 0) -> torch.Tensor:
    """Return 8-bit pictures of different brightness (n, 3, 16, 16), normalised."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 100, (number, 3, 16, 16), generator=generator)
    bright = torch.randint(0, 156, (number, 1, 1, 1), generator=generator)
    return ((noise + bright) / 255 - 0.5) / 0.5


def round_of(server: str, options: dict, *, model=None, number=6, ratio=0.0, dtype=torch.float32, labels=None):
    """Return (the private batch, what its client shares with the server)."""
    model = (model or build_model("vit", **VIT)).eval().to(dtype)
    knowledge = Knowledge((3, 16, 16), **SCALE, public=pictures(400, seed=1).to(dtype))
    sent = SERVERS[server](**options).tamper(model, knowledge, generator=torch.Generator().manual_seed(0)).eval()
    labels = torch.arange(number) if labels is None else labels
    jigsaw = Jigsaw(model.grid, ratio, "uniform", seed=0)
    private = prepare(sent, pictures(number).to(dtype), labels, jigsaw, 0)
    return private, share(sent, private, lambda gradients, step: gradients, False, **SCALE)


def read(leak, name: str, **options):
    return ATTACKS[name](leak, generator=torch.Generator().manual_seed(0), **options)


def distance(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Return the largest pixel error of the nearest found picture, for each true one (B,)."""
    return (found.double()[None] - truth.double()[:, None]).abs().flatten(2).amax(dim=2).amin(dim=1)


def cnn():
    return build_model("lenet", num_classes=12, image_size=16)


@pytest.mark.parametrize("model", [None, cnn])
@pytest.mark.parametrize("options", [{}, {"structure": "sparse"}, {"disguise": 1.0}, {"functional": "random"}])
def test_an_imprint_block_gives_back_images_that_are_alone_in_a_bin(model, options):
    private, leak = round_of("imprint", {"bins": 100} | options, model=model and model())
    result = read(leak, "imprint")
    near = distance(result.images, private.model_input) < 1e-2
    assert int(near.sum()) >= result.diagnostics["claimed"] >= 3
    assert (
        distance(private.model_input, result.images[: result.diagnostics["claimed"]]).max() < 1e-2
    )  # no claim is false
    assert result.images.shape == (6, 3, 16, 16)


def test_trap_rows_give_back_images_too():
    private, leak = round_of("trap_weights", {"rows": 300})
    result = read(leak, "imprint")
    claimed = result.diagnostics["claimed"]
    assert claimed >= 2 and distance(private.model_input, result.images[:claimed]).max() < 1e-2


def test_one_bin_for_many_images_holds_one_of_them_or_claims_nothing():
    private, leak = round_of("imprint", {"structure": "one_shot", "expected_images": 6})
    result = read(leak, "imprint")
    assert result.diagnostics["claimed"] <= 3
    assert SERVERS["imprint"](structure="one_shot", expected_images=6).guarantee(6) == pytest.approx((5 / 6) ** 5 / 6)


def test_mjp_hides_where_patches_belong_and_nothing_of_what_they_show():
    private, leak = round_of("imprint", {"bins": 100}, model=build_model("vit", unknown=True, **VIT), ratio=0.6)
    result = read(leak, "imprint")
    assert result.diagnostics["claimed"] >= 3
    assert distance(private.model_input, result.images[: result.diagnostics["claimed"]]).max() < 1e-2
    assert distance(result.images, private.images).min() > 0.1  # in the client's order, not the picture's


def test_bins_of_places_put_pictures_together_by_their_mean():
    private, leak = round_of("imprint", {"bins": 60, "reads": "place"}, number=2, dtype=torch.float64)
    result = read(leak, "imprint")
    found, truth = (patchify(images, 4) for images in (result.images, private.model_input))
    right = (found[:, None] - truth[None]).abs().amax(dim=3) < 1e-6  # (F, B, N)
    assert right.any(dim=1).double().mean() > 0.8  # patches in their place
    for picture in right:  # none of another picture stands among them
        assert sorted(picture.sum(dim=1).tolist())[0] == 0


def test_adapter_bins_read_visible_and_hidden_patches():
    for ratio in (0.0, 0.5):
        model = build_model("vit", unknown=True, **VIT)
        adapted = Adapters(rank=72).apply(model, 0)
        options = {"unknown": 0.25} if not ratio else {}
        private, leak = round_of("adapter_imprint", options, model=adapted, number=1, ratio=ratio, dtype=torch.float64)
        assert all(".adapter." in name for name in leak.gradients)
        result = read(leak, "adapter_imprint")
        found, truth = (patchify(images, 4)[0] for images in (result.images, private.model_input))
        hidden = private.mask[0]
        assert ((found - truth).abs().amax(dim=1) < 1e-6)[~hidden].double().mean() > 0.9
        if ratio:
            nearest = (found[None] - truth[hidden][:, None]).abs().amax(dim=2).amin(dim=1)
            assert int((nearest < 1e-6).sum()) >= 3  # patches of one picture crowd: they are alike in brightness
            assert not result.diagnostics["exact"]  # hidden places are not known


def test_fishing_for_a_class_isolates_its_only_image_exactly():
    private, leak = round_of("class_fishing", {"target": 4}, dtype=torch.float64)
    result = read(leak, "fishing")
    assert result.diagnostics["passed"] == pytest.approx(1, abs=1e-9) and result.diagnostics["isolated_exact"]
    assert (result.images[0] - private.model_input[4]).abs().max() < 1e-6
    assert not result.images[1:].any()


def test_fishing_counts_what_passes_and_reconstructs_nothing_of_several():
    labels = torch.tensor([4, 4, 1, 2, 3, 5])
    for target, passed in ((4, 2), (9, 0)):
        result = read(round_of("class_fishing", {"target": target}, labels=labels)[1], "fishing")
        assert result.diagnostics["passed"] == pytest.approx(passed, abs=1e-3) and not result.images.any()


def test_fishing_for_a_feature_isolates_the_image_beyond_the_threshold():
    counts = []
    for batch in range(1, 5):
        options = {"target": 11, "expected_images": 2 * batch}
        leak = round_of("feature_fishing", options, dtype=torch.float64)[1]
        counts.append(read(leak, "fishing").diagnostics["passed"])
    assert all(abs(count - round(count)) < 0.05 for count in counts)  # saturated: whole images pass
    assert counts == sorted(counts, reverse=True) and counts[0] > 0  # fewer, the higher the threshold


@pytest.mark.parametrize("structure", ["cumulative", "sparse"])
def test_local_steps_hide_small_gradients_in_rounding_and_nothing_false_is_claimed(structure):
    private, leak = round_of("imprint", {"bins": 100, "structure": structure})
    for rate in (1e-3, 1e-1):
        update = share(
            leak.model, private, lambda gradients, step: gradients, False, local=LocalSteps(3, rate, 2), **SCALE
        )
        result = read(update, "imprint")
        claimed = result.diagnostics["claimed"]
        assert result.images.shape == (6, 3, 16, 16) and result.images.isfinite().all()
        assert not claimed or distance(private.model_input, result.images[:claimed]).max() < 1e-2


@pytest.mark.parametrize("attack", ["imprint", "adapter_imprint", "fishing"])
def test_honest_models_are_refused(attack):
    private, leak = round_of("honest", {})
    with pytest.raises(UserError, match="--server"):
        read(leak, attack)


@pytest.mark.parametrize("name", SERVERS)
def test_servers_leave_the_agreed_model_alone_and_say_who_they_are(name):
    model = build_model("vit", **VIT)
    share_name = "adapters" if name == "adapter_imprint" else "all"
    rank = {"rank": 72} if name == "adapter_imprint" else {}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    terms = {"server_options": {}, "share_options": rank, "seed": 0, "public": pictures(200, seed=1)}
    sent, rows = sent_model(model, server=name, share=share_name, **terms, **SCALE)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    kind = SERVERS[name]
    assert kind.power in POWERS and (name == "honest") == (kind.power == "honest")
    assert name == "honest" or rows["attacker"].startswith("malicious server")
    assert sent(pictures(2)).isfinite().all()


@pytest.mark.parametrize(
    "server, options, words",
    [
        ("imprint", {"bins": 1}, "--server_options.bins must be 2 or more, got 1"),
        ("imprint", {"reads": "pixel"}, "--server_options.reads must be image or patch or place, got pixel"),
        ("imprint", {"gain": 0.0}, "--server_options.gain must be above 0"),
        ("trap_weights", {"scale": 0.0}, "--server_options.scale must be above 0"),
        ("class_fishing", {"kept": 2.0}, "--server_options.kept must be from 0 to 1"),
        ("feature_fishing", {"slope": 0.0}, "--server_options.slope must be above 0"),
        ("adapter_imprint", {"unknown": 1.0}, "--server_options.unknown must be between 0 and 1"),
    ],
)
def test_wrong_options_are_refused_in_one_line(server, options, words):
    with pytest.raises(UserError) as error:
        SERVERS[server](**options)
    assert words in str(error.value)


def test_servers_refuse_models_they_cannot_change():
    with pytest.raises(UserError, match="--share adapters"):
        SERVERS["adapter_imprint"]().check(build_model("vit", **VIT))
    with pytest.raises(UserError, match="share_options.rank"):
        SERVERS["adapter_imprint"]().check(Adapters(rank=4).apply(build_model("vit", **VIT), 0))
    with pytest.raises(UserError, match="below 12"):
        SERVERS["class_fishing"](target=12).check(build_model("vit", **VIT))
