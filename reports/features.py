"""What attack.py leaves behind of features: per_image.csv, features.json and report.html. There are no pictures."""

from collections.abc import Mapping, Sequence

from reports.attack import STYLE
from reports.metrics import Metric, campaign_results, summary_lines, summary_table, telling, tiles, write_csv
from reports.page import SORT, Markup, code, facts, heading, page, sortable_table, verdict
from utils.files import write_json, write_text
from utils.machine import command_line
from utils.runs import Run
from utils.statistics import success, summarize

FEATURE_METRICS = {
    "feature_found": Metric(
        None, "features found", "%", "higher", "images whose feature is given away by the classifier's gradient"
    ),
    "feature_error": Metric(
        None, "feature error", "", "lower", "length of the difference from the true feature, over the length of that"
    ),
    "label_found": Metric(None, "label found", "%", "higher", "images whose label is read, of those with a feature"),
    "seconds": Metric(None, "seconds", "s", "", "time of the attack, an image"),
}
LISTS = ("features", "logits")


def write_feature_report(run: Run, rows: Sequence[dict], attack: str, threat_model: Mapping[str, object]) -> dict:
    """Write the report of a campaign, log its verdict and summary, and return what results.json holds.

    attack: its name. rows: scores by the names of FEATURE_METRICS, and `features` and `logits`, lists of numbers, which
    go to features.json alone.
    """
    plain = [{key: value for key, value in row.items() if key not in LISTS} for row in rows]
    summary = summarize(plain, list(FEATURE_METRICS)) | {"success": success(plain, 50.0, key="feature_found")}
    found, keys = sum(row["feature_found"] > 50 for row in plain), telling(plain, FEATURE_METRICS)
    says = f"Features, not pixels: {attack} reads the features, logits and labels of {found} of {len(plain)} images."
    run.log("\n".join([says, *summary_lines(summary, FEATURE_METRICS, keys)]))
    write_csv(run.folder, plain)
    kept = [{key: row[key] for key in ("index", "image", "label_read", *LISTS) if key in row} for row in rows]
    write_json(run.folder / "features.json", kept)
    heads, hints = [FEATURE_METRICS[key].head for key in keys], [FEATURE_METRICS[key].hint for key in keys]
    bodies = [([row["index"], *(row.get(key) for key in keys)], Markup("")) for row in plain]
    content = page(
        f"What the shared gradients give to {attack}",
        verdict(says, "Who has the features has what the network sees in the images: features.json holds them."),
        tiles(summary, FEATURE_METRICS, list(FEATURE_METRICS)),
        heading("Threat model: who knows what"),
        facts(threat_model),
        heading("Command"),
        Markup(f"<p>{code(command_line())}</p>"),
        heading("Over all images"),
        summary_table(summary, FEATURE_METRICS, keys),
        heading("Image by image"),
        sortable_table(["image", *heads], bodies, ["its index", *hints]),
        style=STYLE,
        script=SORT,
    )
    write_text(run.folder / "report.html", content)
    return campaign_results(attack, says, summary, threat_model, plain)
