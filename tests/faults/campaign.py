"""Break real runs in the ways a cluster does, continue them, and compare with runs nothing happened to, bit for bit.

    python tests/faults/campaign.py --output runs/faults                # `make faults`: 200 kills, and the rest
    python tests/faults/campaign.py --output DIR --kills 2 --trials 1   # short

Signals come at a random moment of the seconds that a whole run takes, or exactly inside a write. A trial is drawn from
the seed, its kind and its number, and kept in trials.jsonl: the same command continues a campaign that was stopped.
results.json has the table; a trial that fails leaves its folder. Disks that are really full or read-only are mounted,
which takes root; without it a limit on file sizes and failing calls stand in, and the table says what was left out.
"""

import argparse
import errno
import json
import os
import random
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from processes import Fault, Work, run

# isort: split
import kinds
from jobs import EPOCHS, STEPS, make_jobs

from utils.errors import CONTINUES, UserError, run_command
from utils.files import write_json
from utils.ownership import refuse_others
from utils.progress import duration, track

CONTINUE = "--resume auto"
STOP, DEAD = 128 + signal.SIGTERM, -signal.SIGKILL
Draw = Callable[[random.Random, "Bench"], Fault]


def plan(bench: "Bench", kills: int, trials: int) -> list[tuple[str, str, int, Draw]]:
    """(kind of fault, job, number of trials, how one is drawn)."""
    eighth, twentieth = max(1, kills // 8), max(1, kills // 20)
    image = bench.image

    def moment(rng: random.Random, job: str) -> float:
        return rng.uniform(0, bench.straight(job)[1])

    def at_random(job: str, number: int, expect: int) -> Draw:
        return lambda rng, _: Fault(act=kinds.send(number, moment(rng, job)), expect=(expect,))

    def in_write(most: int) -> Draw:
        def draw(rng: random.Random, _) -> Fault:
            return Fault(
                hook=kinds.killed_in_write(rng.randint(1, most), rng.choice([rng.random(), rng.random(), 1, 2]))
            )

        return draw

    def a_rank(rng: random.Random, _) -> Fault:
        act = kinds.send(signal.SIGKILL, moment(rng, "training on 2"), rng.randrange(2))
        return Fault(act=act, expect=(DEAD, 2), says="another process of this run ended")

    def full(job: str) -> Draw:
        def draw(rng: random.Random, bench: "Bench") -> Fault:
            limit = int(rng.uniform(0.02, 0.95) * bench.largest_file(job))
            return Fault(hook=kinds.file_size_limit(limit), expect=(2,), says=CONTINUE)

        return draw

    def refused(rng: random.Random, _) -> Fault:
        code = rng.choice([errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
        return Fault(hook=kinds.writes_refused(code, rng.randint(2, 12)), expect=(2,), says=CONTINUE)

    def full_disk(rng: random.Random, bench: "Bench") -> Fault:
        size = int(rng.uniform(0.1, 0.95) * bench.folder_size("training"))
        return Fault(
            before=kinds.mounted(f"size={size}"), after=kinds.remounted("size=64m"), expect=(2,), says="No space left"
        )

    def read_only(rng: random.Random, _) -> Fault:
        return Fault(
            before=kinds.mounted("ro"), after=kinds.remounted("rw"), expect=(2,), says="cannot write to output"
        )

    def jumps(rng: random.Random, _) -> Fault:
        return Fault(hook=kinds.wall_clock_jumps(rng.randrange(10**6)), expect=(0,))

    def nan(kind: Callable) -> Draw:
        return lambda rng, _: Fault(hook=kind(rng.randrange(STEPS * EPOCHS)), expect=(2,), says="last good checkpoint")

    def unreadable(rng: random.Random, _) -> Fault:
        what = rng.choice(["folder", "broken link", "pipe", "empty file", "cut file"])
        hook = kinds.image_becomes(image, what, rng.randrange(STEPS * (EPOCHS - 2)))
        return Fault(hook=hook, after=lambda _: kinds.restore(image, content), expect=(2,), says="cannot read image")

    def in_validation(rng: random.Random, _) -> Fault:
        hook = kinds.told_to_stop_in_validation(rng.randint(1, 2 * EPOCHS))  # of the weights and of their average
        return Fault(hook=hook, expect=(STOP,))

    content = image.read_bytes()
    found = [
        ("SIGKILL", "training", kills, at_random("training", signal.SIGKILL, DEAD)),
        ("SIGKILL in a write", "training", eighth, in_write(3 + EPOCHS)),
        ("SIGTERM", "training", eighth, at_random("training", signal.SIGTERM, STOP)),
        ("SIGTERM in validation", "training", twentieth, in_validation),
        ("SIGKILL of one rank", "training on 2", twentieth, a_rank),
        ("file size limit", "training", twentieth, full("training")),
        ("write refused", "training", twentieth, refused),
        ("wall clock jumps", "training", trials, jumps),
        ("NaN loss", "training", trials, nan(kinds.loss_is_nan)),
        ("NaN weight", "training", trials, nan(kinds.weight_is_nan)),
        ("unreadable image", "training", 2 * trials, unreadable),
        ("SIGKILL", "attack", twentieth, at_random("attack", signal.SIGKILL, DEAD)),
        ("SIGKILL in a write", "attack", twentieth, in_write(24)),
        ("SIGTERM", "attack", trials, at_random("attack", signal.SIGTERM, STOP)),
        ("file size limit", "attack", trials, full("attack")),
        ("SIGKILL", "ImageNet-C", twentieth, at_random("ImageNet-C", signal.SIGKILL, DEAD)),
        ("SIGKILL in a write", "ImageNet-C", twentieth, in_write(180)),
        ("SIGTERM", "ImageNet-C", trials, at_random("ImageNet-C", signal.SIGTERM, STOP)),
        ("SIGKILL", "ATS search", trials, at_random("ATS search", signal.SIGKILL, DEAD)),
    ]
    disks = [("full disk", "training", twentieth, full_disk), ("read-only disk", "training", 1, read_only)]
    if not kinds.can_mount():
        print("left out, mounting takes root: full disk, read-only disk")
    return found + disks * kinds.can_mount()


class Bench:
    """The straight runs, the trials done so far, and how one more is done."""

    def __init__(self, output: Path, seed: int):
        self.output, self.seed = output, seed
        output.mkdir(parents=True, exist_ok=True)
        self.file = output / "trials.jsonl"
        lines = self.file.read_text().split("\n") if self.file.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        self.done = {(row["kind"], row["job"], row["trial"]): row for row in rows}
        self.jobs, self.known = make_jobs(output), {}
        self.image = sorted((output / "digits" / "train" / "3").iterdir())[5]

    def straight(self, name: str) -> tuple[object, float]:
        """What a run of the job leaves when nothing happens to it, and its seconds from the first step to the end."""
        if name not in self.known:
            folder, began = self.output / f"straight {name}", []
            shutil.rmtree(folder, ignore_errors=True)

            def wait(forks: list, work: Work) -> None:
                work.wait_for_first(forks)
                began.append(time.monotonic())

            statuses, lines, seconds = run(self.jobs[name], folder, Fault(act=wait), Work())
            if any(statuses):
                raise UserError(f"the straight run of '{name}' failed: {' / '.join(lines)}")
            self.known[name] = self.jobs[name].compare(folder), seconds
        return self.known[name]

    def largest_file(self, name: str) -> int:
        self.straight(name)
        files = [path for path in (self.output / f"straight {name}").rglob("*") if path.suffix in (".pt", ".html")]
        return max(path.stat().st_size for path in files)

    def folder_size(self, name: str) -> int:
        self.straight(name)
        return sum(path.stat().st_size for path in (self.output / f"straight {name}").rglob("*"))

    def attempt(self, kind: str, name: str, number: int, draw: Draw) -> dict:
        """One trial, unless it was done before: break a fresh run, look at what it left, continue it, compare."""
        if (kind, name, number) in self.done:
            return self.done[kind, name, number]
        job, folder = self.jobs[name], self.output / "trial"
        rng = random.Random(f"{self.seed} {kind} {name} {number}")
        expected, _ = self.straight(name)
        for _ in range(20):  # a run that ended before its fault came is drawn again
            kinds.unmount(folder)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            fault, work = draw(rng, self), Work()
            fault.before(folder)
            statuses, lines, seconds = run(job, folder, fault, work)
            if any(statuses) or 0 in fault.expect:
                break
        problems = [f"ended with {statuses}: {lines}"] * (not {*statuses} <= {*fault.expect})
        for status, line in zip(statuses, lines, strict=True):
            problems += [f"said '{line}'"] * (status == 2 and fault.says not in line)
        try:
            job.whole(folder)
        except Exception as error:
            problems.append(f"a file is not whole: {error!r}")
        lost = 0 if job.finished(folder) else max(0, work.done.value - job.saved(folder))
        fault.after(folder)
        again, errors, _ = run(job, folder, Fault(), Work()) if not job.finished(folder) else ([0], [], 0)
        problems += [f"could not be continued: {errors}"] * any(again)
        if not any(again):
            problems += ["the continued run is not the straight one"] * (job.compare(folder) != expected)
            hidden = [str(path.relative_to(folder)) for path in folder.rglob(".*")]
            problems += [f"left {hidden}"] * bool(hidden)
        row = {"kind": kind, "job": name, "trial": number, "problems": problems, "lost": lost, "unit": job.unit}
        row |= {"done": work.done.value, "seconds_to_end": round(seconds, 2), "line": lines[0][:240]}
        self._keep(row)
        if problems:
            shutil.copytree(folder, self.output / f"failed {kind}, {name} {number}", symlinks=True, dirs_exist_ok=True)
        kinds.unmount(folder)
        return row

    def _keep(self, row: dict) -> None:
        with open(self.file, "a") as file:
            file.write("\n" + json.dumps(row))
            file.flush()
            os.fsync(file.fileno())
        self.done[row["kind"], row["job"], row["trial"]] = row


def summary(rows: list[dict]) -> list[dict]:
    """One row per kind of fault and job: tried, survived, and the work lost, in the job's unit."""
    found = []
    for key in dict.fromkeys((row["kind"], row["job"], row["unit"]) for row in rows):
        own = [row for row in rows if (row["kind"], row["job"], row["unit"]) == key]
        lost = [row["lost"] for row in own]
        found.append(
            dict(zip(("fault", "job", "unit"), key, strict=True))
            | {"tried": len(own), "survived": sum(not row["problems"] for row in own)}
            | {"lost_median": statistics.median(lost), "lost_max": max(lost)}
            | {"seconds_to_end_max": max(row["seconds_to_end"] for row in own)}
        )
    return found


def table(rows: list[dict]) -> str:
    """The summary as Markdown."""
    lines = ["| fault | of | tried | survived | work lost, median (max) |", "| --- | --- | ---: | ---: | ---: |"]
    for row in rows:
        work = f"{row['lost_median']:g} ({row['lost_max']}) {row['unit']}"
        lines.append(f"| {row['fault']} | {row['job']} | {row['tried']} | {row['survived']} | {work} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the campaign")
    parser.add_argument("--kills", type=int, default=200, help="kills of training; other kinds follow (default: 200)")
    parser.add_argument("--trials", type=int, default=5, help="trials of faults that take no luck (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="fixes what happens and when (default: 0)")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="kinds whose name and job contain one of these")
    given = parser.parse_args()
    if given.kills < 0 or given.trials < 0:
        raise UserError(f"--kills and --trials must be 0 or more, got {given.kills} and {given.trials}")
    if not (given.output / "trials.jsonl").exists():
        refuse_others(given.output, ("digits", "victim.pt"), "this campaign")
    bench, began = Bench(given.output.resolve(), given.seed), time.monotonic()
    todo = [
        (kind, job, number, draw)
        for kind, job, count, draw in plan(bench, given.kills, given.trials)
        for number in range(count)
        if not given.only or any(text in f"{kind}, {job}" for text in given.only)
    ]
    rows = [bench.attempt(*each) for each in track(todo, len(todo), "faults", print)]
    found = summary(rows)
    failed = [row for row in rows if row["problems"]]
    write_json(given.output / "results.json", {"faults": found, "failed": failed, "seed": given.seed})
    print(table(found))
    print(f"{len(rows)} faults, {len(rows) - len(failed)} survived, {duration(time.monotonic() - began)}")
    for row in failed:
        print(f"{row['kind']}, {row['job']} {row['trial']}: {'; '.join(row['problems'])}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    run_command(main, CONTINUES)
