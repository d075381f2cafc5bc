"""utils/ownership.py: what in a folder is a run's, and that nothing else is ever touched."""

import json
import os
from pathlib import Path

import pytest
import torch

from utils import ownership
from utils.distributed import Processes
from utils.errors import UserError
from utils.ownership import EARLIER, MARK, MOVING, PICTURES, TRAINED, foreign, listed, own_files, put_back, set_aside
from utils.runs import Run, open_run

ALONE = Processes(0, 1, torch.device("cpu"))
OLD = "output: runs/a\nseed: 0\ndevice: cpu\noverwrite: false\n"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"content of {name}")


def train(folder: Path, **options) -> None:
    """A finished run with weights and a figure."""
    with open_run(str(folder), OLD, ALONE, **options) as run:
        run.start()
        write(folder, "last.pt")
        run.results({})


def unmarked(folder: Path) -> Path:
    """A run folder of before there was a mark."""
    write(folder, "log.txt", "results.json", "last.pt", "originals/0000_a.png", "tb/events.out.tfevents.1.host")
    write(folder, "figures/curve.png", "figures/curve.pdf")
    (folder / "config.yaml").write_text(OLD)
    return folder


MINE = (
    "notes.txt", "figures/mine.png", "originals/mine.png", "tb/mine", "best.pt.bak", "more/last.pt", "partial/rows.csv",
)  # fmt: skip


@pytest.mark.parametrize("marked", [True, False])
def test_overwrite_leaves_what_no_run_has_written(tmp_path, marked):
    train(tmp_path) if marked else unmarked(tmp_path)
    write(tmp_path, *MINE)
    mine = {name: (tmp_path / name).read_bytes() for name in MINE}
    train(tmp_path, overwrite=True)
    after = contents(tmp_path)
    assert {name: after.get(name) for name in MINE} == mine
    assert after.keys() - mine.keys() == {MARK, "config.yaml", "environment.json", "log.txt", "results.json", "last.pt"}


