"""utils/campaign.py and the campaigns of utils/runs.py: nothing finished is lost, nothing is done twice."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from utils.campaign import Campaign
from utils.distributed import Processes
from utils.errors import AlreadyFinished, UserError
from utils.ownership import PICTURES, REPORT
from utils.runs import Run

IMAGES = [f"photos/{number}.png" for number in range(11)]


class Peers(Processes):
    """One of several processes that never has to wait: the tests call them in turn."""

    def wait(self) -> None:
        pass


def peers(rank: int = 0, world_size: int = 1) -> Peers:
    return Peers(rank, world_size, torch.device("cpu"))


def campaign(folder: Path, rank: int = 0, world_size: int = 1) -> Campaign:
    return Campaign(folder, IMAGES, peers(rank, world_size))


def row(index: int, psnr: float = 1.0) -> dict:
    return {"index": index, "image": IMAGES[index], "psnr": psnr, "exact": False, "note": "ü\u2028\n"}


def batches(mine: Campaign, batch_size: int, together: int = 1) -> list[range]:
    return [batch for group in mine.todo(batch_size, together) for batch in group]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize(("batch_size", "together"), [(1, 1), (1, 4), (4, 2), (20, 1)])
def test_every_image_is_shared_out_once(tmp_path, world_size, batch_size, together):
    processes = [campaign(tmp_path, rank, world_size) for rank in range(world_size)]
    shares = [batches(mine, batch_size, together) for mine in processes]
    assert sorted(index for share in shares for batch in share for index in batch) == list(range(11))
    assert all(0 < len(group) <= together for mine in processes for group in mine.todo(batch_size, together))
    assert all(batch[0] % batch_size == 0 and len(batch) <= batch_size for share in shares for batch in share)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_rows_come_back_as_they_were_in_order(tmp_path):
    rows = [row(index, [math.inf, -math.inf, 1 / 3, 1e-300][index % 4]) for index in range(11)]
    rows[5]["psnr"] = math.nan
    for rank, part in ((1, rows[7:]), (0, rows[:7])):
        campaign(tmp_path, rank, 2).add(part)
    merged = campaign(tmp_path, 0, 2).merge()
    assert math.isnan(merged[5].pop("psnr")) and math.isnan(rows[5].pop("psnr"))
    assert merged == rows
    assert campaign(tmp_path, 1, 2).merge() == []


def test_rows_say_which_image_they_are_about(tmp_path):
    rows = campaign(tmp_path).rows(range(4, 6), [{"psnr": 1.0}, {"psnr": 2.0}], {"seconds": 0.5})
    assert rows[1] == {"index": 5, "image": IMAGES[5], "psnr": 2.0, "seconds": 0.5}
    with pytest.raises(ValueError, match="zip"):
        campaign(tmp_path).rows(range(2), [{}], {})


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (3, 1), (2, 4)])
def test_a_stopped_campaign_continues_with_any_number_of_processes(tmp_path, before, after):
    for mine in [campaign(tmp_path, rank, before) for rank in range(before)]:
        mine.add([row(index) for index in batches(mine, 2)[0]])
    done = set(campaign(tmp_path).finished)
    assert len(done) == 2 * before
    processes = [campaign(tmp_path, rank, after) for rank in range(after)]
    again = [index for mine in processes for batch in batches(mine, 2) for index in batch]
    assert sorted([*again, *done]) == list(range(11))
    for mine in processes:
        for batch in batches(mine, 2):
            mine.add([row(index) for index in batch])
    assert [found["index"] for found in processes[0].merge()] == list(range(11))
    assert campaign(tmp_path).todo(2) == []


@pytest.mark.parametrize("kept", [1, 20, -1])
def test_a_torn_line_costs_its_image_only(tmp_path, kept):
    campaign(tmp_path).add([row(0), row(1), row(2)])
    file = tmp_path / "partial" / "0.jsonl"
    whole, last = file.read_text().rsplit("\n", 1)
    file.write_text(f"{whole}\n{last[:kept]}")
    mine = campaign(tmp_path)
    assert set(mine.finished) == {0, 1}
    mine.add([row(2, psnr=5.0)])
    assert campaign(tmp_path).finished[2]["psnr"] == 5.0
    assert set(campaign(tmp_path).finished) == {0, 1, 2}


def test_a_batch_that_is_half_there_is_done_again(tmp_path):
    campaign(tmp_path).add([row(4)])
    mine = campaign(tmp_path)
    assert batches(mine, 4)[1] == range(4, 8)
    mine.add([row(index, psnr=2.0) for index in range(4, 8)])
    assert campaign(tmp_path).finished[4]["psnr"] == 2.0
    assert range(4, 8) not in batches(campaign(tmp_path), 4)


@pytest.mark.parametrize("change", ["renamed", "fewer"])
def test_other_images_are_refused(tmp_path, change):
    campaign(tmp_path).add([row(9)])
    images = IMAGES[:5] if change == "fewer" else [*IMAGES[:9], "photos/new.png", IMAGES[10]]
    with pytest.raises(UserError, match=r"started with \('photos/9.png'\).*--overwrite"):
        Campaign(tmp_path, images, peers())


@pytest.mark.parametrize("change", ["its own", "one it shares", "gone"])
def test_other_files_under_the_same_names_are_refused(tmp_path, change):
    shared = tmp_path / "checkpoint.pt"
    files = [[tmp_path / f"{number}.png", shared] for number in range(11)]
    own = files[9][0]
    own.write_bytes(b"one")
    shared.write_bytes(b"weights")
    Campaign(tmp_path, IMAGES, peers(), files).add([row(8), row(9)])  # image 8 has no file
    again = Campaign(tmp_path, IMAGES, peers(), files)
    assert again.finished == {8: row(8), 9: row(9)} and again.merge() == [row(8), row(9)]
    if change == "gone":
        own.unlink()
    else:
        (own if change == "its own" else shared).write_bytes(b"others")
    with pytest.raises(UserError, match=r"started with \('photos/9.png'\).*--overwrite"):
        Campaign(tmp_path, IMAGES, peers(), files)


def test_the_main_process_waits_for_the_rows_of_the_others(tmp_path, monkeypatch):
    mine, other, looks = campaign(tmp_path, 0, 2), campaign(tmp_path, 1, 2), []
    left = batches(other, 1)

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        other.add([row(index) for index in left.pop()])

    monkeypatch.setattr("utils.campaign.time.sleep", sleep)
    for batch in batches(mine, 1):
        mine.add([row(index) for index in batch])
    assert len(mine.merge()) == 11
    assert len(looks) == 5 and not left


def test_closing_leaves_nothing_and_no_file_is_made_before_a_row(tmp_path):
    mine = campaign(tmp_path)
    assert not mine.folder.exists()
    mine.add([row(0)])
    campaign(tmp_path, 1, 2).close()
    assert mine.folder.exists()
    mine.close()
    mine.close()
    assert not mine.folder.exists()


def test_rows_survive_a_kill(tmp_path):
    """A process that is killed without warning while it appends leaves every row it reported."""
    code = (
        "import torch; from pathlib import Path; from utils.campaign import Campaign\n"
        "from utils.distributed import Processes\n"
        f"mine = Campaign(Path({str(tmp_path)!r}), {IMAGES!r}, Processes(0, 1, torch.device('cpu')))\n"
        "for (batch,) in mine.todo(1) * 1000:\n"
        "    mine.add([{'index': i, 'image': mine.images[i]} for i in batch])\n"
        "    print(batch[0], flush=True)\n"
    )
    command, root = [sys.executable, "-c", code], Path(__file__).parents[2]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    reported = [int(process.stdout.readline()) for _ in range(4)]
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and reported == [0, 1, 2, 3]
    assert set(campaign(tmp_path).finished) >= set(reported)


OUTPUTS = (*REPORT, *PICTURES)
OPTIONS = "attack: dlg\nattack_options: {lr: 1.0}\noutput: runs/a\ndevice: cpu\nresume: never\n"


def start(folder: Path, config: str = OPTIONS, **options) -> Run:
    run = Run(
        str(folder), config, peers(), state="partial", may_change=("device",), outputs=(*REPORT, *PICTURES), **options
    )
    run.start()
    run.close()
    return run


@pytest.fixture
def unfinished(tmp_path) -> Path:
    start(tmp_path)
    campaign(tmp_path).add([row(0)])
    (tmp_path / "originals").mkdir()
    (tmp_path / "originals" / "0000_a.png").write_bytes(b"picture")
    return tmp_path


def test_a_campaign_without_a_finished_image_starts_again_as_it_likes(tmp_path):
    start(tmp_path)
    assert not start(tmp_path, OPTIONS.replace("dlg", "gradvit")).resumed


def test_an_unfinished_campaign_is_continued_only_when_asked(unfinished):
    with pytest.raises(UserError, match="unfinished run: continue it with --resume auto"):
        start(unfinished)
    assert start(unfinished, resume=True).resumed
    assert set(campaign(unfinished).finished) == {0}


def test_other_options_are_refused_and_named(unfinished):
    before = (unfinished / "config.yaml").read_text()
    for changed in (OPTIONS.replace("dlg", "gradvit"), OPTIONS.replace("{lr: 1.0}", "{}")):
        with pytest.raises(UserError, match=r"\((attack dlg -> gradvit|attack_options.lr 1.0 -> None)\)"):
            start(unfinished, changed, resume=True)
        assert (unfinished / "config.yaml").read_text() == before
    elsewhere = OPTIONS.replace("device: cpu", "device: cuda").replace("runs/a", "runs/b").replace("never", "auto")
    assert start(unfinished, elsewhere, resume=True).changes == "; changed since: device cpu -> cuda"


def test_overwrite_discards_rows_and_pictures_and_nothing_else(unfinished):
    mine = ("notes.txt", "originals/mine.png", "last.pt")
    for name in mine:
        (unfinished / name).write_text("mine")
    assert not start(unfinished, OPTIONS.replace("dlg", "gradvit"), overwrite=True, resume=True).resumed
    found = {str(path.relative_to(unfinished)) for path in unfinished.rglob("*") if path.is_file()}
    assert found == {"run.json", "config.yaml", "environment.json", "log.txt", *mine}


def test_a_finished_campaign_is_left_alone(unfinished, capsys):
    (unfinished / "results.json").write_text("{}")
    campaign(unfinished).close()
    before = {path: path.read_bytes() for path in unfinished.rglob("*") if path.is_file()}
    with pytest.raises(AlreadyFinished):
        start(unfinished, resume=True)
    assert "already finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds a run with other options"):
        start(unfinished, OPTIONS.replace("dlg", "gradvit"), resume=True)
    with pytest.raises(UserError, match="finished run"):
        start(unfinished)
    assert {path: path.read_bytes() for path in unfinished.rglob("*") if path.is_file()} == before


def test_a_campaign_does_not_continue_a_training(tmp_path):
    start(tmp_path)
    (tmp_path / "last.pt").write_bytes(b"")
    with pytest.raises(UserError, match="unfinished run"):
        start(tmp_path, resume=True)
