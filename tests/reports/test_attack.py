"""reports/attack.py: pictures, table and page of a campaign, safe and whole whatever the images are called."""

import csv
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from eval.lpips import TRUNKS
from eval.reconstruction import METRICS
from reports import attack as attack_report
from reports.attack import (
    ERROR_SCALE,
    SHOWN_IN_REPORT,
    error_map,
    file_name,
    save_pictures,
    summary_text,
    write_page,
    write_report,
)
from reports.metrics import telling, write_csv
from reports.page import SORT
from utils.statistics import success, summarize

REFINES = [key for key, metric in METRICS.items() if metric.refines]
HOSTILE = "<script>alert('1')<script> \"quoted\" & <img src=x onerror=alert(2)>"
THREAT_MODEL = {"attacker": "honest but curious", "MJP": "method"}


class Page(HTMLParser):
    """What a browser would make of a page: its tags with their attributes, and its text without the script."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text.replace(SORT, ""))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for found, attributes in self.tags if found == tag]


def scores(index: int) -> dict[str, float]:
    """Alike but for those that are left out where they are."""
    apart = {key: 12.0 + 2 * place + index for place, key in enumerate(REFINES)}
    return {key: 10.0 + index for key in METRICS} | apart


def victims(number: int, name: str = "cat.png") -> list[dict]:
    """Rows as attack.py writes them: the first reconstruction perfect, its SSIM and every masked score undefined."""
    rows = []
    for index in range(number):
        row = {"index": index, "image": f"/data/{index}_{name}", "label": 3} | scores(index)
        rows.append(row | {"psnr_masked": math.nan, "rank": 190 + index})
    rows[0] |= {"psnr": math.inf, "ssim": math.nan}
    return rows


def views(number: int, shuffled: bool = False) -> dict[str, Tensor]:
    originals = torch.rand(number, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"originals": originals, "reconstructions": originals * 0.5} | (
        {"inputs": originals.flip(2)} if shuffled else {}
    )


def write(folder: Path, rows: list[dict], command: str = "python attack.py", shuffled: bool = False) -> Page:
    save_pictures(folder, rows[:SHOWN_IN_REPORT], views(len(rows[:SHOWN_IN_REPORT]), shuffled))
    summary = summarize(rows, METRICS) | {"success": success(rows)}
    write_page(folder, command, "april", "No image comes back: none.", rows, METRICS, summary, THREAT_MODEL)
    return Page((folder / "report.html").read_text())


@pytest.mark.parametrize(("shuffled", "pictures"), [(False, 3), (True, 4)])
def test_the_page_escapes_names_and_commands_and_needs_nothing_else(tmp_path, shuffled, pictures):
    rows = victims(2, HOSTILE.replace("/", "-") + ".png")
    parsed = write(tmp_path, rows, f"python attack.py --images '{HOSTILE}'", shuffled)
    sources = [tag[key] for _, tag in parsed.tags for key in ("src", "href") if key in tag]
    assert len(sources) == 2 * (3 + pictures) + 1  # of the two victims, at a glance and in the table, and the histogram
    assert all(source.startswith("data:image/") for source in sources)
    assert len(parsed.all("script")) == 1 and parsed.all("script")[0] == {}
    assert not any(key.startswith("on") for _, attributes in parsed.tags for key in attributes)
    text = (tmp_path / "report.html").read_text()
    assert "url(" not in text and "@import" not in text
    assert parsed.text.count(HOSTILE) >= 3
    assert [attributes["alt"] for attributes in parsed.all("img")][0].startswith("original of 0_<script>")
    assert ("model input" in parsed.text) == shuffled


def test_the_page_shows_every_score_with_its_meaning_and_who_knows_what(tmp_path):
    parsed = write(tmp_path, victims(3))
    for key, metric in METRICS.items():
        assert (str(metric) in parsed.text) == (key != "psnr_masked"), key  # undefined for every image
        assert (metric.meaning in parsed.text) == (key != "psnr_masked"), key
    assert len(parsed.all("button")) == len(METRICS)  # the name, and one score fewer
    values = [attributes["data-value"] for attributes in parsed.all("td") if "data-value" in attributes]
    named = [key for key in METRICS if key != "psnr_masked"]
    first = dict(zip(named, values[1 : len(METRICS)], strict=True))
    assert values[0] == "0000_0_cat" and first["psnr"] == "Infinity" and first["ssim"] == ""
    assert all(first[key] == str(scores(0)[key]) for key in named[2:])
    assert "∞" in parsed.text and "honest but curious" in parsed.text and "rank" in parsed.text
    assert "scores 11 dB on average" in parsed.text  # the mean of psnr_baseline
    assert "april" in parsed.text[: parsed.text.index("dB")] and "No image comes back. none." in parsed.text


def test_every_victim_is_in_the_table_and_the_first_are_pictured(tmp_path):
    parsed = write(tmp_path, victims(SHOWN_IN_REPORT + 3))
    assert len(parsed.all("tbody")) == 1 + SHOWN_IN_REPORT + 3  # the first is the summary's
    pictures = parsed.all("img")
    assert len(pictures) == 9 + 1 + 3 * SHOWN_IN_REPORT
    assert all(picture["loading"] == "lazy" for picture in pictures[10:])
    assert f"the first {SHOWN_IN_REPORT} images are pictured, 3 more are in the folders" in parsed.text


@pytest.mark.parametrize("baseline", [True, False])
def test_the_histogram_marks_what_is_no_leak_where_that_is_known(tmp_path, monkeypatch, baseline):
    seen = {}
    draw = attack_report.histogram
    monkeypatch.setattr(attack_report, "histogram", lambda values, **terms: seen.update(terms) or draw(values, **terms))
    write(tmp_path, [row | ({} if baseline else {"psnr_baseline": math.inf}) for row in victims(3)])
    marks = dict(seen["marks"])
    assert marks.pop("no leak (11 dB)", None) == (11.0 if baseline else None)
    assert len(marks) == 1  # the threshold


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_page_without_a_single_finite_score_is_still_a_page(tmp_path, value):
    rows = [row | {key: value for key in METRICS if key != "seconds"} for row in victims(2)]
    parsed = write(tmp_path, rows)
    assert "there is no PSNR to draw" in parsed.text
    assert ("100 %" if value > 0 else "0 %") in parsed.text


def test_pictures_are_saved_under_one_name_per_victim(tmp_path):
    rows, batch = victims(3, "x" * 300 + ".png"), views(3, shuffled=True)
    batch["reconstructions"] = batch["originals"] * 3 - 1
    save_pictures(tmp_path, rows, batch)
    for kind, images in batch.items():
        assert sorted(path.name for path in (tmp_path / kind).iterdir()) == [file_name(row) for row in rows]
        for row, image in zip(rows, images, strict=True):
            with Image.open(tmp_path / kind / file_name(row)) as saved:
                assert (to_tensor(saved) - image.clamp(0, 1)).abs().max() <= 0.5001 / 255


def test_names_of_pictures_are_told_apart_by_their_index():
    names = {file_name({"index": index, "image": image}) for index in (0, 1) for image in ("a/b.png", "a/b.c.jpg")}
    assert names == {"0000_b.png", "0001_b.png", "0000_b.c.png", "0001_b.c.png"}


def test_error_maps_get_brighter_with_the_error_up_to_their_scale():
    original = torch.full((3, 1, 5), 0.4)
    error = torch.tensor([0, 0.1, 0.3, ERROR_SCALE, 0.6])
    picture = error_map(original + error, original)
    assert picture.shape == (3, 1, 5)
    luminance = (picture[:, 0] * torch.tensor([0.2126, 0.7152, 0.0722])[:, None]).sum(0)
    assert luminance[0] < 0.01 and (luminance[:4].diff() > 0.05).all() and luminance[3] == luminance[4]
    torch.testing.assert_close(error_map(original - error.clamp(max=0.3), original)[:, :, :3], picture[:, :, :3])


def test_the_summary_names_every_score():
    rows = victims(3)
    lines = summary_text(summarize(rows, METRICS) | {"success": success(rows)}, METRICS, rows).splitlines()
    assert len(lines) == 1 + len(METRICS)
    named = [metric for key, metric in METRICS.items() if key != "psnr_masked"]  # undefined for every image
    for line, metric in zip(lines[1:], named, strict=False):
        assert line.startswith(str(metric))
    assert lines[1].split()[-5:] == ["0.7071", "2", "and", "1", "perfect"]
    assert lines[-1] == "33 % of 3 images above 25 dB"


@pytest.mark.parametrize(
    ("key", "values", "shown"),
    [
        ("psnr_shown", (10.0, 11.05), False),
        ("psnr_shown", (10.0, 11.2), True),
        ("psnr_patches", (10.1, 30.0), True),
        ("psnr_visible", (math.nan, 11.0), True),
        ("psnr_visible_raw", (10.0, 11.0), False),
    ],
)
def test_scores_that_say_what_another_says_are_left_out(tmp_path, key, values, shown):
    rows = [row | dict.fromkeys(REFINES, row["psnr"]) for row in victims(4)[:2]]
    rows[0]["psnr"] = 10.0
    rows = [row | dict.fromkeys(REFINES, row["psnr"]) | {key: value} for row, value in zip(rows, values, strict=True)]
    assert (key in telling(rows, METRICS)) == shown
    high = [row | {"psnr": 86.0, "psnr_shown": 86.0, "psnr_visible": 86.0, "psnr_visible_raw": 81.0} for row in rows]
    assert "psnr_visible_raw" not in telling(high, METRICS)  # no 8-bit value differs
    parsed = write(tmp_path, rows)
    assert (str(METRICS[key]) in parsed.text) == shown
    assert "Left out, as they say what another score says: " in parsed.text


def test_the_table_of_victims_reads_back(tmp_path):
    rows = victims(3, HOSTILE.replace("/", "-") + ", with a comma.png")
    rows[2]["restart"] = 5  # what only some attacks report
    write_csv(tmp_path, rows)
    with open(tmp_path / "per_image.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["image"] for row in read] == [row["image"] for row in rows]
    assert [float(row["psnr"]) for row in read] == [math.inf, 11.0, 12.0]
    assert [row["restart"] for row in read] == ["", "", "5"]


class Logged:
    """As much of a run as the report needs."""

    def __init__(self, folder: Path):
        self.folder, self.lines = folder, []

    def log(self, message: str) -> None:
        self.lines.append(message)


def test_a_report_is_page_table_log_and_results(tmp_path):
    rows, run = victims(3), Logged(tmp_path)
    save_pictures(tmp_path, rows, views(3))
    results = write_report(run, rows, METRICS, "april", THREAT_MODEL, threshold=11.5)
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert results["summary"]["success"]["mean"] == 2 / 3 and results["threat_model"] == THREAT_MODEL
    assert results["summary"]["psnr"] == {"mean": 11.5, "std": pytest.approx(0.5**0.5), "n": 2, "infinite": 1}
    assert [row["psnr"] for row in results["per_image"]] == [None, 11.0, 12.0]
    assert results["attack"] == "april" and results["verdict"].startswith(
        "2 of 3 images come back: april reconstructs 2"
    )
    assert run.lines == [f"{results['verdict']}\n{summary_text(results['summary'], METRICS, rows)}"]
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"per_image.csv", "report.html"}


def test_victims_without_shuffled_patches_have_no_input_to_show(tmp_path):
    rows = victims(2)
    save_pictures(tmp_path, rows[:1], views(1, shuffled=True))
    save_pictures(tmp_path, rows[1:], views(1))
    summary = summarize(rows, METRICS) | {"success": success(rows)}
    write_page(tmp_path, "", "april", "", rows, METRICS, summary, THREAT_MODEL)
    names = [picture["alt"] for picture in Page((tmp_path / "report.html").read_text()).all("img")[7:]]
    assert [name.split(" of ")[0] for name in names] == [
        "original", "model input", "reconstruction", "absolute error", "original", "reconstruction", "absolute error",
    ]  # fmt: skip


def test_numbers_are_stated_in_one_way(tmp_path):
    rows = victims(4)
    save_pictures(tmp_path, rows, views(4))
    summary = summarize(rows, METRICS) | {"success": success(rows, threshold=11.5)}
    rows = [row | {"psnr_baseline": 11.23456 + row["index"]} for row in rows]
    summary |= summarize(rows, ["psnr_baseline"])
    write_page(
        tmp_path, "python attack.py", "april", "3 of 4 images come back: x.", rows, METRICS, summary, THREAT_MODEL
    )
    text = (tmp_path / "report.html").read_text()
    assert len(re.findall(r"75 %</strong><span>of 4 images above 11.5 dB", text)) == 1
    head = text[: text.index("Image by image")]
    assert set(re.findall(r"12\.7\d*", head)) == {"12.73"} and set(re.findall(r"1\.29\d*", head)) == {"1.291"}


@pytest.mark.parametrize("net", TRUNKS)
@pytest.mark.parametrize("mark", ["", "_unverified"])
def test_every_lpips_there_can_be_is_reported(net, mark):
    """A score whose name the report does not know would be measured and left out."""
    assert METRICS[f"lpips_{net}{mark}"].label.startswith("LPIPS")
