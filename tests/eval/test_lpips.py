"""eval/lpips.py: the package's numbers, weights from a file, and no way to pass other weights off as LPIPS.

No trunk of torchvision is at hand in a test: the arithmetic is tested with made-up ones.
"""

import hashlib
from urllib.error import URLError

import lpips as package
import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models import squeezenet1_1

import eval.lpips
from eval.lpips import TRUNKS, load_lpips
from utils.errors import UserError

ALEXNET = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory) -> str:
    """A file in the layout of torchvision's AlexNet with the weights the stored values were computed with."""
    random, weights = np.random.RandomState(33), {}
    for layer, shape in ALEXNET.items():
        kernel = random.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        weights[f"features.{layer}.weight"] = torch.from_numpy(kernel.astype(np.float32))
        weights[f"features.{layer}.bias"] = torch.from_numpy(
            (0.1 * random.standard_normal(shape[0])).astype(np.float32)
        )
    path = tmp_path_factory.mktemp("trunk") / "alexnet.pth"
    torch.save({**weights, "classifier.6.weight": torch.zeros(1)}, path)
    return str(path)


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("trunk") / "squeezenet.pth"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(squeezenet1_1(weights=None).state_dict(), path)
    return str(path)


def images(number: int, seed: int, side: int = 40) -> Tensor:
    return torch.rand(number, 3, side, side + 3, generator=torch.Generator().manual_seed(seed))


def packages_own(network: package.LPIPS, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([network(a[None], b[None], normalize=True).flatten() for a, b in zip(x, y, strict=True)])


def test_values_of_both_published_implementations(alexnet, golden):
    data, stored = golden("metrics"), golden("metrics.json")
    distance = load_lpips("alex", alexnet)
    for name, values in stored["lpips_synthetic_trunk"].items():
        entry = stored["results"][name]
        reference = data[entry["ref"]]
        degraded = np.rot90(reference, 2) if "rotated" in entry["deg"] else data[entry["deg"]]
        x, y = (torch.tensor(image.copy()).permute(2, 0, 1)[None].float() / 255 for image in (degraded, reference))
        assert distance(x, y).item() == pytest.approx(values["zhang"], rel=1e-4), name
        assert distance(x, y).item() == pytest.approx(values["mjp"], rel=1e-3), name


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_equals_the_packages_forward_pass(net, alexnet, squeezenet):
    distance = load_lpips(net, {"alex": alexnet, "squeeze": squeezenet}[net])
    x, y = images(10, 0), images(10, 1)
    values = distance(x, y)
    assert values.shape == (10,)
    assert values.dtype == torch.float64
    assert len(set(values.tolist())) == 10
    torch.testing.assert_close(values.float(), packages_own(distance.network, x, y), rtol=1e-5, atol=0)
    assert distance(x, x).tolist() == [0] * 10


def test_the_heads_are_those_the_package_ships(alexnet, golden):
    network = load_lpips("alex", alexnet).network
    for number, head in enumerate(network.lins):
        np.testing.assert_array_equal(head.model[1].weight.flatten(), golden("metrics")[f"lpips/w{number}"])


def test_every_weight_comes_from_a_file(alexnet):
    network, stored = load_lpips("alex", alexnet).network, torch.load(alexnet, weights_only=True)
    torch.manual_seed(1)
    again = load_lpips("alex", alexnet).network
    for (name, ours), theirs in zip(network.state_dict().items(), again.state_dict().values(), strict=True):
        assert ours.equal(theirs), name
    for number, layer in zip((1, 2, 3, 4, 5), ALEXNET, strict=True):
        convolution = getattr(network.net, f"slice{number}").get_submodule(str(layer))
        assert convolution.weight.equal(stored[f"features.{layer}.weight"])
        assert convolution.bias.equal(stored[f"features.{layer}.bias"])
    assert not any(weight.requires_grad for weight in network.parameters())


def test_loading_draws_no_random_number(squeezenet):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    load_lpips("squeeze", squeezenet)
    assert torch.get_rng_state().equal(before)


def test_only_torchvisions_file_may_be_called_lpips(alexnet, monkeypatch):
    assert load_lpips("alex", alexnet).name == "lpips_alex_unverified"
    with open(alexnet, "rb") as file:
        prefix = hashlib.sha256(file.read()).hexdigest()[:8]
    monkeypatch.setitem(TRUNKS, "alex", TRUNKS["alex"]._replace(sha256=(prefix,)))
    assert load_lpips("alex", alexnet).name == "lpips_alex"


def test_without_a_file_torchvisions_is_downloaded_and_checked(alexnet, tmp_path, monkeypatch, capsys):
    asked = []

    def download(url, path, hash_prefix, progress):
        asked.append((url, hash_prefix))
        with open(alexnet, "rb") as source, open(path, "wb") as target:
            target.write(source.read())

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    load_lpips("alex")
    load_lpips("alex")
    assert asked == [("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "7be5be79")]
    assert (tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth").is_file()
    assert "downloading https://" in capsys.readouterr().err


@pytest.mark.parametrize("failure", [URLError("no route"), RuntimeError("invalid hash value"), PermissionError("no")])
def test_offline_is_one_line_that_says_what_to_do(failure, tmp_path, monkeypatch):
    def download(*arguments, **options):
        raise failure

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(UserError) as error:
        load_lpips("vgg")
    assert "vgg16-397923af.pth" in str(error.value)
    assert "--trunk FILE" in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_files_are_named(alexnet, squeezenet, tmp_path):
    text = tmp_path / "text.pth"
    text.write_text("not weights")
    cut = tmp_path / "cut.pth"
    weights = torch.load(alexnet, weights_only=True)
    torch.save({name: value[:1] for name, value in weights.items()}, cut)
    for net, path in [
        ("alex", squeezenet),
        ("squeeze", alexnet),
        ("alex", text),
        ("alex", cut),
        ("alex", "absent.pth"),
    ]:
        with pytest.raises(UserError) as error:
            load_lpips(net, path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="did you mean 'alex'"):
        load_lpips("alexnet", alexnet)


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_images_may_be_as_small_as_said(net, alexnet, squeezenet):
    distance = load_lpips(net, {"alex": alexnet, "squeeze": squeezenet}[net])
    side = TRUNKS[net].smallest
    assert distance(images(1, 0, side), images(1, 1, side)).isfinite().all()
    with pytest.raises(UserError, match=f"at least {side} pixels"):
        distance(images(1, 0, side - 1), images(1, 1, side - 1))
    with pytest.raises(RuntimeError):  # and not smaller: the bound is the network's
        distance._distance(images(1, 0, side - 1), images(1, 1, side - 1))
    with pytest.raises(UserError, match="3, H, W"):
        distance(torch.zeros(1, 2, 64, 64), torch.zeros(1, 2, 64, 64))


def test_command_line(alexnet, tmp_path, capsys):
    from PIL import Image

    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        pixels = np.random.default_rng(ord(folder)).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / folder / "x.png")
    arguments = ["--source_dir", str(tmp_path / "a"), "--target_dir", str(tmp_path / "b"), "--trunk", alexnet]
    eval.lpips.main([*arguments, "--net", "alex", "--device", "cpu"])
    out, err = capsys.readouterr()
    assert out.startswith("lpips_alex_unverified: ")
    assert "not with published LPIPS" in err
    assert len(err.splitlines()) == 1
