"""Batches, masked puzzles and ViTs of any kind of position, by one eigenvalue problem."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from attacks.joint.block import PATCHES, Places, affine, prefix_tokens
from attacks.joint.diagonal import Tokens, tokens_of
from attacks.joint.forms import batch_forms, merged_forms
from attacks.joint.joint import joint
from attacks.joint.placement import free_places, placed_tokens, with_mask
from attacks.joint.polish import polished
from attacks.joint.search import token_solver
from attacks.linear.mjp_equations import CERTAIN, centre
from attacks.linear.row_spaces import rows_of, with_bias
from attacks.threat_model.client import Client, prepare, share
from attacks.threat_model.terms import Terms
from defenses import build_defense
from eval.assignment import match_batch
from models.jigsaw import Jigsaw, patchify
from tests.attacks.small_victims import MEAN, STD, UNDEFENDED, client, generator, vit
from tests.attacks.timm_victims import of_timm
from utils.errors import UserError

SMALL = {"image_size": 24, "embed_dim": 96, "num_heads": 3}  # nine patches


def pictures(number: int, seed: int = 0, side: int = 24) -> Tensor:
    """Smooth colours with texture, normalised: patches of full rank, unlike those of a bilinear picture."""
    own = generator(seed)
    coarse = torch.rand(number, 3, 4, 4, generator=own, dtype=torch.float64)
    fine = torch.rand(number, 3, side, side, generator=own, dtype=torch.float64)
    pixels = 0.7 * nn.functional.interpolate(coarse, size=side, mode="bilinear") + 0.3 * fine
    return normalised(pixels)


def normalised(pixels: Tensor) -> Tensor:
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def bordered(images: Tensor, value: float = 1.0) -> Tensor:
    """The images with a border of one colour, a patch wide."""
    framed = torch.full_like(images, 1.0) * normalised(torch.full_like(images[:1], value))
    framed[..., 8:-8, 8:-8] = images[..., 8:-8, 8:-8]
    return framed


def leaked(model: nn.Module, images: Tensor, ratio: float = 0.0, seed: int = 0, **terms):
    labels = torch.arange(len(images)) % 5
    dtype = next(model.parameters()).dtype
    private = prepare(model, images.to(dtype), labels, Jigsaw(model.grid, ratio, "uniform", seed=seed), 0)
    return private, share(model, private, UNDEFENDED, True, mean=MEAN, std=STD, **terms)


def in_place(found, private) -> Tensor:
    """(B, N): largest error of a pixel of every patch, images matched."""
    images = found.images[match_batch(found.images, private.model_input)]
    return (patchify(images, 8) - patchify(private.model_input.double(), 8)).abs().amax(dim=2)


def as_set(found, private) -> Tensor:
    """(B, N): largest error of a pixel of the patch that is nearest, of the same image."""
    images = found.images[match_batch(found.images, private.model_input)]
    apart = torch.cdist(patchify(private.model_input.double(), 8), patchify(images, 8), p=float("inf"))
    return apart.amin(dim=2)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "tied", "none"])
def test_four_images_behind_one_gradient_come_back(positions):
    private, leak = leaked(vit(positions=positions, **SMALL), pictures(4))
    found = joint(leak, generator=generator())
    told = found.diagnostics
    assert told["tokens"] == told["found"] == told["patches"] == 36 and told["images"] == 4
    assert told["asymmetry"] < 1e-5 and told["link"] < 1e-8
    if positions == "none":  # which patches share an image is known, their order is not
        apart = torch.cdist(patchify(private.model_input, 8).flatten(0, 1), patchify(found.images, 8).flatten(0, 1))
        assert apart.min(dim=1).values.max() < 1e-4
        owner = apart.argmin(dim=1).view(4, 9) // 9
        assert (owner == owner[:, :1]).all() and len(owner.unique()) == 4
    elif positions == "tied":
        assert as_set(found, private).max() < 1e-4
    else:
        assert in_place(found, private).max() < 1e-4
    assert told["exact"] == (positions in ("learned", "sinusoidal")) and told["exact_up_to_order"]


def test_places_are_free_or_taken():
    _, leak = leaked(vit(positions="tied", **SMALL), pictures(2))
    places = Places.of(leak)
    taken = torch.tensor([0, 0, 3])
    every, left = free_places(places, 2), free_places(places, 2, taken)
    assert every.sum() == 18 and (every - left).tolist() == torch.bincount(taken, minlength=len(every)).tolist()
    assert not free_places(places, 2, torch.arange(len(every)).repeat(18)).any()  # more than there are


def test_rotary_positions_leave_a_set_of_patches():
    private, leak = leaked(vit(positions="rotary", **SMALL), pictures(3))
    found = joint(leak, generator=generator())
    apart = torch.cdist(patchify(private.model_input, 8).flatten(0, 1), patchify(found.images, 8).flatten(0, 1))
    assert apart.min(dim=1).values.max() < 1e-4
    assert not found.diagnostics["exact_up_to_order"]  # nor does it know which patches share an image


@pytest.mark.parametrize("case", ["white", "twice", "constant", "black"])
def test_equal_patches_are_counted_once_and_still_placed(case):
    images = pictures(2 + (case == "twice"), side=32)  # 16 patches, 12 of them in the border
    if case in ("white", "black"):
        images = bordered(images, float(case == "white"))
    else:
        images[1] = images[0] if case == "twice" else images[1, :, :1, :1]
    model = vit(**SMALL | {"image_size": 32, "embed_dim": 120})
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.mul_(5)  # attention that looks at something, as trained ones do
    private, leak = leaked(model, images)
    found = joint(leak, generator=generator())
    wanted = {"white": 12 + 8, "black": 12 + 8, "twice": 32, "constant": 32}[case]  # patch and place
    assert found.diagnostics["tokens"] == wanted and found.diagnostics["found"] >= wanted - 1
    assert found.diagnostics["images"] == 2
    if case == "twice":  # the gradient does not say which image is there twice
        assert not found.diagnostics["exact"]
        apart = torch.cdist(private.model_input.flatten(1), found.images.flatten(1))
        assert apart.min(dim=1).values.max() < 1e-2
    else:
        assert in_place(found, private).max() < 1e-2


def test_equal_patches_need_the_gradient_of_the_positions():
    images = bordered(pictures(1, side=32))
    _, leak = leaked(vit(**SMALL | {"image_size": 32}), images, withhold=["pos_embed"])
    with pytest.raises(UserError, match="11 of 17 distinct tokens"):
        joint(leak, generator=generator())


@pytest.mark.parametrize("withhold", [[], ["pos_embed", "unknown_pos_embed"]])
def test_a_masked_batch_comes_back_with_its_mask(withhold):
    model = vit(unknown=True, **SMALL)
    private, leak = leaked(model, pictures(3), ratio=0.34, withhold=withhold)
    found = joint(leak, generator=generator())
    hidden = private.mask[0]
    assert hidden.sum() == 3 and found.diagnostics["found"] == 27
    assert found.diagnostics["exact_up_to_order"] and not found.diagnostics["exact"]
    assert in_place(found, private)[:, ~hidden].max() < 1e-4 and as_set(found, private).max() < 1e-4


@pytest.mark.parametrize("kind", ["photograph", "bordered"])
def test_one_masked_image_beyond_the_bound_of_batches(kind):
    model = vit(unknown=True, image_size=48, embed_dim=60, num_heads=3)  # 36 patches: 2 (N + 1) > D
    images = pictures(1, side=48)
    private, leak = leaked(model, images if kind == "photograph" else bordered(images), ratio=0.34)
    found = joint(leak, generator=generator())
    hidden = private.mask[0]
    distinct = len(patchify(private.model_input, 8)[0, hidden].unique(dim=0))
    assert hidden.sum() == 12 and found.diagnostics["hidden"] == distinct
    assert found.diagnostics["found"] == 24 + distinct and not found.diagnostics["exact"]
    assert in_place(found, private)[:, ~hidden].max() < 1e-3 and as_set(found, private).max() < 1e-3


def test_tokens_that_are_known_are_taken_out_of_the_forms():
    _, leak = leaked(vit(**SMALL), pictures(2))
    places = Places.of(leak)
    forms = batch_forms(leak, places, rows_of(with_bias(leak, PATCHES), 18, torch.float64))
    tokens = tokens_of(forms)
    prefix, _ = prefix_tokens(leak)
    embedded = nn.functional.pad(tokens.patches, (0, 1), value=1.0) @ affine(leak.model.patch_embed.proj).T
    known = centre(torch.cat([prefix, embedded[:11] + tokens.places[:11]]))
    left = tokens_of(forms, known)
    assert len(left.patches) == 7 and not len(tokens_of(forms, forms.entering).patches)
    assert torch.cdist(tokens.patches[11:], left.patches).min(dim=1).values.max() < 1e-4


def test_a_solved_token_is_closer_than_its_eigenvector(monkeypatch):
    asked = []

    def watched(tokens, chosen, *rest):
        asked.append(chosen)
        return polished(tokens, chosen, *rest)

    monkeypatch.setattr(f"{joint.__module__}.polished", watched)
    model = vit(unknown=True, image_size=48, embed_dim=60, num_heads=3)
    private, leak = leaked(model, pictures(1, side=48), ratio=0.34)
    plain, solved = (joint(leak, generator=generator(), polish=polish) for polish in (False, True))
    errors = [as_set(found, private).max() for found in (plain, solved)]
    assert errors[1] < errors[0] / 3 and errors[1] < 1e-5
    visible = int((~private.mask).sum())  # which come first, and are known without
    assert asked[0][visible:].any() and not asked[0][:visible].any()


def test_the_slope_of_a_token_is_that_of_its_equations():
    _, leak = leaked(vit(**SMALL), pictures(2))
    number = 18
    span = rows_of(with_bias(leak, PATCHES), number, torch.float64)
    places = Places.of(leak)
    forms = batch_forms(leak, places, span)
    solver = token_solver(forms, tokens_of(forms).mixed, generator())
    point = 0.01 * torch.randn(len(solver.basis) + len(solver.mixes), generator=generator(), dtype=torch.float64)
    _, slope = solver.residual(point, places.rows[0])
    way = torch.randn(len(point), generator=generator(1), dtype=torch.float64)
    ahead, behind = (solver.residual(point + step * way, places.rows[0], slope=False)[0] for step in (1e-6, -1e-6))
    assert torch.allclose(slope @ way, (ahead - behind) / 2e-6, atol=1e-7)
    # Equations that overflow, as those of 16-bit gradients may, are solved for nobody, and say so.
    start = torch.full_like(point, torch.nan)
    unknowns, misfit, predicted = solver.solve(start, places.rows[0])
    assert unknowns is start and misfit == predicted == float("inf")


def test_a_token_of_what_is_left_is_claimed_only_when_solved(monkeypatch):
    """Once known tokens are taken out, what their errors do to the rest does not show in the forms."""
    seen = []

    def watched(forms, *given):
        tokens = tokens_of(forms, *given)
        seen.append(int((tokens.error * max(STD) < CERTAIN).sum()))
        return tokens

    monkeypatch.setattr("attacks.joint.search.tokens_of", watched)
    unsolved = lambda tokens, rows, chosen, *rest: (tokens, rows, torch.zeros_like(chosen))  # noqa: E731
    monkeypatch.setattr("attacks.joint.search._solved", unsolved)
    model = vit(**SMALL | {"depth": 5}).float()
    for seed in range(8):  # of which pictures something is left is a matter of rounding
        seen.clear()
        _, leak = leaked(model, pictures(3, seed))
        told = joint(leak, generator=generator()).diagnostics
        if len(seen) > 1:
            break
    assert len(seen) > 1 and 0 < seen[0] < told["tokens"]
    assert told["found"] == seen[0] and told["noise"] == float("inf") and not told["exact"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_claim_is_false(dtype):
    """Patches claimed found are wrong by less than ten times their predicted error, over random victims."""
    claimed = 0
    for seed in (1, 2, 3, 5):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = vit(**SMALL, seed=seed).to(dtype)
        images = pictures(1 + seed % 4, seed)  # batches: of one image nothing would be checked here
        private, leak = leaked(model, bordered(images) if seed % 3 == 2 else images)
        found = joint(leak, generator=generator())
        claimed += found.diagnostics["found"]
        if found.diagnostics["found"] == found.diagnostics["tokens"]:
            assert as_set(found, private).max() / 4 < 10 * found.diagnostics["noise"] / min(STD)
        assert not found.diagnostics["exact"] or in_place(found, private).max() < 0.05
    assert claimed > 40 or dtype == torch.float32


@pytest.mark.parametrize(
    "options, number, terms, words",
    [
        (SMALL, 5, {}, r"2 B \(N \+ 1\) <= D - 1: 100 is more than 95 for 5 images of 9 patches"),
        (SMALL, 2, {"withhold": ["cls_token"]}, "'cls_token'"),
        (SMALL | {"april": True}, 2, {}, "LayerNorm, attention, LayerNorm, MLP"),
        (SMALL | {"index_embed": True, "unknown": True}, 2, {}, "one position for each"),
        (SMALL | {"embed_dim": 48, "patch_size": 3}, 1, {}, "64 patches are unknown, and 48 embedding dimensions"),
    ],
)
def test_what_it_cannot_solve_is_said(options, number, terms, words):
    model = vit(**options)
    with pytest.raises(UserError, match=words):
        joint(leaked(model, pictures(number), **terms)[1], generator=generator())


def test_no_place_is_left_without_a_token_in_double_precision():
    """A token whose row is badly known stands where no other does, not in the row of another that is nearer."""
    rows = torch.eye(3, dtype=torch.float64)
    added = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.6, 0.5], [0.9, 0.0, 0.1]], dtype=torch.float64)
    tokens = Tokens(torch.zeros(4, 2), torch.zeros(4, 2), added, torch.zeros(4))
    places = Places(rows, torch.ones(3, dtype=torch.long), torch.arange(3), None)
    _, stands = placed_tokens(tokens, places, 2 * places.counts, clean=True)
    assert stands.tolist() == [0, 1, 2, 0]


def test_more_prefix_tokens_than_one_are_refused():
    model = of_timm("deit_tiny_distilled_patch16_224", 32, patch_size=16, embed_dim=96, depth=1, num_classes=5)
    with pytest.raises(UserError, match="at most a class token in front of the patches"):
        joint(leaked(model, pictures(2, side=32))[1], generator=generator())


@pytest.mark.parametrize("error, offered", [(1e-3, [2]), (1.0, [])])
def test_only_a_token_that_is_known_well_can_stand_for_two_places(error, offered):
    """Equal patches are one token between their rows; one that is known badly can be anywhere."""
    rows = 10 * torch.eye(3, 8, dtype=torch.float64)
    places = Places(rows, torch.ones(3, dtype=torch.long), torch.arange(3), None)
    added = torch.stack([rows[0], 0.3 * rows[0] + 0.4 * rows[1] + 0.3 * rows[2]])
    tokens = Tokens(torch.eye(2, 5), torch.eye(2, 8), added, torch.tensor([1e-3, error]))
    found, stands = placed_tokens(tokens, places, places.counts, clean=False)
    assert stands.tolist() == [0, 1, *offered] and len(found.patches) == 2 + len(offered)
    assert found.patches[2:].equal(tokens.patches[1:2].expand(len(offered), -1))
    assert found.error[2:].isinf().all() and found.error[:2].equal(tokens.error)


@pytest.mark.parametrize("kernel, stride", [((3, 8, 8), (4, 4)), ((3, 4, 4), (8, 8)), ((1, 8, 8), (8, 8))])
def test_a_projection_that_does_not_read_each_pixel_once_is_refused(kernel, stride):
    model = vit(**SMALL)
    _, leak = leaked(model, pictures(2))
    model.patch_embed.proj = nn.Conv2d(kernel[0], 96, kernel[1:], stride).double()
    gradients = leak.gradients | {f"{PATCHES}.weight": model.patch_embed.proj.weight.detach()}
    with pytest.raises(UserError, match="reads each pixel once"):
        joint(replace(leak, model=model, gradients=gradients), generator=generator())


def test_noise_is_no_reconstruction():
    _, leak = leaked(vit(**SMALL), pictures(2))
    own = generator(5)
    for value in leak.gradients.values():
        value += 1e-3 * value.std() * torch.randn(value.shape, generator=own, dtype=value.dtype)
    found = joint(leak, generator=generator())
    assert not found.diagnostics["exact"] and found.diagnostics["found"] < found.diagnostics["tokens"]


@pytest.mark.parametrize("masked", [[], [2]])
def test_the_mask_that_tokens_tell_leaves_a_count_for_every_row(masked):
    """Nobody stands in the row of a masked place; without a mask nobody stands in the unknown row."""
    places = Places(10 * torch.eye(4, 8, dtype=torch.float64), None, None, None)  # three places, the unknown row
    rows = [3 if place in masked else place for place in range(3)]
    tokens = Tokens(torch.eye(3, 5), torch.eye(3, 8), places.rows[rows], torch.zeros(3))
    found = with_mask(tokens, places)
    assert found.kinds.tolist() == rows
    assert found.counts.tolist() == [int(place not in masked) for place in range(3)] + [len(masked)]


@pytest.mark.parametrize("number, limit", [(3, 1e-9), (4, 1e-2)])
def test_merged_forms_are_symmetric_with_fewer_equations_than_directions_too(number, limit):
    """Three images leave an equation for every direction of P o; with four its strongest ones are kept, and no more."""
    _, leak = leaked(vit(**SMALL | {"depth": 5}), pictures(number))
    span = rows_of(with_bias(leak, PATCHES), 9 * number, torch.float64)
    forms = merged_forms(leak, Places.of(leak), span)
    assert len(forms.matrices) == 4 and forms.asymmetry < limit


@pytest.mark.parametrize("dtype, noise, claimed", [(torch.float64, 0.0, True), (torch.float64, 1e-9, False)])
def test_exact_is_said_of_gradients_of_rounding_alone(dtype, noise, claimed):
    """Noise far below what the picture shows leaves 100 dB, and is no rounding: attacks/exactness.py."""
    model = vit(image_size=24, patch_size=8, embed_dim=192, depth=2, num_heads=2).to(dtype)
    _, leak = client(model, 2)
    own = torch.Generator().manual_seed(1)
    noisy = {
        name: value + noise * torch.randn(value.shape, generator=own, dtype=dtype)
        for name, value in leak.gradients.items()
    }
    found = joint(replace(leak, gradients=noisy), generator=torch.Generator().manual_seed(0)).diagnostics
    assert found["found"] == found["tokens"] == 18 and found["exact"] == claimed


@pytest.mark.parametrize("number", [1, 3])
def test_rows_of_zeros_have_no_noise(number):
    """As pruning leaves them, and the classifier of a confident network: their scale stays finite."""
    own = generator()
    columns = torch.randn(8, number, generator=own, dtype=torch.float64)
    columns[2:5] = 0
    rows = torch.randn(number, 6, generator=own, dtype=torch.float64)
    found = rows_of((columns @ rows).float().double(), number, torch.float32)
    assert len(found.basis) == number and found.reach.isfinite().all()
    torch.testing.assert_close(rows, (rows @ found.basis.T) @ found.basis, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("knowledge", ["method", "mask"])
def test_clients_that_are_added_up_are_each_masked_by_their_own_mask(knowledge):
    """The rows of the tokens say which places of which image were hidden, and attention which image they are of."""
    model, images = vit(unknown=True, **SMALL), pictures(3)
    terms = Terms(reveal_labels=True, mean=MEAN, std=STD, attacker_knowledge=knowledge)
    jigsaw = Jigsaw(model.grid, 0.34, "uniform", seed=0)
    clients = Client(model, jigsaw, build_defense("none", {}), 0, terms, {}, together=(3, 1, None))
    private, leak, _ = clients.round(0, images, [""] * 3)
    found = joint(leak, generator=generator())
    assert len(private.mask.unique(dim=0)) == 3 and int(private.mask.sum()) == 9
    assert found.diagnostics["found"] == 27 and found.diagnostics["images"] == 3
    assert found.diagnostics["exact_up_to_order"] and not found.diagnostics["exact"]
    assert in_place(found, private)[~private.mask].max() < 1e-4 and as_set(found, private).max() < 1e-4


def test_of_dependent_tokens_in_double_precision_nothing_is_certified_but_what_attention_confirms():
    """Patches that both images have at several places are sums of each other's tokens, and mixtures fit all forms."""
    scale = torch.tensor(STD, dtype=torch.float64).repeat_interleave(64)
    images = pictures(2)
    images[:, :, :8, 8:16] = images[:, :, :8, :8]
    for content in (images, pictures(2)):
        private, leak = leaked(vit(**SMALL), content)
        found = joint(leak, generator=generator())
        told, true = found.certificate, patchify(private.model_input, 8).flatten(0, 1)
        assert told is not None
        away = torch.stack([((true - one) * scale).abs().amax(dim=1).amin() for one in told.patches.flatten(0, 1)])
        assert not bool((away > told.radius.flatten())[told.claimed.flatten()].any())
    assert bool(told.claimed.all()) and found.diagnostics["exact"]


def test_prefix_tokens_of_equal_images_are_counted_once():
    """Two equal ramps without positions: three different tokens, of which the middle one is the mean of the others."""
    ramp = torch.linspace(0, 1, 24, dtype=torch.float64).expand(2, 3, 24, 24)
    mean, scale = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    private, leak = leaked(vit(positions="none", **SMALL), (ramp - mean) / scale)
    told, true = joint(leak, generator=generator()).certificate, patchify(private.model_input, 8).flatten(0, 1)
    away = torch.stack([((true - one).abs().amax(dim=1)).amin() for one in told.patches.flatten(0, 1)])
    assert away.min() > 0.1 and not bool(told.claimed.any())  # all are mixtures, and none is claimed