@pytest.mark.parametrize("name", ["originals/a.png", "figures/a.png", "last.pt", "results.json", "config.yaml", "a"])
@pytest.mark.parametrize("options", [{}, {"overwrite": True}])
def test_a_folder_without_a_run_is_refused_whatever_it_holds(tmp_path, name, options):
    """Names that runs use are no proof of one."""
    write(tmp_path, name)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="and no run: choose another, which is new or empty"):
        Run(str(tmp_path), OLD, ALONE, **options)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", ["output: x\nseed: 1\n", "- a\n", "{", "output: [x"])
def test_a_config_of_something_else_is_no_run(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    write(tmp_path, "results.json", "log.txt")
    assert listed(tmp_path) is None and foreign(tmp_path)


def test_what_systems_put_into_folders_does_not_count(tmp_path):
    for name in (".DS_Store", "Thumbs.db", "lost+found/x", "._a", ".gitkeep", ".config.yaml.12.tmp"):
        write(tmp_path, name)
    before = contents(tmp_path)
    train(tmp_path)
    del before[".config.yaml.12.tmp"]  # of a run that was killed at its first write
    assert before.items() <= contents(tmp_path).items()


@pytest.mark.parametrize("name", [".git/config", ".env", "data/a.png", ".hidden"])
def test_hidden_files_and_folders_of_people_do(tmp_path, name):
    write(tmp_path, name)
    with pytest.raises(UserError, match="and no run"):
        Run(str(tmp_path), OLD, ALONE)


def test_a_run_may_live_inside_another_and_survives_it(tmp_path):
    inner, deeper = tmp_path / "attack", tmp_path / "more" / "eval"
    train(inner)
    train(deeper)
    before = contents(inner), contents(deeper)
    train(tmp_path)  # the folder holds nothing but runs
    train(tmp_path, overwrite=True)
    assert (contents(inner), contents(deeper)) == before
    write(inner, "figures/mine.png")
    train(inner, overwrite=True)
    assert (inner / "figures" / "mine.png").exists() and (tmp_path / "last.pt").exists()


def test_a_figure_that_is_there_already_stays(tmp_path):
    from reports.charts import new_figure

    with open_run(str(tmp_path), OLD, ALONE, outputs=()) as run:
        run.start()
        write(tmp_path, "figures/b.png")
        run.figures({"a": new_figure(1, 1), "b": new_figure(1, 1), "c [1]": new_figure(1, 1)})
        run.results({})
    assert (tmp_path / "figures" / "b.png").read_text() == "content of figures/b.png"
    assert "stays" in (tmp_path / "log.txt").read_text()
    made = {path.name for path in own_files(tmp_path) if path.parent.name == "figures"}
    assert made == {"a.png", "a.pdf", "c [1].png", "c [1].pdf"}


def test_a_file_in_the_way_of_a_new_run_is_not_replaced(tmp_path):
    train(tmp_path, outputs=())
    write(tmp_path, "best.pt")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="best.pt' was written by no run"):
        train(tmp_path, overwrite=True)
    assert contents(tmp_path) == before


def test_a_mark_reaches_neither_out_of_its_folder_nor_through_links(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    write(other, "a.png", "0000_a.png")
    train(run, outputs=(*TRAINED, *PICTURES))
    (run / "originals").symlink_to(other)
    mark = json.loads((run / MARK).read_text())
    mark["files"] += ["../other/a.png", str(other / "a.png"), "**/a.png", 3, "", "a/b/c"]
    (run / MARK).write_text(json.dumps(mark))
    before = contents(other)
    train(run, overwrite=True)
    assert contents(other) == before and (run / "originals").is_symlink()


@pytest.mark.parametrize("way", ["aside", "back"])
def test_killed_at_any_moment_of_a_replacement_the_run_is_whole(tmp_path, monkeypatch, way):
    """Every move of a file or folder may be the last thing a process does."""
    moves, replace, left = 0, os.replace, 0

    def counted(source, target):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        replace(source, target)

    while True:
        folder = tmp_path / str(moves)
        unmarked(folder)
        before = contents(folder)
        left = 10**6
        if way == "back":
            set_aside(folder)
            write(folder, "config.yaml")
        left = moves
        monkeypatch.setattr(ownership.os, "replace", counted)
        try:
            set_aside(folder) if way == "aside" else put_back(folder)
            done = True
        except KeyboardInterrupt:
            done = False
        monkeypatch.setattr(ownership.os, "replace", replace)
        kept = any((folder / name).exists() for name in ("results.json", "last.pt"))
        put_back(folder, keep_new=kept)
        assert contents(folder) == before and not (folder / MOVING).exists() and not (folder / EARLIER).exists()
        moves += 1
        if done:
            break
    assert moves > 6


def test_a_link_to_a_folder_is_that_folder(tmp_path):
    train(tmp_path / "run")
    (tmp_path / "link").symlink_to("run")
    with pytest.raises(UserError, match="holds a finished run"):
        Run(str(tmp_path / "link"), OLD, ALONE)
    for path in (tmp_path / "run" / "last.pt", tmp_path / "link" / "last.pt"):
        with pytest.raises(UserError, match="which this run reads"):
            Run(str(tmp_path / "link"), OLD, ALONE, overwrite=True, inputs=[str(path)])


@pytest.mark.parametrize("below", ["", "/run"])
def test_a_link_to_nothing_and_a_file_are_no_folder_from_the_start(tmp_path, below):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "file").touch()
    for name, words in (("link", "is a link to '.*gone', which does not exist"), ("file", "is a file")):
        folder = f"{tmp_path}/{name}{below}"
        with pytest.raises(UserError, match=f"output folder '{folder}': '.*{name}' {words}"):
            open_run(folder, OLD, ALONE).__enter__()
        with pytest.raises(UserError, match=words):
            ownership.refuse_others(Path(folder), (), "this script")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]
