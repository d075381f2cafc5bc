"""eval/attention.py: the recomputed weights against the layers' own and the reference, rollout, and the figures."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from data.loaders import Batch
from data.options import DataOptions
from eval.accuracy import shuffled_view
from eval.attention import (
    attention_study,
    attention_suite,
    attention_weights,
    class_maps,
    correlation,
    heat_over,
    rollout,
)
from eval.options import SubjectOptions
from models import build_model
from models.checkpoints import load_model, save_checkpoint
from models.jigsaw import Jigsaw
from utils.distributed import Processes
from utils.errors import UserError

HALF = (0.5, 0.5, 0.5)


def small_model(**options) -> nn.Module:
    shape = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5}
    return build_model("vit", **{**shape, **options}).eval()


def pictures(number: int = 2) -> Tensor:
    return torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def batch(number: int = 2) -> Batch:
    index = torch.arange(number) * 7
    return Batch(pictures(number), torch.zeros_like(index), index, torch.zeros_like(index))


def own_weights(model: nn.Module, images: Tensor, mask: Tensor | None) -> list[Tensor]:
    """What the layers multiply the values with when they are told not to fuse: the input of their dropout."""
    weights = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, inputs, __: weights.append(inputs[0]))
    with torch.no_grad():
        model(images, mask)
    return weights


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"qkv_bias": False, "num_heads": 3}, {"april": True}])
def test_weights_are_those_of_the_unfused_layers(options, masked):
    model = small_model(unknown=True, **options)
    mask = torch.arange(16)[None] % 3 == 0 if masked else None
    found = attention_weights(model, pictures(), mask)
    expected = own_weights(model, pictures(), mask)
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == (2, model.blocks[0].attn.num_heads, 17, 17)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.sum(-1), torch.ones_like(ours[..., 0]))


@pytest.mark.parametrize("name", ["deit", "linear", "nonlinear", "pca", "unk_idx"])
def test_the_official_attention_is_reproduced(golden, tmp_path, name):
    data = golden(f"mjp_model_{name}")
    weights = {key.removeprefix("sd/"): torch.tensor(data[key]) for key in data if key.startswith("sd/")}
    torch.save({"model": weights}, tmp_path / "official.pth")
    model = load_model(tmp_path / "official.pth", num_heads=3)
    runs = [key.split("_")[2] for key in data if key.startswith("attn_last_")]
    assert set(runs) == ({"nomask"} if name == "deit" else {"nomask", "mask"})
    for run in runs:
        mask = torch.tensor(data["unk_mask"])[:, 1:].bool() if run == "mask" else None
        found = attention_weights(model, torch.tensor(data["x"]), mask)[-1]
        torch.testing.assert_close(found, torch.tensor(data[f"attn_last_{run}_f32"]), rtol=1e-4, atol=2e-5)


def test_looking_changes_nothing():
    model = small_model()
    before = model(pictures())
    attention_weights(model, pictures())
    assert model(pictures()).equal(before)
    with pytest.raises(ValueError, match="unknown position embedding"):
        attention_weights(model, pictures(), torch.ones(1, 16, dtype=torch.bool))
    assert not any(block.attn._forward_hooks for block in model.blocks)


@pytest.mark.parametrize("name", ["lenet", "swin_tiny"])
def test_models_without_class_token_are_refused(name):
    options = {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2), "patch_size": 4} if name == "swin_tiny" else {}
    with pytest.raises(UserError, match=f"'{name}' has no class token"):
        attention_weights(build_model(name, image_size=32, **options), pictures())


def test_rollout_of_known_attention():
    identity = torch.eye(4).expand(2, 3, 4, 4)
    assert rollout([identity, identity]).equal(torch.eye(4).expand(2, 4, 4))
    uniform = torch.full((1, 2, 4, 4), 0.25)
    torch.testing.assert_close(rollout([uniform])[0], torch.eye(4) / 2 + 0.125)
    # Token 0 looks at 1 in the second block, which looked at 2 in the first: a quarter of 0 comes from 2.
    first, second = torch.eye(3).expand(1, 1, 3, 3).clone(), torch.eye(3).expand(1, 1, 3, 3).clone()
    first[0, 0, 1], second[0, 0, 0] = torch.tensor([0.0, 0, 1]), torch.tensor([0.0, 1, 0])
    assert rollout([first, second])[0, 0].tolist() == [0.5, 0.25, 0.25]
    assert rollout([second, first])[0, 0].tolist() == [0.5, 0.5, 0.0]


def test_class_maps_are_the_class_tokens_row():
    weights = attention_weights(small_model(), pictures())
    maps = class_maps(weights)
    assert list(maps) == ["head 1", "head 2", "mean", "rollout"]
    assert maps["head 2"].equal(weights[2][:, 1, 0, 1:])
    assert maps["mean"].equal((maps["head 1"] + maps["head 2"]) / 2)
    assert maps["rollout"].equal(rollout(weights)[:, 0, 1:])
    for block in (0, -3):
        maps = class_maps(weights, block)
        assert maps["head 1"].equal(weights[0][:, 0, 0, 1:])
        torch.testing.assert_close(maps["rollout"], maps["mean"] / 2)
    for block in (3, -4):
        with pytest.raises(UserError, match=f"there is no block {block}: the model has blocks 0 to 2"):
            class_maps(weights, block)


def test_correlation_knows_its_bounds():
    x = torch.rand(2, 9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(correlation(x, 3 * x + 1), torch.ones(2).double())
    torch.testing.assert_close(correlation(x, -x), -torch.ones(2).double())
    assert correlation(x, torch.ones(2, 9)).tolist() == [0, 0]


@pytest.mark.parametrize("unknown", [False, True])
def test_without_position_embeddings_attention_follows_the_patches(unknown):
    model = small_model(unknown=unknown)
    with torch.no_grad():
        model.pos_embed[:, 1:] = 0
        if unknown:
            model.unknown_pos_embed.zero_()
    jigsaws = [Jigsaw(model.grid, ratio, "uniform", seed=2) for ratio in (0.0, 0.5, 1.0)]
    rows, _ = attention_study(model, batch(), jigsaws, mean=HALF, std=HALF)
    assert [(row["image"], row["mask_ratio"]) for row in rows] == [(i, r) for r in (0.5, 1.0) for i in (0, 7)]
    for row in rows:
        assert row["follows_content"] == pytest.approx(1, abs=1e-5)
        assert row["stays_in_place"] < 0.9


def test_figures_show_every_view_beside_its_picture():
    model = small_model(unknown=True)
    jigsaws = [Jigsaw(model.grid, 0.5, "uniform")]
    rows, figures = attention_study(model, batch(), jigsaws, mean=HALF, std=HALF, block=1)
    assert list(figures) == ["attention_00000", "attention_00007"]
    panels = figures["attention_00007"].axes
    assert len(panels) == 3 * 5
    assert [axes.get_ylabel() for axes in panels[::5]] == ["original", "mask ratio 0.5", "mask ratio 0.5\nmoved back"]
    assert [axes.get_title() for axes in panels[1:5]] == ["head 1", "head 2", "mean", "rollout"]
    shown = [torch.tensor(axes.get_images()[0].get_array().data) for axes in panels[::5]]
    assert shown[0].equal(shown[2]) and not shown[0].equal(shown[1])
    shuffled = shuffled_view(model, pictures(), batch().index, jigsaws[0])
    clean, masked = (class_maps(attention_weights(model, *view), 1)["mean"] for view in ((pictures(),), shuffled))
    assert [row["stays_in_place"] for row in rows] == correlation(masked, clean).tolist()
    torch.testing.assert_close(shown[0], (pictures()[1] * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0))


def test_the_suite_shows_the_same_images_on_any_number_of_processes(tmp_path):
    for number in range(6):
        folder = tmp_path / "data" / "val" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    model, lines = small_model(), []
    save_checkpoint(tmp_path / "last.pt", {"arguments": model.arguments, "model": model.state_dict()})
    data = DataOptions(path=str(tmp_path / "data"), batch_size=2, workers=0, mean=HALF, std=HALF)
    options = {"model": SubjectOptions(checkpoint=str(tmp_path / "last.pt")), "seed": 1, "limit": 2, "data": data}
    options |= {"mask_ratios": [0.0, 0.5], "puzzle": {"mask_sampler": "uniform"}}
    results = [
        attention_suite(Processes(rank, 2, torch.device("cpu")), log=lines.append, **options) for rank in range(2)
    ]
    assert results[0]["attention"] == results[1]["attention"]
    assert [(row["image"], row["mask_ratio"]) for row in results[0]["attention"]] == [(0, 0.5), (3, 0.5)]
    assert list(results[0]["figures"]) == ["attention_00000", "attention_00003"]
    assert len(lines) == 2 * 3


def test_unreadable_images_are_left_out():
    model, images = small_model(), batch(3)
    jigsaws = [Jigsaw(model.grid, 0.5, "uniform")]
    skipped = images._replace(labels=torch.tensor([0, -1, 0]))
    rows, figures = attention_study(model, skipped, jigsaws, mean=HALF, std=HALF)
    assert list(figures) == ["attention_00000", "attention_00014"]
    assert rows[1] == attention_study(model, images, jigsaws, mean=HALF, std=HALF)[0][2]
    with pytest.raises(UserError, match="none of the 3 images could be read"):
        attention_study(model, images._replace(labels=torch.full((3,), -1)), jigsaws, mean=HALF, std=HALF)


def test_heat_lies_over_its_own_patch():
    grey = torch.full((8, 12, 3), 0.5).numpy()
    heat = torch.zeros(2, 3).numpy()
    heat[1, 2] = 1
    drawn = heat_over(grey, heat)
    assert drawn.shape == grey.shape and drawn.min() >= 0 and drawn.max() <= 1
    hot = drawn.sum(axis=2) > drawn.sum(axis=2).mean()
    assert hot[4:, 8:].all() and hot.sum() == 16
