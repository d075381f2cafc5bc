"""The figure of sentences: what is painted how, and what is refused."""

import json
import sys

import pytest
from PIL import Image

import scripts.sentence_figure as script
from utils.errors import run_command

OWN = ["the", "cat", "sat", "down", "."]


@pytest.fixture
def runs(tmp_path):
    """Return two folders of runs on two sentences each: the first is right, the second has words moved and wrong."""
    folders = []
    for name, found in (("right", OWN), ("other", ["cat", "the", "sat", "bird", "."])):
        folder = tmp_path / name
        folder.mkdir()
        rows = [{"index": place, "original": OWN, "input": OWN, "reconstruction": found} for place in (0, 1)]
        (folder / "sentences.json").write_text(json.dumps(rows))
        folders.append(folder)
    return folders


def draw(monkeypatch, runs, titles, output, *more):
    words = ["", "--runs", *map(str, runs), "--titles", *titles, "--output", str(output), *map(str, more)]
    monkeypatch.setattr(sys, "argv", words)
    run_command(script.main)


def test_each_sentence_is_followed_by_what_every_run_has_of_it(runs):
    rows = script.blocks(runs, ["DLG", "TAG"], 2)
    assert [name for name, _, _ in rows] == ["written", "DLG", "TAG"] * 2
    assert rows[1][2] == ["exact"] * 5
    assert rows[2][2] == ["moved", "moved", "exact", "wrong", "exact"]


def test_lines_hold_every_token_once_and_none_passes_the_edge():
    tokens, width = ["word"] * 30, 3.0
    lines = script.lines_of(tokens, width)
    assert [place for line in lines for _, place in line] == list(range(30)) and len(lines) > 1
    assert all(at + script.LETTER * 4 + script.GAP <= width for line in lines for at, _ in line)
    assert script.lines_of(["x" * 1000], width) == [[(0.0, 0)]]  # wider than a line: alone in one


def test_a_figure_grows_with_its_sentences(runs, tmp_path, monkeypatch):
    sizes = []
    for number in (1, 2):
        draw(monkeypatch, runs, ["DLG", "TAG"], tmp_path / "figure.png", "--number", number, "--width", 4)
        with Image.open(tmp_path / "figure.png") as figure:
            sizes.append(figure.size)
    assert sizes[0][0] == sizes[1][0] == 440 and sizes[0][1] < sizes[1][1]


@pytest.mark.parametrize(
    ("titles", "number", "says"),
    [
        (["DLG"], 1, "--titles has 1 entries for 2 runs"),
        (["DLG", "TAG"], 3, "holds 2 sentences, 3 are wanted"),
        (["DLG", "TAG"], 0, "--number must be 1 or more"),
    ],
)
def test_refuses_in_one_line_and_writes_nothing(runs, tmp_path, monkeypatch, capsys, titles, number, says):
    with pytest.raises(SystemExit) as raised:
        draw(monkeypatch, runs, titles, tmp_path / "figure.png", "--number", number)
    assert raised.value.code == 2 and says in capsys.readouterr().err
    assert not (tmp_path / "figure.png").exists()


def test_refuses_runs_on_different_sentences_and_folders_without_any(runs, tmp_path, monkeypatch, capsys):
    rows = [{"index": 0, "original": ["a"], "input": ["a"], "reconstruction": ["a"]}]
    (runs[1] / "sentences.json").write_text(json.dumps(rows))
    for second, says in ((runs[1], "attacked different sentences"), (tmp_path, "holds no sentences.json")):
        with pytest.raises(SystemExit):
            draw(monkeypatch, [runs[0], second], ["DLG", "TAG"], tmp_path / "figure.png", "--number", 1)
        assert says in capsys.readouterr().err
    assert not (tmp_path / "figure.png").exists()
