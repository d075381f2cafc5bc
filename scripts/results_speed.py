"""The table of what `make bench` measured, for docs/results_speed.md (scripts/results_page.py)."""

import json

import claims as evidence

from benchmarks.verdicts import rows_of
from reports.tables import Table, markdown

BENCH = ("training", "metrics", "attacks", "hybrid", "pipeline")  # in the order of a whole run


def bench() -> str:
    """Return every comparison with a goal as a Markdown table, and how the files were made."""
    rows, made = [], []
    for name in BENCH:
        file = evidence.FILES / f"bench_{name}.json"
        rows += [[row[0], *row[1:3], f"`{row[3]}`", f"**{row[4]}**"] for row in rows_of(file)]
        content = json.loads(file.read_text())
        if "setting" in content:
            made.append(f"* {name}: `{content['command']}`; {content['setting']}, after it {content['load_after']}.")
        else:
            before, after = (load[0] for load in content["load"])
            about = f"{content['number']} photographs, {content['rounds']} rounds"
            made.append(f"* {name}: {about}, load {before:.1f}, after it {after:.1f}.")
    table = markdown(Table(["comparison", "ratio", "quartiles", "goal", "verdict"], rows))
    return "\n".join([table, *made, ""])
