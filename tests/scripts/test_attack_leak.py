"""attack.py --leak and --audit: files of a plain training loop, and what is not one."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from PIL import Image

from campaigns.sources import sized
from leak_file import About, LeakFile, save, write
from utils.campaign import Campaign

ROOT = Path(__file__).parents[2]
# A script of somebody else: its own network, its own images, and of this project `save` alone.
CAPTURE = """
    import json, sys
    import torch
    from PIL import Image
    from torchvision.transforms.functional import normalize, to_tensor
    from net import net

    from leak_file import save

    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = net().eval()
    for number, path in enumerate(sys.argv[1:]):
        image = normalize(to_tensor(Image.open(path).convert("RGB")), MEAN, STD)[None]
        label = model(image).argmax(dim=1)
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(image), label).backward()
        save(f"leak_{number}.safetensors", model, batch_size=1, image_shape=image.shape[1:], labels=label)
    ours = {"attacks", "models", "utils", "data", "eval", "defenses", "config"}
    print(json.dumps(sorted(ours & set(sys.modules))))
"""
NET = """
    import timm
    def net(**options):
        shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
        return timm.create_model("vit_tiny_patch16_224", **shape | options)
"""


@pytest.fixture(scope="module")
def outside(tmp_path_factory, images) -> Path:
    """A folder of somebody else: its network in net.py, three private PNGs, and the leak files of its training loop."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "private").mkdir()
    for number, path in enumerate(sorted((images / "val").rglob("*.jpg"))[:3]):
        Image.open(path).resize((32, 32)).save(folder / "private" / f"{number}.png")
    (folder / "net.py").write_text(textwrap.dedent(NET))
    (folder / "capture.py").write_text(textwrap.dedent(CAPTURE))
    (folder / "leak_file.py").write_text((ROOT / "leak_file.py").read_text())  # as the guide says
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    command = [sys.executable, "capture.py", *sorted(map(str, (folder / "private").iterdir()))]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
    return folder


@pytest.fixture
def attack(call, outside, tmp_path):
    """attack('run', '--leak', ...) attacks the network of the outside folder."""
    model = ["--model", f"{outside / 'net.py'}:net", "--image_size", 32]
    return lambda name, *options: call("attack.py", *model, "--output", tmp_path / name, *options)


def rows(folder: Path) -> list[dict]:
    """per_image without what is about files and clocks."""
    found = json.loads((folder / "results.json").read_text())["per_image"]
    return [{key: value for key, value in row.items() if key not in ("image", "seconds")} for row in found]


@pytest.mark.parametrize("name", ["closed_form", "inverting_gradients"])
def test_a_file_is_attacked_like_the_victim_in_process(attack, outside, tmp_path, name):
    options = ["--attack", name]
    options += ["--attack_options.iterations", 4] if name == "inverting_gradients" else []
    leaks = [outside / f"leak_{number}.safetensors" for number in range(3)]
    (tmp_path / "leaks").mkdir()
    for path in leaks:
        (tmp_path / "leaks" / path.name).write_bytes(path.read_bytes())
    blind = attack("blind", *options, "--leak", tmp_path / "leaks")
    assert blind.status == 0, blind.err
    scored = attack("scored", *options, "--leak", tmp_path / "leaks", "--images", outside / "private")
    assert scored.status == 0, scored.err
    assert attack("inside", *options, "--images", outside / "private").status == 0
    assert rows(tmp_path / "scored") == rows(tmp_path / "inside")  # every score, to the last bit
    pictures = [
        [path.read_bytes() for path in sorted((tmp_path / run / "reconstructions").iterdir())]
        for run in ("blind", "scored", "inside")
    ]
    assert len(pictures[0]) == 3 and pictures[0] == pictures[1] == pictures[2]
    assert not (tmp_path / "blind" / "originals").exists() and "psnr" not in rows(tmp_path / "blind")[0]
    page = (tmp_path / "blind" / "report.html").read_text()
    assert page.count("<img") == 2 * 3 and "3 leak files" in page
    verdict = json.loads((tmp_path / "blind" / "results.json").read_text())["verdict"]
    claims = {"closed_form": "Every image comes back, says the attack: the equations of closed_form determine 3 of 3"}
    assert verdict.startswith(claims.get(name, "inverting_gradients returns 3 images and makes no claim of its own"))
    assert name in page[: page.index("</p>")] and verdict.partition(": ")[0] in page[: page.index("</p>")]
    assert "knows the code" not in page or name != "closed_form"


def test_a_model_by_name_has_the_size_of_the_images_in_the_leak(outside):
    leak, asked = str(outside / "leak_0.safetensors"), {"checkpoint": None, "name": "lenet", "image_size": None}
    assert sized(asked, leak)["image_size"] == 32 and sized(asked, None) == asked
    for told in ({"image_size": 64}, {"checkpoint": "last.pt", "name": None}):
        assert sized(asked | told, leak) == asked | told


def test_which_attacks_apply_is_said_first_and_the_wrong_one_stops(attack, outside):
    outcome = attack("run", "--attack", "rgap", "--leak", outside / "leak_0.safetensors")
    assert outcome.status == 2 and outcome.err.strip().splitlines()[-1].startswith("error: attack 'rgap' takes chains")
    assert "attacks that apply: closed_form, mjp_aware, token_span" in outcome.out
    assert "gradinversion        no: the batch_norm prior needs" in outcome.out


