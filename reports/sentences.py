"""What attack.py leaves behind of sentences: per_image.csv, sentences.json and report.html, side by side."""

from collections.abc import Mapping, Sequence

from reports.attack import STYLE as IMAGES_STYLE
from reports.attack import Metric, write_csv
from reports.page import SORT, Markup, code, escape, facts, heading, number, page, sortable_table, table, verdict
from reports.verdict import of_sentences
from utils.files import write_json, write_text
from utils.machine import command_line
from utils.runs import Run
from utils.statistics import finite, success, summarize

METRICS = {
    "tokens_in_place": Metric("in place", "%", "tokens of the original found at their own place; higher is closer"),
    "tokens_any_order": Metric("any order", "%", "tokens of the original found, each as often as it occurs, anywhere"),
    "tokens_shown": Metric("in place, input", "%", "against what the model saw, tokens shuffled where it uses MJP"),
    "tokens_visible": Metric("visible", "%", "places that are not masked, against the model's input"),
    "tokens_masked": Metric("masked, as a set", "%", "tokens at the masked places, in any order"),
    "rouge1": Metric("ROUGE-1", "", "overlap of words, F1 of 100"),
    "rouge2": Metric("ROUGE-2", "", "overlap of pairs of words, F1 of 100"),
    "rougeL": Metric("ROUGE-L", "", "longest common subsequence of words, F1 of 100"),
    "bleu": Metric("BLEU", "", "n-grams of up to four words, of 100"),
    "label_found": Metric("label found", "%", "sentences whose label the attack found"),
    "seconds": Metric("attack time", "s", "seconds per sentence"),
}
REFINES = {"tokens_shown": "tokens_in_place", "tokens_visible": "tokens_shown"}  # left out where they say the same
TILES = ("tokens_any_order", "tokens_in_place", "rougeL", "bleu", "seconds")
SHOWN = 200  # sentences printed in report.html; its table and sentences.json hold all
STYLE = (
    IMAGES_STYLE
    + """
.sentences { display: grid; grid-template-columns: max-content 1fr; gap: 6px 14px; position: sticky; left: 12px; }
.sentences { width: calc(100cqw - 24px); font-size: 14px; line-height: 1.9; }
.sentences b { font-weight: 600; color: #475569; } .sentences div { min-width: 0; }
.sentences span { border-radius: 4px; padding: 2px 4px; margin: 0 1px; white-space: pre; display: inline-block; }
.sentences span { line-height: 1.35; } .exact { background: #bbf7d0; } .moved { background: #fef08a; }
.wrong { background: #fecaca; } .masked { box-shadow: inset 0 -3px #7c3aed; } .plain { background: #f1f5f9; }
.sentences + .facts { display: flex; flex-wrap: wrap; gap: 0 6px; margin: 10px 0 0; font-size: 13px; }
.sentences + .facts dd { margin-right: 16px; }
.key span { border-radius: 4px; padding: 2px 6px; color: #1e293b; margin-right: 10px; }
"""
)


def write_text_report(
    run: Run, rows: Sequence[dict], attack: str, threat_model: Mapping[str, object], threshold: float
) -> dict:
    """Write the report of a campaign, log its verdict and summary, and return what results.json holds.

    attack: its name. rows: scores by the names of METRICS, with `words`, {view: list of tokens} of 'original', 'input'
    and 'reconstruction', and `masked`, a list of bool. threshold: percentage of tokens in place that is a success.
    """
    plain = [{key: value for key, value in row.items() if key not in ("words", "masked")} for row in rows]
    summary = summarize(plain, METRICS) | {"success": success(plain, threshold, key="tokens_in_place")}
    says, keys = of_sentences(attack, plain, threshold), telling(plain)
    run.log(f"{says}\n{_lines(summary, keys)}")
    write_csv(run.folder, plain)
    sentences = [{"index": row["index"], **row["words"], "masked": row["masked"]} for row in rows]
    write_json(run.folder / "sentences.json", sentences)
    content = _page(command_line(), attack, says, rows, summary, threat_model, keys)
    write_text(run.folder / "report.html", content)
    return {
        "attack": attack,
        "verdict": says,
        "summary": summary,
        "threat_model": dict(threat_model),
        "per_image": [finite(row) for row in plain],
    }


def telling(rows: Sequence[dict]) -> list[str]:
    """Return the metrics worth a line: those with a value for some sentence that differs from what they refine."""
    keys = [key for key in METRICS if any(finite(row).get(key) is not None for row in rows)]
    return [key for key in keys if key not in REFINES or any(row.get(key) != row.get(REFINES[key]) for row in rows)]


