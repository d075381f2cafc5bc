"""The paper's claims with our numbers and verdicts, from the files in docs/results: python scripts/results_page.py

Rewrites the parts of the pages in docs between their markers: claims and their details (scripts/claims.py), tables of
trained models, the list of scores. --check only says whether they are up to date (exit status 1 if not). To refresh a
number: run the command under it, copy the .json it writes to docs/results, run this. --files prints the claims of
another folder of such files, as scripts/reproduce/claims.sh makes one, and writes nothing.
"""

import re
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import claims as evidence
from ablation_table import ATTACKED, SCORED, SHUFFLES, as_table
from benchmark_conditions import table as conditions
from frontier import page as frontier
from results_joint import PARTS as JOINT
from results_joint import joint, limits
from results_matching import gradvit_mjp, polish
from results_speed import bench
from results_weights import SECTIONS, breaching, finetuning

from eval.reconstruction import METRICS
from eval.text_scores import SENTENCE_METRICS
from reports.metrics import Metric
from reports.prose import wrap_markdown
from reports.tables import Table, markdown
from utils.errors import UserError, run_command
from utils.files import existing_folder, write_text
from utils.tool_parser import ToolParser

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def tables() -> str:
    """Return accuracy, consistency and attacks of the models of every ablation."""
    parts = []
    rest = {key: label for key, label in SCORED.items() if key not in SHUFFLES}
    groups = {
        "Accuracy and consistency": SHUFFLES,
        "Corrupted images, and what the position embeddings know": rest,
        "Attacks on the trained models": ATTACKED,
    }
    for data, variants in evidence.ablations().items():
        for what, columns in groups.items():
            parts.append(f"{what}, {data}:\n\n{markdown(as_table(variants, columns))}")
    return "\n".join(parts)


def scores() -> str:
    """Return what the scores of images and of sentences are, from the tables that compute them."""
    return f"{_listed(METRICS, 'images')}\n{_listed(SENTENCE_METRICS, 'sentences')}"


def _listed(metrics: Mapping[str, Metric], what: str) -> str:
    rows = [[f"`{key}`", str(metric), metric.better or "–", metric.meaning] for key, metric in metrics.items()]
    table = markdown(Table([f"score of {what}", "label", "closer is", "meaning"], rows))
    return table.replace("---:", "---")  # words stand to the left


def linked(text: str) -> str:
    """Return text whose pages and figures, named from docs/, are links."""
    return re.sub(r"[\w/]+\.(?:jpg|png|md)\b", lambda name: f"[{name[0]}]({name[0]})", text)


def found_of(claim: evidence.Claim, gaps: bool) -> evidence.Evidence:
    """Return the evidence of a claim. gaps: where its files are not there, say so; otherwise that is a UserError."""
    try:
        return claim.evidence()
    except UserError as missing:
        if not gaps:
            raise
        return evidence.Evidence(str(missing), "not run")


def claims(gaps: bool = False) -> str:
    """Return all claims with all their numbers as Markdown."""
    lines, first = [], 1
    for heading, group in evidence.CLAIMS.items():
        lines += [f"### {heading}", ""]
        for number, claim in enumerate(group, first):
            found = found_of(claim, gaps)
            shown = f" See also: {linked(claim.shown)}." if claim.shown else ""
            text = f"{found.text[0].upper()}{found.text[1:]}"
            lines.append(f"{number}. **{claim.says}: {found.verdict}.** {text}.{shown} (`{claim.command}`)")
        first += len(group)
        lines.append("")
    return "\n".join(lines)


def verdicts(gaps: bool = False) -> str:
    """Return a line for each claim as Markdown tables: claim, verdict, the number that decides, n, command."""
    parts, first = [], 1
    for heading, group in evidence.CLAIMS.items():
        anchor = re.sub(r"[^a-z -]", "", heading.lower()).replace(" ", "-")
        rows = []
        for number, claim in enumerate(group, first):
            found, link = found_of(claim, gaps), f"[{number}](claims_details.md#{anchor})"
            rows.append(
                [link, claim.says, f"**{found.verdict}**", found.number, found.n, f"`{script_of(claim.command)}`"]
            )
        first += len(group)
        table = markdown(Table(["#", heading, "verdict", "number [95 %]", "n", "command"], rows))
        parts.append(table.replace("---:", "---"))  # words stand to the left
    return "\n".join(parts)


def script_of(command: str) -> str:
    """Return the script or module of a command, short: 'DATA=X scripts/reproduce/a.sh --b' is 'a.sh'."""
    settings = [word for word in command.split() if word.startswith("PLAN=")]
    script = next(word for word in command.split() if word.endswith((".sh", ".py")) or word.startswith("benchmarks."))
    return " ".join([*settings, script.rpartition("/")[2]])


PARTS = {
    "claims": (DOCS / "claims.md", verdicts),
    "details": (DOCS / "claims_details.md", claims),
    "scores": (DOCS / "attacks.md", scores),
    "conditions": (DOCS / "benchmark.md", lambda: conditions(evidence.read("benchmark_decide"))),
    "frontier": (DOCS / "defenses.md", lambda: frontier(evidence.read("frontier")["rows"])),
    "breaching": (DOCS / "benchmark.md", breaching),
    "ablation": (DOCS / "results_training.md", tables),
    **{name: (DOCS / "results_equations.md", partial(joint, preset)) for name, preset in JOINT.items()},
    "joint_limits": (DOCS / "results_equations.md", limits),
    "finetuning": (DOCS / "training.md", finetuning),
    "gradvit_mjp": (DOCS / "matching.md", gradvit_mjp),
    "polish": (DOCS / "matching.md", polish),
    "bench": (DOCS / "results_speed.md", bench),
    **{name: (DOCS / "weights.md", section) for name, section in SECTIONS.items()},
}


def rewritten(name: str, text: str | None = None) -> str:
    """Return the page of a part, or its `text`, with what stands between the part's markers made anew. Raises UserError
    where a marker is gone."""
    page, part = PARTS[name]
    start, end = f"<!-- {name}: written by scripts/results_page.py -->", f"<!-- end of {name} -->"
    head, found, rest = (text or page.read_text()).partition(start)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise UserError(f"'{page}' has lost the markers between which its {name} stand: restore '{start}', '{end}'")
    return f"{head}{start}\n\n{wrap_markdown(part())}\n{end}{tail}"


def main() -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is out of date")
    parser.add_argument("--files", type=Path, metavar="DIR", help="print the claims of the files there, write nothing")
    given = parser.parse_args()
    if given.files:
        evidence.FILES = existing_folder(given.files, "--files")
        print(claims(gaps=True))
        return
    pages: dict[Path, str] = {}
    for name, (page, _) in PARTS.items():
        pages[page] = rewritten(name, pages.get(page))
    stale = [str(page.relative_to(ROOT)) for page, text in pages.items() if page.read_text() != text]
    if given.check:
        print(f"out of date: {', '.join(stale)}; run python scripts/results_page.py" if stale else "up to date")
        sys.exit(bool(stale))
    for page, text in pages.items():
        write_text(page, text)
    print(verdicts())


if __name__ == "__main__":
    run_command(main)