def test_a_campaign_does_not_go_on_with_another_leak_under_an_old_name(attack, outside, tmp_path, monkeypatch):
    leaks = tmp_path / "leaks"
    leaks.mkdir()
    for number in range(2):
        (leaks / f"leak_{number}.safetensors").write_bytes((outside / f"leak_{number}.safetensors").read_bytes())
    options = ["--leak", leaks, "--resume", "auto"]
    with monkeypatch.context() as patch:
        patch.setattr(Campaign, "merge", lambda self: [])  # stopped before the results
        assert attack("run", *options).status == 0
    kept = (tmp_path / "run" / "partial" / "0.jsonl").read_bytes()
    again = (leaks / "leak_1.safetensors").read_bytes()
    (leaks / "leak_1.safetensors").write_bytes((outside / "leak_2.safetensors").read_bytes())
    refused = attack("run", *options)
    assert refused.status == 2 and "leak_1.safetensors" in refused.err and "--overwrite" in refused.err
    assert (tmp_path / "run" / "partial" / "0.jsonl").read_bytes() == kept
    (leaks / "leak_1.safetensors").write_bytes(again)
    outcome = attack("run", *options)
    assert outcome.status == 0 and "2 of 2 images are done" in outcome.out


def test_a_campaign_over_a_folder_of_leaks_goes_on_where_it_stopped(attack, outside, tmp_path):
    options = ["--leak", outside, "--resume", "auto"]
    assert attack("run", *options).status == 0
    whole = rows(tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    (tmp_path / "run" / "partial").mkdir()
    done = json.dumps(whole[1] | {"image": str(outside / "leak_1.safetensors"), "seconds": 0.0})
    (tmp_path / "run" / "partial" / "0.jsonl").write_text("\n" + done)
    outcome = attack("run", *options)
    assert outcome.status == 0 and "1 of 3 images are done" in outcome.out
    assert rows(tmp_path / "run") == whole


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), ["is truncated or not a leak file"]),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x01"), ["was changed since it was written"]),
        (lambda path: torch.save({"pos_embed": torch.ones(2)}, path), ["is a pickle", "refused"]),
        (lambda path: path.unlink(), ["does not exist"]),
        (
            lambda path: write(path, LeakFile(About(batch_size=1, image_shape=(3, 32, 32)), {"a": torch.zeros(3)})),
            ["the gradients are all zero"],
        ),
        (
            lambda path: save(
                path, {"head.bias": torch.ones(7), "fc": torch.ones(2)}, batch_size=1, image_shape=(3, 32, 32)
            ),
            ["not in the model: fc", "of another shape: head.bias (7,) instead of (10,)"],
        ),
    ],
)
def test_bad_leaks_end_in_one_line(attack, outside, tmp_path, change, words):
    path = tmp_path / "leak.safetensors"
    path.write_bytes((outside / "leak_0.safetensors").read_bytes())
    change(path)
    outcome = attack("run", "--leak", path)
    line = outcome.err.strip().splitlines()[-1]
    assert outcome.status == 2 and "Traceback" not in outcome.err and line.startswith("error: ")
    assert all(word in line for word in [path.name, *words]), line


@pytest.mark.parametrize(
    "options, words",
    [
        (["--batch_size", 2], "--batch_size must be left out with --leak, whose file says it"),
        (["--mask_ratio", 0.5], "--mask_ratio must be left out with --leak"),
        (["--audit"], "ask one at a time"),
        (["--images", "PRIVATE"], "--images holds 3 images and the leaks are of 1"),
        (["--model_options.depth", 1], "not in the model: blocks.1."),
        (["--model_options.dept", 1], "cannot be built: TypeError"),
    ],
)
def test_options_that_do_not_go_with_a_leak(attack, outside, options, words):
    options = [str(outside / "private") if option == "PRIVATE" else option for option in options]
    outcome = attack("run", "--leak", outside / "leak_0.safetensors", *options)
    assert outcome.status == 2 and words in outcome.err.strip().splitlines()[-1]


def test_an_audit_is_one_page(call, tmp_path, images, monkeypatch):
    monkeypatch.setattr("campaigns.audit.BUDGET", 1e6)  # no time to match gradients in
    model = [
        "--model",
        "vit",
        "--model_options.embed_dim",
        48,
        "--model_options.depth",
        1,
        "--model_options.num_heads",
        3,
    ]
    options = [*model, "--model_options.patch_size", 8, "--image_size", 32, "--min_block", 2, "--max_block", 8]
    outcome = call("attack.py", "--audit", *options, "--images", images / "val", "--output", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    found = json.loads((tmp_path / "run" / "results.json").read_text())["audit"]
    measured = {row["attack"]: row for row in found["attacks"] if row["psnr"]["n"]}
    assert found["best"] == "closed_form" and measured["closed_form"]["psnr"]["mean"] > 60
    assert found["mask"]["right"]["mean"] == 100 and found["labels"][0]["read"]["mean"] == 100
    assert not found["shapes"]["attacks"][0]["open_visible"]
    mjp = next(line for line in found["defenses"] if line["defense"] == "MJP")
    naive, adaptive = mjp["cells"]
    assert naive["attack"] == "closed_form" and adaptive["attack"] == "mjp_aware"
    assert naive["psnr_visible"]["mean"] < adaptive["psnr_visible"]["mean"]
    withheld = next(line for line in found["defenses"] if line["defense"] == "withhold")["cells"]
    assert "needs the gradient of 'pos_embed'" in withheld[0]["why"] and withheld[1]["psnr"]["n"]
    page = (tmp_path / "run" / "audit.html").read_text()
    for words in ("The image comes back.", "Threat model", "What this page does not say", "Masked Jigsaw Puzzle"):
        assert words in page
    assert re.search(r"closed_form reconstructs it at [\d.]+ dB; .* takes no gradient, has \d+\.\d dB\.", page)
    assert 'src="http' not in page and "<script" not in page