def _lines(summary: dict, keys: Sequence[str]) -> str:
    lines = [f"{'':<28}      mean       std     n"]
    for key in keys:
        row = summary[key]
        lines.append(f"{METRICS[key]!s:<28}{number(row['mean']):>10}{number(row['std']):>10}{row['n']:>6}")
    return "\n".join(lines)


def _page(
    command: str,
    attack: str,
    says: str,
    rows: Sequence[dict],
    summary: dict,
    threat_model: Mapping[str, object],
    keys: Sequence[str],
) -> str:
    metrics = {key: METRICS[key] for key in keys}
    masked = any(any(row["masked"]) for row in rows)
    order = "Masked places hold their tokens in an order that no gradient tells: read their score as a set. " * masked
    totals = [
        [
            Markup(f"{escape(metric)}<small>{escape(metric.meaning)}</small>"),
            *(summary[key][k] for k in ("mean", "std", "n")),
        ]
        for key, metric in metrics.items()
    ]
    bodies = []
    for place, row in enumerate(rows):
        below = _sentences(row) if place < SHOWN else Markup("")
        bodies.append(([row["index"], *(row.get(key) for key in metrics)], below))
    heads = [Markup(f"{escape(metric.label)}<small>{escape(metric.unit)}</small>") for metric in metrics.values()]
    return page(
        f"What the shared gradients give to {attack}",
        verdict(says, f"{order}A low score is no proof of privacy: it is the score of this attack."),
        _tiles(summary),
        Markup('<div class="pair"><section>'),
        heading("Threat model: who knows what"),
        facts(threat_model),
        heading("Command"),
        Markup(f"<p>{code(command)}</p></section><section>"),
        heading("Over all sentences"),
        table(["score", "mean", "std", "n"], totals),
        Markup("</section></div>"),
        heading("Sentence by sentence"),
        _key(),
        sortable_table(["sentence", *heads], bodies, ["its index", *(metric.meaning for metric in metrics.values())]),
        style=STYLE,
        script=SORT,
    )


def _tiles(summary: dict) -> Markup:
    tiles = []
    for key in TILES:
        row = summary.get(key, {"mean": None})
        if row["mean"] is not None:
            spread = "" if row["std"] is None else f" <small>± {number(row['std'])}</small>"
            tiles.append(
                f"<div><strong>{number(row['mean'])}{spread}</strong><span>mean {escape(METRICS[key])}</span></div>"
            )
    return Markup(f'<div class="tiles">{"".join(tiles)}</div>')


def _key() -> Markup:
    kinds = {
        "exact": "found in its place",
        "moved": "occurs, elsewhere",
        "wrong": "not in the sentence",
        "plain masked": "place was masked",
    }
    return Markup(
        '<div class="toolbar"><span>Click a column to sort.</span>'
        '<label><input type="checkbox" checked>sentences</label><span class="key">'
        + "".join(f'<span class="{kind}">{escape(text)}</span>' for kind, text in kinds.items())
        + "</span></div>"
    )


def _sentences(row: dict) -> Markup:
    """The three sentences of a victim, token by token, the reconstruction coloured against the original."""
    words, lines = row["words"], []
    original, masked = words["original"], row["masked"]
    for view, tokens in words.items():
        if view == "input" and tokens == original:
            continue
        kinds = ["plain"] * len(tokens)
        if view == "reconstruction":
            kinds = colours(tokens, original)
        if view != "original":
            kinds = [kind + " masked" * away for kind, away in zip(kinds, masked, strict=True)]
        spans = "".join(
            f'<span class="{kind}">{escape(token)}</span>' for kind, token in zip(kinds, tokens, strict=True)
        )
        lines.append(f"<b>{escape(view)}</b><div>{spans}</div>")
    details = {key: value for key, value in row.items() if key not in (*METRICS, "index", "words", "masked")}
    return Markup(f'<div class="sentences">{"".join(lines)}</div>{facts(details)}')


def colours(found: Sequence[str], original: Sequence[str]) -> list[str]:
    """For each token found: 'exact' in its place, 'moved' where the original has it elsewhere, at a place that is not
    itself exact and as often as that, else 'wrong'."""
    left: dict[str, int] = {}
    for one, other in zip(found, original, strict=True):
        if one != other:
            left[other] = left.get(other, 0) + 1
    kinds = []
    for one, other in zip(found, original, strict=True):
        if one == other:
            kinds.append("exact")
        elif left.get(one, 0):
            left[one] -= 1
            kinds.append("moved")
        else:
            kinds.append("wrong")
    return kinds
