"""python -m defenses.ats.search: ranks policies and continues where it was stopped."""

import json

import pytest

from defenses.ats.search import main
from utils.errors import UserError

QUICK = ["--policies", "3-1-7,43-18-18,0,39", "--samples", "1", "--draws", "2", "--batch", "4", "--batches", "2"]
QUICK += ["--threshold", "-1000000", "--device", "cpu"]


def search(trained, images, output, *options) -> dict:
    main([*QUICK, "--checkpoint", str(trained / "last.pt"), "--data", str(images), "--output", str(output), *options])
    return json.loads((output / "policies.json").read_text())


def test_policies_are_ranked(trained, images, tmp_path):
    found = search(trained, images, tmp_path / "run")
    assert {row["policy"] for row in found["best"]} == {"3-1-7", "43-18-18", "0", "39"}
    assert [row["combined"] for row in found["best"]] == sorted(row["combined"] for row in found["best"])
    assert len(found["hybrid"].split("+")) == 2 and found["below_threshold"] == 0
    assert all(0 < row["privacy"] < 1.01 and row["accuracy"] < -0.99 for row in found["policies"])
    with pytest.raises(UserError, match="holds a finished run"):
        search(trained, images, tmp_path / "run")


def test_a_stopped_search_continues(trained, images, tmp_path):
    straight = search(trained, images, tmp_path / "straight")
    (tmp_path / "cut" / "partial").mkdir(parents=True)
    row = {"index": 1, "image": "43-18-18", "privacy": [9.0, 9, 9, 9], "accuracy": [-1.0, -1]}
    (tmp_path / "cut" / "partial" / "0.jsonl").write_text(json.dumps(row) + "\n")
    config = (tmp_path / "straight" / "config.yaml").read_text()
    (tmp_path / "cut" / "config.yaml").write_text(config)
    found = search(trained, images, tmp_path / "cut", "--resume", "auto")
    assert [row["privacy"] for row in found["policies"]][1] == 9.0  # what was scored is not scored again
    assert found["policies"][0]["privacy"] == straight["policies"][0]["privacy"]


@pytest.mark.parametrize(
    "options, words",
    [
        (["--policies", "3-50"], "operation 50"),
        (["--batch", "1"], "--batch must be at least 2"),
        (["--batches", "99"], "is more than 17 images"),
        (["--number", "0"], "--number must be at least 1"),
        (["--checkpoint", "/no/such.pt"], "/no/such.pt"),
    ],
)
def test_bad_input(trained, images, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        search(trained, images, tmp_path / "run", *options)
