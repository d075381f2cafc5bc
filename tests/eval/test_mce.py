"""eval/mce.py: both means of ImageNet-C, stored and by hand, the suite over folders and the command line."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.corruptions import CORRUPTIONS, SEVERITIES, STANDARD
from data.options import DataOptions
from eval.mce import (
    ALEXNET_ERROR,
    corruption_errors,
    imagenet_c,
    main,
    mce,
    mce_unnormalised,
    relative_mce,
    summarize,
)
from eval.options import SubjectOptions
from models import build_model
from models.checkpoints import load_model, save_checkpoint
from utils.distributed import Processes
from utils.errors import UserError

DATA = DataOptions(batch_size=4, workers=0)


def rows_of(errors: dict[str, list[float]]) -> list[dict]:
    return [
        {"corruption": name, "severity": severity, "acc1": 100 - error}
        for name, five in errors.items()
        for severity, error in zip(SEVERITIES, five, strict=True)
    ]


def alexnet() -> list[dict]:
    return rows_of({name: [error] * 5 for name, error in ALEXNET_ERROR.items()})


def test_stored_values(golden):
    arrays, document = golden("calibration_mce"), golden("calibration_mce.json")
    stored, names = document["results"]["mce"], document["corruptions"]
    assert names == list(STANDARD)
    errors = corruption_errors(rows_of(dict(zip(names, 100 * arrays["mce/errors"], strict=True))))
    rounded = dict(zip(names, arrays["mce/alexnet_errors_percent"], strict=True))
    assert mce(errors, rounded) == pytest.approx(stored["normalised_percent"], rel=1e-9)
    assert mce_unnormalised(errors) == pytest.approx(stored["unnormalised_percent_15"], rel=1e-9)
    clean = (100 * stored["clean_error"], stored["alexnet_clean_error_percent"])
    assert relative_mce(errors, clean[0], rounded, clean[1]) == pytest.approx(stored["relative_mce_percent"], rel=1e-9)
    assert pytest.approx(rounded, abs=0.0501) == ALEXNET_ERROR


def test_alexnet_is_one_hundred():
    summary = summarize(alexnet(), clean_error=43.5)
    assert summary["mce"] == pytest.approx(100)
    assert summary["relative_mce"] == pytest.approx(100)
    assert summary["mce_unnormalised"] == pytest.approx(78.8993, abs=1e-4)


def test_extra_corruptions_are_listed_but_not_in_the_means():
    rows = alexnet() + rows_of({"saturate": [0, 10, 20, 30, 40]})
    assert summarize(rows)["errors"]["saturate"] == pytest.approx(20)
    assert summarize(rows)["mce"] == summarize(alexnet())["mce"]


def test_a_part_of_the_corruptions_has_no_mce():
    rows = alexnet()
    lacking = [row for row in rows if (row["corruption"], row["severity"]) != ("fog", 3)]
    summary = summarize(lacking, clean_error=20)
    assert (summary["mce"], summary["mce_unnormalised"], summary["relative_mce"]) == (None, None, None)
    assert len(summary["errors"]) == 14
    with pytest.raises(UserError, match="all 15 corruptions at 5 severities, 1 lack: fog"):
        mce(summary["errors"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"corruption": "rain", "severity": 1, "acc1": 50.0}, "is not a row of ImageNet-C"),
        ({"corruption": "fog", "severity": 6, "acc1": 50.0}, "is not a row of ImageNet-C"),
        ({"corruption": "fog", "severity": 1, "acc1": float("nan")}, "is not a row of ImageNet-C"),
        ({"corruption": "fog", "severity": 1}, "is not a row of ImageNet-C"),
        ("fog", "is not a row of ImageNet-C"),
        ({"corruption": "fog", "severity": 1, "acc1": 50.0}, "fog at severity 1 is there twice"),
    ],
)
def test_rows_are_checked(row, message):
    with pytest.raises(UserError, match=message):
        corruption_errors([*alexnet(), row])


def test_command_line(tmp_path, capsys):
    results, out = tmp_path / "results.json", tmp_path / "mce.json"
    results.write_text(json.dumps({"imagenet_c": alexnet() + rows_of({"saturate": [1, 2, 3, 4, 5]})}))
    main(["--results", str(results), "--clean_error", "20", "--json", str(out)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 16 + 3
    found = {line[:62].strip(): float(line[62:]) for line in lines[-3:]}
    summary = json.loads(out.read_text())
    assert found == {
        "mCE, normalised by AlexNet (%)": 100,
        "mCE, unnormalised: mean error (%)": round(summary["mce_unnormalised"], 2),
        "relative mCE, normalised by AlexNet (%)": round(summary["relative_mce"], 2),
    }
    main(["--results", str(results)])
    assert "relative" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        (None, [], "does not exist"),
        ("{", [], "is not a results.json"),
        ("[]", [], "is not a results.json"),
        ('{"accuracy": []}', [], "has no imagenet_c rows: run eval.py --suite imagenet-c first"),
        (json.dumps({"imagenet_c": alexnet()[:70]}), [], "1 lack: jpeg_compression"),
        (json.dumps({"imagenet_c": alexnet()}), ["--clean_error", "120"], "--clean_error must be between 0 and 100"),
        (json.dumps({"imagenet_c": alexnet()}), ["--jsn", "x"], "unknown option '--jsn': did you mean '--json'?"),
        (json.dumps({"imagenet_c": alexnet()}), ["--json", "{folder}/no/x.json"], "does not exist"),
    ],
)
def test_refusals(tmp_path, content, more, message):
    results = tmp_path / "results.json"
    if content is not None:
        results.write_text(content)
    with pytest.raises(UserError) as error:
        main(["--results", str(results), *(part.format(folder=tmp_path) for part in more)])
    assert message in str(error.value)


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """A model of zeros, which takes every image for 'bright', its class 0."""
    options = {"image_size": 8, "patch_size": 8, "embed_dim": 8, "depth": 0, "num_heads": 1, "num_classes": 2}
    model = build_model("vit", **options)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    path = tmp_path / "model.pt"
    save_checkpoint(path, {"arguments": model.arguments, "model": model.state_dict(), "classes": ["bright", "dark"]})
    return str(path)


def write(root: Path, name: str, severity: int, counts: dict[str, int]) -> None:
    for label, number in counts.items():
        folder = root / name / str(severity) / label
        folder.mkdir(parents=True)
        for place in range(number):
            Image.fromarray(np.full((8, 8, 3), 40 * place, np.uint8)).save(folder / f"{place}.png")


def test_suite_reads_what_is_there(tmp_path, checkpoint):
    root = tmp_path / "c"
    write(root, "fog", 1, {"bright": 3, "dark": 1})
    write(root, "saturate", 5, {"bright": 1, "dark": 4})
    lines = []
    peers = Processes(0, 1, torch.device("cpu"))
    options = {"model": SubjectOptions(checkpoint=checkpoint), "log": lines.append}
    found = imagenet_c(peers, data=replace(DATA, path=str(root)), **options)
    assert [(row["corruption"], row["severity"], row["acc1"], row["images"]) for row in found["imagenet_c"]] == [
        ("fog", 1, 75.0, 4),
        ("saturate", 5, 20.0, 5),
    ]
    assert found["mce"]["mce"] is None
    assert any(line.startswith("fog") and "25.00" in line for line in lines)
    limited = imagenet_c(peers, data=replace(DATA, path=str(root)), limit=2, **options)
    assert [row["images"] for row in limited["imagenet_c"]] == [2, 2]
    with pytest.raises(UserError, match="has no corruptions: expected"):
        imagenet_c(peers, data=replace(DATA, path=str(tmp_path)), **options)
    with pytest.raises(UserError, match="--data.path is missing"):
        imagenet_c(peers, data=DATA, **options)


def test_published_images_are_neither_cropped_nor_resized(tmp_path, checkpoint, monkeypatch):
    """ImageNet-C is stored as cropped to 224 pixels: the model sees every pixel of it, once normalised."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for label in ("bright", "dark"):
        (tmp_path / "fog/1" / label).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "fog/1" / label / "0.png")
    seen, network = [], type(load_model(checkpoint))
    forward = network.forward

    def watched(model, images, mask=None):
        seen.append(images)
        return forward(model, images, mask)

    monkeypatch.setattr(network, "forward", watched)
    data = replace(DATA, path=str(tmp_path), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    imagenet_c(Processes(0, 1, torch.device("cpu")), data=data, model=SubjectOptions(checkpoint=checkpoint))
    mean, std = (torch.tensor(getattr(data, key)).view(3, 1, 1) for key in ("mean", "std"))
    expected = (torch.tensor(pixels).permute(2, 0, 1) / 255 - mean) / std
    torch.testing.assert_close(torch.cat(seen), expected.expand(2, -1, -1, -1), rtol=1e-5, atol=1e-5)


def test_suite_gives_all_means_of_a_complete_set(tmp_path, checkpoint):
    root = tmp_path / "c"
    for name in CORRUPTIONS:
        for severity in SEVERITIES:
            write(root, name, severity, {"bright": 1, "dark": 1})
    peers = Processes(0, 1, torch.device("cpu"))
    options = {"model": SubjectOptions(checkpoint=checkpoint), "clean_error": 50}
    found = imagenet_c(peers, data=replace(DATA, path=str(root)), **options)
    assert len(found["imagenet_c"]) == 95
    assert found["mce"]["mce_unnormalised"] == 50
    assert found["mce"]["mce"] == pytest.approx(100 * np.mean([50 / error for error in ALEXNET_ERROR.values()]))
    assert found["mce"]["relative_mce"] == 0
