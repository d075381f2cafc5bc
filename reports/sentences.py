"""What attack.py leaves behind of sentences: per_image.csv, sentences.json and report.html, side by side."""

from collections.abc import Mapping, Sequence

from reports.attack import STYLE as IMAGES_STYLE
from reports.metrics import Metrics, campaign_results, summary_lines, summary_table, telling, tiles, write_csv
from reports.page import SORT, Markup, code, escape, facts, heading, page, sortable_table, verdict
from reports.verdict import of_sentences
from utils.files import write_json, write_text
from utils.machine import command_line
from utils.runs import Run
from utils.statistics import success, summarize

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
@media (max-width: 640px) { .sentences { position: static; width: auto; grid-template-columns: 1fr; } }
.key span { border-radius: 4px; padding: 2px 6px; color: #1e293b; margin-right: 10px; }
"""
)


def write_text_report(
    run: Run, rows: Sequence[dict], metrics: Metrics, attack: str, threat_model: Mapping[str, object], threshold: float
) -> dict:
    """Write the report of a campaign, log its verdict and summary, and return what results.json holds.

    attack: its name. rows: scores by the names of `metrics`, `words`, {view: list of tokens} of 'original', 'input'
    and 'reconstruction', and `masked`, a list of bool. threshold: percentage of tokens in place that is a success.
    """
    plain = [{key: value for key, value in row.items() if key not in ("words", "masked")} for row in rows]
    summary = summarize(plain, list(metrics)) | {"success": success(plain, threshold, key="tokens_in_place")}
    says, keys = of_sentences(attack, plain, threshold), telling(plain, metrics)
    run.log("\n".join([says, *summary_lines(summary, metrics, keys)]))
    write_csv(run.folder, plain)
    sentences = [{"index": row["index"], **row["words"], "masked": row["masked"]} for row in rows]
    write_json(run.folder / "sentences.json", sentences)
    content = _page(command_line(), attack, says, rows, summary, threat_model, metrics, keys)
    write_text(run.folder / "report.html", content)
    return campaign_results(attack, says, summary, threat_model, plain)


def _page(
    command: str,
    attack: str,
    says: str,
    rows: Sequence[dict],
    summary: dict,
    threat_model: Mapping[str, object],
    metrics: Metrics,
    keys: Sequence[str],
) -> str:
    masked = any(any(row["masked"]) for row in rows)
    order = "Masked places hold their tokens in an order that no gradient tells: read their score as a set. " * masked
    bodies = []
    for place, row in enumerate(rows):
        below = _sentences(row, metrics) if place < SHOWN else Markup("")
        bodies.append(([row["index"], *(row.get(key) for key in keys)], below))
    heads, hints = [metrics[key].head for key in keys], [metrics[key].hint for key in keys]
    return page(
        f"What the shared gradients give to {attack}",
        verdict(says, f"{order}A low score is no proof of privacy: it is the score of this attack."),
        tiles(summary, metrics, TILES),
        Markup('<div class="pair"><section>'),
        heading("Threat model: who knows what"),
        facts(threat_model),
        heading("Command"),
        Markup(f"<p>{code(command)}</p></section><section>"),
        heading("Over all sentences"),
        summary_table(summary, metrics, keys),
        Markup("</section></div>"),
        heading("Sentence by sentence"),
        _key(),
        sortable_table(["sentence", *heads], bodies, ["its index", *hints]),
        style=STYLE,
        script=SORT,
    )


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


def _sentences(row: dict, metrics: Metrics) -> Markup:
    """Return the three sentences of a victim, token by token, the reconstruction coloured against the original."""
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
    details = {key: value for key, value in row.items() if key not in (*metrics, "index", "words", "masked")}
    return Markup(f'<div class="sentences">{"".join(lines)}</div>{facts(details)}')


def colours(found: Sequence[str], original: Sequence[str]) -> list[str]:
    """Return for each token found: 'exact' in its place, 'moved' where the original has it elsewhere, at a place that
    is not itself exact and as often as that, else 'wrong'."""
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
