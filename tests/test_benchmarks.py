"""The benchmarks measure what they say: equal work on both sides, ratios the right way up."""

import json

import pytest
import torch

from benchmarks.interleaved_timing import Loop, Table, interleave, stop, take_turns
from benchmarks.processes import efficiency, parts, run
from benchmarks.training import batch, official_shuffle, ours, plain
from benchmarks.verdicts import findings, rows_of, verdict
from models.jigsaw import Jigsaw, shuffle_patches
from utils.errors import UserError


def test_candidates_take_turns_in_rotating_order():
    seen = []
    times = interleave({name: (lambda name=name: seen.append(name)) for name in "ab"}, 2, repeat=2)
    assert "".join(seen) == "ab" + "aabb" + "bbaa"
    assert [len(times[name]) for name in "ab"] == [2, 2]


def counting(iterations: int) -> Loop:
    """An attack of so many iterations, a turn of which are three; it returns their number."""

    def attack(tick) -> int:
        for _ in range(iterations):
            tick()
        return iterations

    return Loop(attack, steps=3)


def test_attacks_take_turns_and_one_that_has_ended_is_not_waited_for():
    loops = {"one": counting(9), "other": counting(100)}
    times = take_turns(loops, 2)
    assert [len(found) for found in times.values()] == [2, 2]
    assert [loops["one"].finish(), loops["one"].finish()] == [9, 9]
    with pytest.raises(UserError, match="had ended before its last turn"):
        loops["one"].advance(3)
    stop(loops)
    assert loops["other"].ended and loops["other"].result is None
    with pytest.raises(UserError, match="'short' ended 2 iterations before its turn did"):
        take_turns({"short": counting(4)}, 1)


def test_ratios_are_medians_of_the_same_round(tmp_path, capsys):
    table, times = Table(3), {"one": [1.0, 2.0, 4.0], "other": [3.0, 4.0, 4.0]}
    assert table.add("gain", times, "one", "other") == 2
    assert table.add("overhead", times, "one", "other", overhead=True) == 0.5
    assert table.rows[0]["quartiles"] == [1.5, 2.5]


def test_the_official_shuffle_is_ours_by_detours():
    images = batch(2).images
    mask, source = Jigsaw((14, 14), 0.3, seed=1).draw()
    assert official_shuffle(images, Jigsaw((14, 14), 0.3, seed=1)).equal(shuffle_patches(images, source, 16))


def test_both_steps_train_the_same_model():
    """With the jigsaw off, timm's loop and our trainer take the same steps from the same weights."""
    images, device = batch(1), torch.device("cpu")
    one, other = plain("deit_tiny", images, device), ours("deit_tiny", images, device, ratio=0.0)
    one.model.load_state_dict(other.model.state_dict())
    losses = [[float(step()) for _ in range(3)] for step in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][2] < losses[0][0]


@pytest.mark.parametrize(
    "ratio, quartiles, goal, said",
    [
        (0.5, (0.4, 0.51), "<= 0.52", "reached"),
        (1.0, (0.9, 1.1), "<= 1.01", "reached, open"),
        (1.02, (1.0, 1.1), "<= 1.01", "missed, open"),
        (1.55, (1.54, 1.56), "<= 0.3", "missed"),
        (8.0, (8.0, 9.0), ">= 8", "reached"),
        (3.0, (2.9, 3.1), ">= 3.2", "missed"),
    ],
)
def test_a_verdict_is_that_of_the_median_and_open_where_a_quartile_differs(ratio, quartiles, goal, said):
    assert verdict(ratio, quartiles, goal) == said


def test_files_without_comparisons_say_what_they_found(tmp_path):
    cases = {
        "joint": ({"verdict": "No image comes back."}, ["joint: No image comes back."]),
        "mjp": ({"acc1": 91.257, "images": 10, "epochs": 3}, ["mjp: accuracy 91.26 % of 10 images, 3 epochs"]),
        "sync": ({"passed": True}, ["sync: passed"]),
        "ats": ({"privacy against psnr": [-0.5, -0.9, 0.1]}, ["ats: privacy against psnr: -0.50 [-0.90, 0.10]"]),
        "step": ({"rows": [{"what": "a", "ratio": 1.0, "goal": "<= 1"}], "notes": ["b"]}, ["step: b"]),
        "victims": ({"rows": [{"what": "a", "ratio": 2.0, "goal": ""}]}, ["victims: a: 2.000, no goal"]),
    }
    for name, (content, said) in cases.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        assert findings(tmp_path / f"{name}.json") == said


def test_rows_with_a_goal_are_gathered_and_other_files_refused(tmp_path):
    table, times, file = Table(2), {"ours": [1.0, 1.0], "peer": [2.0, 2.0]}, tmp_path / "one.json"
    table.add("gain", times, "ours", "peer", ">= 1.5")
    table.add("no goal", times, "ours", "peer")
    table.write(file)
    assert rows_of(file) == [["gain", "2.000", "2.000 to 2.000", ">= 1.5", "reached"]]
    file.write_text('{"rows": [{"goal": "fast", "what": "x", "ratio": 1, "quartiles": [1, 1]}]}')
    with pytest.raises(UserError, match="goal 'fast'"):
        rows_of(file)
    file.write_text("[]")
    with pytest.raises(UserError, match="not what a benchmark writes"):
        rows_of(file)


def test_processes_are_charged_their_start_and_items_what_they_take():
    start, item = parts((2, 12.0), (16, 40.0))
    assert (start, item) == (8.0, 2.0)
    assert efficiency(start, item, 16, 1) == 1.0
    assert efficiency(start, item, 16, 4) == 40 / (4 * (8 + 2 * 4))
    assert efficiency(0.0, 1.0, 5, 4) == 5 / (4 * 2)  # one share is longer, and the others wait


def test_a_job_that_fails_is_refused_with_what_it_said():
    with pytest.raises(UserError, match="failed on 1 processes: .*no_such_script.py"):
        run(["no_such_script.py"], "number", 1, 2)
