"""report.html of attack.py in a real Chromium: drawn, sorted by mouse and keyboard, on a desk and on a phone."""

import fcntl
import json
import math
import os
import select
import shlex
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from eval.reconstruction import METRICS
from reports.attack import save_pictures, write_page
from utils.statistics import success, summarize

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome to open the report in")
FLAGS = shlex.split(
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-dev-shm-usage --remote-debugging-pipe"
)
NAME = "<img src=x onerror=alert(1)><script>document.title='run'<script>"  # a file may be called that


class Browser:
    """Chromium, driven over its debugging pipe (file descriptors 3 and 4; JSON messages that end in a zero byte)."""

    def __init__(self, profile: Path):
        pipes = [os.pipe(), os.pipe()]
        (its_in, self.out), (self.inp, its_out) = (
            [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in pair] for pair in pipes
        )
        actions = [(os.POSIX_SPAWN_DUP2, its_in, 3), (os.POSIX_SPAWN_DUP2, its_out, 4)]
        actions += [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_WRONLY, 0) for stream in (1, 2)]
        command = [BROWSER, *FLAGS, f"--user-data-dir={profile}"]
        self.process = os.posix_spawn(BROWSER, command, os.environ, file_actions=actions)
        for end in (its_in, its_out, *pipes[0], *pipes[1]):
            os.close(end)
        self.received, self.number, self.session, self.events = b"", 0, None, []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        return self.wait(lambda answer: answer.get("id") == self.number)["result"]

    def wait(self, wanted) -> dict:
        while True:
            while b"\0" not in self.received:
                assert select.select([self.inp], [], [], 60)[0], "the browser does not answer"
                chunk = os.read(self.inp, 1 << 16)
                assert chunk, "the browser is gone"
                self.received += chunk
            line, self.received = self.received.split(b"\0", 1)
            answer = json.loads(line)
            if wanted(answer):
                return answer
            self.events.append(answer)

    def open(self, path: Path, width: int, height: int) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.events = []
        self.send("Page.navigate", url=path.as_uri())
        if not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.wait(lambda answer: answer.get("method") == "Page.loadEventFired")

    def evaluate(self, expression: str):
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, code: int) -> None:
        text = {"Enter": "\r", " ": " "}.get(key, "")
        event = {"key": key, "windowsVirtualKeyCode": code, "text": text}
        self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **event)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def close(self) -> None:
        os.close(self.out)  # it quits without its pipe
        os.close(self.inp)
        os.kill(self.process, signal.SIGTERM)
        os.waitpid(self.process, 0)


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A campaign of 64 small pictures: 60 are pictured; one is perfect, one undefined, one named like an attack."""
    folder, generator, rows = tmp_path_factory.mktemp("run"), torch.Generator().manual_seed(0), []
    for index in range(64):
        name = f"/data/{NAME}.png" if index == 1 else f"/data/photograph_{index}.png"
        scores = [key for key in METRICS if key == "lpips_alex" or "lpips" not in key]  # a campaign has one network
        row = {"index": index, "image": name} | {key: float((37 * index) % 64) for key in scores}
        rows.append(row | {"rank": index})
    rows[3]["psnr"], rows[5]["psnr"], rows[7]["ssim"] = math.inf, math.nan, None
    images = torch.rand(64, 3, 16, 16, generator=generator)
    views = {"originals": images, "inputs": images.flip(2), "reconstructions": images * 0.7}
    save_pictures(folder, rows, views)
    summary = summarize(rows, METRICS) | {"success": success(rows)}
    about = {"labels": "known", "MJP": "<b>T1</b>"}
    command, says = f"python attack.py --images '{NAME}'", "No image comes back: none."
    write_page(folder, command, "april", says, rows, METRICS, summary, about)
    return folder / "report.html"


CELL = "[...document.querySelectorAll('.sortable tbody')].map(body => body.rows[0].cells[{}].dataset.value)"


def column(browser: Browser, place: int) -> list[float]:
    """Values of a column from top to bottom, None where undefined."""
    values = browser.evaluate(CELL.format(place))
    return [float(value.replace("Infinity", "inf")) if value else None for value in values]


def sort_state(browser: Browser) -> list[str | None]:
    return browser.evaluate(
        "[...document.querySelectorAll('.sortable thead th')].map(head => head.getAttribute('aria-sort'))"
    )


def test_the_page_draws_everything_without_complaint_and_fetches_nothing(browser, report):
    browser.open(report, 1400, 900)
    requests = [event["params"] for event in browser.events if event.get("method") == "Network.requestWillBeSent"]
    assert {request["request"]["url"].split(":")[0] for request in requests} <= {"file", "data"}
    assert sum(request["request"]["url"].startswith("file:") for request in requests) == 1
    failures = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled", "Page.javascriptDialogOpening")
    assert [event for event in browser.events if event.get("method") in failures] == []
    assert browser.evaluate("document.title") == "What the shared gradients give to april"
    assert browser.evaluate("document.querySelectorAll('.sortable tbody').length") == 64
    assert browser.evaluate("document.querySelectorAll('.views').length") == 60
    assert NAME in browser.evaluate("document.body.textContent")
    browser.evaluate("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
    loaded = "Promise.all([...document.images].map(image => image.decode())).then(all => all.length)"
    assert browser.evaluate(loaded) == 3 * 3 + 60 * 4 + 1  # at a glance, in the table, and the histogram


def test_the_page_runs_no_script_but_its_own(browser, report):
    browser.open(report, 1400, 900)
    browser.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.ran = 1\">')")
    browser.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))")
    browser.evaluate("new Promise(done => setTimeout(done, 100))")
    assert browser.evaluate("window.ran === undefined")


def test_a_click_on_a_head_sorts_and_another_turns_the_order(browser, report):
    browser.open(report, 1400, 900)
    assert sort_state(browser)[0] == "ascending" and not any(sort_state(browser)[1:])
    box = browser.evaluate(
        "(({x, y, width, height}) => [x + width / 2, y + height / 2])"
        "(document.querySelectorAll('.sortable th button')[1].getBoundingClientRect())"
    )
    browser.evaluate(f"scrollTo(0, {box[1] - 300})")
    for direction in ("ascending", "descending"):
        for kind in ("mousePressed", "mouseReleased"):
            at = {"x": box[0], "y": 300, "button": "left", "clickCount": 1}
            browser.send("Input.dispatchMouseEvent", type=kind, **at)
        assert sort_state(browser)[1] == direction and sum(map(bool, sort_state(browser))) == 1
        values = column(browser, 1)
        assert values[-1] is None and None not in values[:-1]  # undefined values are last either way
        assert values[:-1] == sorted(values[:-1], reverse=direction == "descending")
        assert math.inf in values
        names = browser.evaluate(CELL.format(0))
        pictured = browser.evaluate("[...document.querySelectorAll('.sortable tbody')].map(body => body.innerText)")
        for name, text in zip(names, pictured, strict=True):  # every victim keeps its own pictures
            index = int(name.split("_")[0])
            assert (f"rank\n{index}" in text) == (index < 60)


def test_the_keyboard_sorts_too(browser, report):
    browser.open(report, 1400, 900)
    browser.evaluate("document.querySelector('.toolbar input').focus()")
    for _ in range(3):
        browser.press("Tab", 9)
    assert browser.evaluate("document.activeElement.innerText").startswith("SSIM")
    browser.press("Enter", 13)
    assert sort_state(browser)[2] == "ascending"
    values = column(browser, 2)
    assert values[:-1] == sorted(values[:-1]) and values[-1] is None
    browser.press(" ", 32)
    assert sort_state(browser)[2] == "descending"
    assert browser.evaluate("document.activeElement.innerText").startswith("SSIM")
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert browser.evaluate(outline) == "solid"


def test_pictures_can_be_folded_away(browser, report):
    browser.open(report, 1400, 900)
    tall = browser.evaluate("document.body.scrollHeight")
    browser.evaluate("document.querySelector('.toolbar input').click()")
    assert browser.evaluate("document.body.scrollHeight") < tall - 60 * 150


@pytest.mark.parametrize("width", [400, 800, 1400, 1900])
def test_only_tables_scroll_sideways(browser, report, width):
    browser.open(report, width, 900)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    boxes = "[...document.querySelectorAll('.views img')].map(image => image.getBoundingClientRect())"
    assert browser.evaluate(f"Math.max(...{boxes}.map(box => box.right))") <= width
    assert browser.evaluate(f"Math.min(...{boxes}.map(box => box.width))") >= 140
