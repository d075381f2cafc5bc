"""reports/watch.py and utils/progress.py: how long it will take is said before the first result."""

import torch

from reports import watch as reports_watch
from reports.watch import FIRST_LINE, stage_lines, watcher
from utils import progress
from utils.progress import LINE_EVERY, listening, tell, track


class Clock:
    """Time that passes when it is told to, and the lines logged meanwhile."""

    def __init__(self, monkeypatch):
        self.now, self.lines = 100.0, []
        for module in (reports_watch, progress):
            monkeypatch.setattr(module.time, "monotonic", lambda: self.now)

    def log(self, line: str) -> None:
        self.lines.append(line)


def test_an_optimisation_says_after_seconds_how_long_it_and_all_images_take(monkeypatch):
    clock = Clock(monkeypatch)
    watch = watcher(clock, 0, [3], None, after=4)
    for iteration in range(100):
        watch(iteration, 100, lambda: (torch.zeros(1), torch.tensor([0.25])))
        clock.now += 1.0
    assert len(clock.lines) == 1 + int((99 - FIRST_LINE) // LINE_EVERY)
    assert clock.lines[0] == "image 3: iteration 3/100, objective 0.25, ETA 0:01:37, of all images 0:08:17"


def test_a_campaign_says_after_its_first_result_how_long_the_rest_takes(monkeypatch):
    for seconds, lines in ((10.0, ["attack: 1/5 (20 %), ETA 0:00:40", "attack: 4/5 (80 %), ETA 0:00:10"]), (1.0, [])):
        clock = Clock(monkeypatch)
        for _ in track(range(5), 5, "attack", clock.log):
            clock.now += seconds
        assert clock.lines == lines


def test_an_attack_by_equations_says_how_long_its_stage_takes(monkeypatch):
    clock = Clock(monkeypatch)
    tell("unheard", 1, 2)
    with listening(stage_lines(clock.log, 3, after=4)):
        for stage, seconds in (("quick", 0.1), ("slow", 1.0)):
            for step in range(20):
                tell(stage, step, 20)
                clock.now += seconds
    assert clock.lines == ["image 3: slow 2/20, at most 0:00:18 of it left; 4 more to come"]
