"""What attack.py leaves behind: pictures of every victim, per_image.csv and report.html."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from reports.charts import histogram
from reports.interval import STYLE as INTERVAL_STYLE
from reports.interval import bar, proved, sentence
from reports.metrics import (
    Metrics,
    campaign_results,
    left_out,
    summary_lines,
    summary_table,
    telling,
    tiles,
    write_csv,
)
from reports.page import (
    SORT,
    Markup,
    code,
    escape,
    facts,
    figure,
    heading,
    number,
    page,
    paragraph,
    picture,
    sortable_table,
    to_image,
    verdict,
)
from reports.verdict import of_block, of_claims, of_images, of_masks, of_range
from utils.files import write_atomic, write_text
from utils.machine import command_line
from utils.runs import Run
from utils.statistics import success, summarize

VIEWS = {"originals": "original", "inputs": "model input", "reconstructions": "reconstruction"}  # folder: caption
TILES = ("psnr", "psnr_baseline", "ssim", "exact_pixels", "seconds")
SHOWN_IN_REPORT = 60  # victims pictured in report.html; its table, results.json and the folders hold all
ERROR_MAP, ERROR_SCALE = "magma", 0.5  # a perceptually uniform colour map, from no error to half the pixel range
STYLE = """
main { max-width: 1340px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 12px; margin: 24px 0 8px; }
.tiles div { background: #fff; border: 1px solid #e2e8f0; border-radius: 10px; padding: 12px 16px; }
.tiles strong { display: block; font-size: 25px; line-height: 1.3; letter-spacing: -0.01em; }
.tiles small { font-size: 15px; font-weight: 400; color: #64748b; } .tiles span { color: #475569; font-size: 13px; }
.tiles small { white-space: nowrap; } .tiles span { display: block; line-height: 1.35; }
.glance { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 12px 28px; }
.glance div { display: grid; grid-template-columns: repeat(3, 1fr); gap: 6px; max-width: 420px; }
.glance figure { margin: 0; } .glance figcaption { color: #64748b; font-size: 13px; line-height: 1.3; margin-top: 2px; }
.glance img { display: block; width: 100%; height: auto; border-radius: 6px; image-rendering: pixelated; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 0 40px; }
.pair figure { margin: 0; } .pair h2 { margin-top: 36px; } .pair section { min-width: 0; } .pair table { width: 100%; }
.toolbar { display: flex; flex-wrap: wrap; gap: 8px 28px; align-items: center; font-size: 14px; color: #475569; }
.toolbar label { cursor: pointer; } .toolbar input { accent-color: #c2410c; margin: 0 6px 0 0; }
.scale { display: inline-block; width: 120px; height: 10px; border-radius: 5px; margin: 0 6px; }
td small { display: block; color: #64748b; font-size: 13px; white-space: normal; min-width: 150px; }
.scroll { container-type: inline-size; }
.sortable { width: 100%; font-size: 13px; }
.sortable :is(td, th) { padding: 8px 6px; } .sortable :is(td, th):first-child { padding-left: 12px; }
.sortable :is(td, th):last-child { padding-right: 12px; }
.sortable th { white-space: normal; line-height: 1.25; vertical-align: bottom; min-width: 58px; background: #f1f5f9; }
.sortable thead th { position: sticky; top: 0; z-index: 2; }
.sortable th small { display: block; font-weight: 400; color: #64748b; }
.sortable tr:first-child > td:first-child { max-width: 190px; white-space: normal; overflow-wrap: anywhere; }
.sortable tr:first-child > td:first-child { font-weight: 600; min-width: 130px; }
.sortable .below > td { padding: 4px 12px 20px; white-space: normal; }
.sortable tbody:has(.below) tr:first-child td { border-bottom: 0; }
.views { display: flex; flex-wrap: wrap; gap: 12px; position: sticky; left: 12px; width: calc(100cqw - 24px); }
.views figure { margin: 0; width: 184px; } .views figcaption { color: #64748b; font-size: 13px; margin-top: 2px; }
.views img { display: block; width: 100%; height: auto; border-radius: 6px; image-rendering: pixelated; }
.views dl.facts { flex: 1 1 220px; align-content: start; margin: 0 0 0 12px; font-size: 13px; gap: 2px 12px; }
main:has(.toolbar input:not(:checked)) .below { display: none; }
@media (min-width: 1180px) { .scroll:has(> .sortable) { overflow: visible; } }
@media (max-width: 640px) {
  th, td { padding: 7px; } td small { min-width: 110px; } .pair td:first-child { white-space: normal; }
  .sortable td[data-label] { padding: 2px 12px; } .sortable .below > td { font-weight: 400; }
  .sortable thead { display: block; background: #f1f5f9; }
  .sortable thead tr { display: flex; flex-wrap: wrap; padding: 0; }
  .sortable thead th { position: static; min-width: 0; padding: 5px 9px; border: 0; text-align: left; }
  .sortable th small { display: inline; margin-left: 4px; }
  .sortable tr:first-child > td:first-child { min-width: 0; max-width: none; }
  .sortable tbody tr:has(+ .below) { border-bottom: 0; padding-bottom: 0; }
  .sortable .below > td { display: block; } .sortable .below > td::before { content: none; }
  .views { display: grid; grid-template-columns: 1fr 1fr; position: static; width: auto; }
  .views figure { width: auto; } .views dl.facts { grid-column: 1 / -1; margin: 0; }
}
"""


def write_report(
    run: Run, rows: Sequence[dict], metrics: Metrics, attack: str, threat_model: Mapping[str, object], threshold: float
) -> dict:
    """Write per_image.csv and report.html, log verdict and summary, and return what results.json holds.

    rows: scores by the names of `metrics`. attack: its name. threat_model: who knows what, name -> value; threshold:
    PSNR in dB above which a reconstruction is a success. Where nobody has the private images, as with leak files, there
    are no scores, only what the attacks found and say of it.
    """
    summary = summarize(rows, [key for key in metrics if key != "label_read"])
    if "psnr" in summary:  # the private images are at hand
        summary["success"] = success(rows, threshold)
    scored = "success" in summary
    says = of_images(attack, rows, threshold) if scored else of_claims(attack, rows)
    if scored and str(threat_model.get("MJP")).startswith("mask ratio"):
        says += of_masks(rows)
    says += of_range(rows) + of_block(rows)
    found = proved(rows)
    interval = [sentence(attack, found)] if found else []
    run.log("\n".join([says, *interval, summary_text(summary, metrics, rows)]))
    write_csv(run.folder, rows)
    write_page(run.folder, command_line(), attack, says, rows, metrics, summary, threat_model)
    results = campaign_results(attack, says, summary, threat_model, rows)
    return results | ({"interval": found} if found else {})


def save_pictures(folder: Path, rows: Sequence[dict], views: Mapping[str, Tensor]) -> None:
    """Write the images of `rows` as 8-bit PNG. views: by subfolder, one of `VIEWS`, pixel values (B, 3, H, W)."""
    for kind, images in views.items():
        (folder / kind).mkdir(exist_ok=True)
        for row, image in zip(rows, images, strict=True):
            write_atomic(folder / kind / file_name(row), lambda file, image=image: to_image(image).save(file, "PNG"))


def file_name(row: dict) -> str:
    """Return the file name of a victim's pictures, the same in every subfolder: its index and the stem of its image."""
    stem = "".join(char if char.isprintable() else "_" for char in Path(row["image"]).stem[:48])
    return f"{row['index']:04d}_{stem}.png"


def error_map(reconstruction: Tensor, original: Tensor) -> Tensor:
    """Return a picture (3, H, W) of the absolute error, channel mean; 0 is black, `ERROR_SCALE` and more the
    brightest."""
    import matplotlib  # takes half a second

    error = (reconstruction - original).abs().mean(dim=0) / ERROR_SCALE
    colors = matplotlib.colormaps[ERROR_MAP](error.clamp(0, 1).numpy())
    return torch.from_numpy(colors[..., :3]).permute(2, 0, 1)


def summary_text(summary: dict, metrics: Metrics, rows: Sequence[dict]) -> str:
    """Return the metrics of the summary that are worth a line, and the share of successes, as lines of text."""
    last = above(summary["success"]) if "success" in summary else "no originals: nothing to score by"
    return "\n".join([*summary_lines(summary, metrics, telling(rows, metrics)), last])


def above(row: dict) -> str:
    """Return the share of images over the threshold, in words."""
    return f"{100 * row['mean']:.0f} % of {row['n']} image{'s' * (row['n'] != 1)} above {row['threshold']:g} dB"


def write_page(
    folder: Path,
    command: str,
    attack: str,
    says: str,
    rows: Sequence[dict],
    metrics: Metrics,
    summary: dict,
    threat_model: Mapping[str, object],
) -> None:
    """Write report.html from the rows, their summary and the pictures in `folder`.

    says: the verdict on the attack of that name; threat_model: who knows what, name -> value. Metrics without a value
    for any image, and those that say what another says, are not shown.
    """
    shown = {key: metrics[key] for key in telling(rows, metrics)}
    same = left_out(rows, metrics)
    scored = "success" in summary
    kinds = {kind: caption for kind, caption in VIEWS.items() if (folder / kind).is_dir()}
    perfect = any(row.get("infinite") for row in summary.values())
    interval = proved(rows)
    bodies = []
    for place, row in enumerate(rows):
        below = _views(folder, kinds, row, metrics) if place < SHOWN_IN_REPORT else Markup("")
        bodies.append(([Path(file_name(row)).stem, *(row.get(key) for key in shown)], below))
    heads, hints = [metric.head for metric in shown.values()], [metric.hint for metric in shown.values()]
    write_text(
        folder / "report.html",
        page(
            f"What the shared gradients give to {attack}",
            verdict(says, _reading(summary)),
            bar(attack, interval) if interval else Markup(""),
            _strip(folder, kinds, rows[:3]),
            tiles(summary, metrics, TILES) if scored else Markup(""),
            Markup('<div class="pair"><section>'),
            heading("How close the reconstructions come") if scored else Markup(""),
            _histogram(rows, summary) if scored else Markup(""),
            heading("Threat model: who knows what"),
            facts(threat_model),
            heading("Command"),
            Markup(f"<p>{code(command)}</p></section><section>"),
            heading("Over all images"),
            summary_table(summary, metrics, shown),
            paragraph("Perfect scores, infinite in dB, are left out of mean and std.", note=True) * perfect,
            paragraph(f"Left out, as they say what another score says: {', '.join(same)}.", note=True) * bool(same),
            Markup("</section></div>"),
            heading("Image by image"),
            _toolbar(len(rows), scored),
            sortable_table(["image", *heads], bodies, ["index and name of the image", *hints]),
            style=STYLE + INTERVAL_STYLE,
            script=SORT,
        ),
    )


def _reading(summary: dict) -> str:
    """Return how to read the verdict."""
    if "success" not in summary:
        return "A picture that shows nothing is no proof of privacy: it is what this attack got."
    return (
        f"A picture in the mean colour of the private image, which takes no gradient, scores "
        f"{number(summary['psnr_baseline']['mean'])} dB on average: reconstructions near that are no evidence of a "
        f"leak. A low score is no proof of privacy either: it is the score of this attack."
    )


def _strip(folder: Path, kinds: Mapping[str, str], rows: Sequence[dict]) -> Markup:
    """Return the first victims at a glance: original, reconstruction and error of each, side by side."""
    groups = []
    for row in rows:
        pictures = {
            caption: image for caption, image in _pictures(folder, kinds, row).items() if caption != "model input"
        }
        groups.append(f"<div>{_figures(pictures, Path(row['image']).name)}</div>")
    return Markup(f'<div class="glance">{"".join(groups)}</div>')


def _histogram(rows: Sequence[dict], summary: dict) -> Markup:
    values = [row["psnr"] for row in rows if math.isfinite(row["psnr"])]
    if not values:
        return paragraph("Every reconstruction is perfect or undefined: there is no PSNR to draw.", note=True)
    if len(rows) == 1:
        return paragraph("One image: its scores stand below.", note=True)
    threshold, baseline = summary["success"]["threshold"], summary["psnr_baseline"]["mean"]
    marks = {f"no leak ({number(baseline)} dB)": baseline} if baseline is not None else {}
    perfect = summary["psnr"].get("infinite", 0)
    chart = histogram(values, xlabel="PSNR (dB)", ylabel="images", marks={**marks, f"{threshold:g} dB": threshold})
    more = f"; {perfect} perfect reconstructions are not drawn" if perfect else ""
    return figure(chart, f"PSNR of {len(values)} reconstructions against the original{more}.")


def _toolbar(number_of_rows: int, scored: bool) -> Markup:
    import matplotlib

    colors = ", ".join(matplotlib.colors.to_hex(matplotlib.colormaps[ERROR_MAP](i / 8)) for i in range(9))
    left_out = max(0, number_of_rows - SHOWN_IN_REPORT)
    note = f"<span>the first {SHOWN_IN_REPORT} images are pictured, {left_out} more are in the folders</span>"
    scale = (
        f'<span>error map: 0<span class="scale" style="background: linear-gradient(90deg, {colors})"></span>'
        f"{ERROR_SCALE:g} or more, of a pixel range of 1</span>"
    )
    return Markup(
        '<div class="toolbar"><span>Click a column to sort.</span>'
        '<label><input type="checkbox" checked>pictures</label>'
        f"{scale * scored}{note * bool(left_out)}</div>"
    )


def _views(folder: Path, kinds: Mapping[str, str], row: dict, metrics: Metrics) -> Markup:
    """Return the pictures of one victim, and what else its row says."""
    name = Path(row["image"]).name
    details = {"file": name} | {key: value for key, value in row.items() if key not in (*metrics, "index", "image")}
    return Markup(f'<div class="views">{_figures(_pictures(folder, kinds, row), name)}{facts(details)}</div>')


def _pictures(folder: Path, kinds: Mapping[str, str], row: dict) -> dict[str, Tensor]:
    """Return the pictures (3, H, W) of one victim by caption. Where no patch was shuffled there is no input to show."""
    pictures = {}
    for kind, caption in kinds.items():
        if kind == "inputs" and not (folder / kind / file_name(row)).exists():
            continue
        with Image.open(folder / kind / file_name(row)) as opened:
            pictures[caption] = to_tensor(opened)
    if "original" in pictures:
        pictures["absolute error"] = error_map(pictures["reconstruction"], pictures["original"])
    return pictures


def _figures(pictures: Mapping[str, Tensor], name: str) -> str:
    return "".join(
        f"<figure>{picture(image, 184, f'{caption} of {name}')}<figcaption>{escape(caption)}</figcaption></figure>"
        for caption, image in pictures.items()
    )
