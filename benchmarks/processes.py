"""What more processes cost a job that shares its items out: a search for policies, or an attack campaign.

    python -m benchmarks.processes --option number -- -m defenses.ats.search --checkpoint FILE --data DIR ...
    python -m benchmarks.processes --option num_images -- attack.py --attack NAME --model NAME --images DIR ...

In every round the job runs on each number of processes under the launcher, in rotating order, and once more on one
process with few items. Seconds are user and system time of all its processes together, one thread each: on cores that
others use too, and that are fewer than the processes, the clock says little. Few and many items on one process give
what a process takes to start and end, and what an item takes; K processes should take K times the first and the same
for the items, and what they take beyond that is the price of sharing. `work` is the share of the processors' time that
one process would need too; `own cores` is T(1) / (K T(K)) by the clock on K idle cores, worked out from the two parts.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.interleaved_timing import benchmark_parser
from utils.errors import UserError, run_command
from utils.files import write_json
from utils.machine import describe_machine


def run(job: Sequence[str], option: str, processes: int, items: int) -> tuple[float, float]:
    """Run the job in a folder of its own; return seconds (of the processors, of the clock)."""
    launch = [sys.executable, "-m", "utils.launch", "--standalone", f"--nproc_per_node={processes}"]
    with tempfile.TemporaryDirectory() as folder:
        command = [*launch, *job, f"--{option}", str(items), "--output", str(Path(folder) / "run")]
        before, began = _of_children(), time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        seconds = _of_children() - before, time.monotonic() - began
    if done.returncode:
        raise UserError(f"the job failed on {processes} processes: {done.stderr.strip()[-300:]}")
    return seconds


def _of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def parts(few: tuple[int, float], many: tuple[int, float]) -> tuple[float, float]:
    """Return seconds (a process takes without items, an item takes), from (items, seconds) of two runs of one
    process."""
    item = (many[1] - few[1]) / (many[0] - few[0])
    return few[1] - few[0] * item, item


def efficiency(start: float, item: float, items: int, processes: int) -> float:
    """Return T(1) / (K T(K)) on K cores of their own, where the longest share has ceil(items / K) items."""
    longest = -(-items // processes)
    return (start + item * items) / (processes * (start + item * longest))


def main() -> None:
    words = sys.argv[1:]
    if "--" not in words:
        raise UserError("the job is missing: write it behind --, as torchrun takes it")
    place = words.index("--")
    parser = benchmark_parser(__doc__, rounds=2)
    parser.add_argument("--option", required=True, help="the job's option that says how many items, without --")
    parser.add_argument("--processes", default="1,2,4", help="numbers of processes (default: %(default)s)")
    parser.add_argument("--items", type=int, default=16, help="items of a run (default: %(default)s)")
    parser.add_argument("--few", type=int, default=2, help="items of the short run (default: %(default)s)")
    given, job = parser.parse_args(words[:place]), words[place + 1 :]
    numbers = [int(number) for number in given.processes.split(",")]
    if 1 not in numbers or given.few >= given.items:
        raise UserError("--processes must have 1 among them, and --few be less than --items")
    cases, before = [(1, given.few), *((number, given.items) for number in numbers)], os.getloadavg()[0]
    found = {case: [] for case in cases}
    for k in range(given.rounds):
        for case in cases[k % len(cases) :] + cases[: k % len(cases)]:
            found[case].append(run(job, given.option, *case))
    used = {case: median(seconds for seconds, _ in runs) for case, runs in found.items()}
    start, item = parts((given.few, used[1, given.few]), (given.items, used[1, given.items]))
    loads = [before, os.getloadavg()[0]]
    print(f"load {loads[0]:.1f} to {loads[1]:.1f}, {given.rounds} rounds; start {start:.1f} s, item {item:.2f} s")
    print(f"{'processes':>9}{'items':>7}{'processors s':>14}{'expected':>10}{'work':>7}{'own cores':>11}{'clock s':>9}")
    rows = []
    for (number, items), runs in found.items():
        row = {"processes": number, "items": items, "processor_s": [one for one, _ in runs]}
        row |= {"clock_s": [other for _, other in runs], "expected_s": number * start + items * item}
        row |= {"work": used[1, items] / used[number, items], "own_cores": efficiency(start, item, items, number)}
        rows.append(row)
        shares = f"{row['work']:>7.2f}{row['own_cores']:>11.2f}{median(row['clock_s']):>9.1f}"
        print(f"{number:>9}{items:>7}{used[number, items]:>14.1f}{row['expected_s']:>10.1f}{shares}")
    if given.json:
        command = " ".join(["python -m benchmarks.processes", *words])
        about = {"command": command, "load": loads, "start_s": start, "item_s": item}
        write_json(given.json, about | {"jobs": rows} | describe_machine())


if __name__ == "__main__":
    run_command(main)
