"""What attack.py leaves behind: pictures of every victim, per_image.csv and report.html."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torchvision.utils import save_image

from eval.report import Markup, code, heading, number, page, paragraph, picture, table
from utils.files import write_text

METRICS = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "mse": "MSE",
    "psnr_shown": "PSNR to model input (dB)",
    "psnr_visible": "PSNR of visible patches (dB)",
    "psnr_visible_raw": "same, not clamped (dB)",
    "exact_pixels": "8-bit values exact (%)",
    "seconds": "attack time (s)",
}
SHOWN_IN_REPORT = 60  # victims pictured in report.html; results.json and the folders hold all


def save_victims(
    folder: Path, first: int, names: Sequence[str], original: Tensor, shown: Tensor, reconstruction: Tensor
) -> list[tuple[int, tuple[Tensor, ...]]]:
    """Write originals/NAME.png and reconstructions/NAME.png from pixel values (B, 3, H, W).

    Returns (index, (original, shown, reconstruction)) of the victims that `write_page` pictures.
    """
    for kind, images in (("originals", original), ("reconstructions", reconstruction)):
        (folder / kind).mkdir(exist_ok=True)
        for name, image in zip(names, images, strict=True):
            save_image(image.clamp(0, 1).float(), folder / kind / f"{name}.png")
    pictured = range(min(len(names), max(0, SHOWN_IN_REPORT - first)))
    return [(first + i, (original[i], shown[i], reconstruction[i])) for i in pictured]


def summary_table(summary: dict) -> str:
    """The summary as lines of text."""
    lines = [f"{'':<36}      mean       std     n"]
    for key, label in METRICS.items():
        row = summary[key]
        perfect = f"   and {row['infinite']} perfect" if row.get("infinite") else ""
        lines.append(f"{label:<36}{number(row['mean']):>10}{number(row['std']):>10}{row['n']:>6}{perfect}")
    return "\n".join(lines)


def write_csv(folder: Path, rows: Sequence[dict]) -> None:
    """Write per_image.csv, one line per victim."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "per_image.csv", text.getvalue())


def write_page(
    folder: Path, command: str, pictures: dict[int, Sequence[Tensor]], rows: Sequence[dict], summary: dict
) -> None:
    """Write report.html. pictures: by victim index, (original, shown to the model, reconstruction), each (3, H, W)."""
    perfect = any(row.get("infinite") for row in summary.values())
    totals = [
        [label, *(summary[key][part] for part in ("mean", "std", "n")), *[summary[key].get("infinite", 0)] * perfect]
        for key, label in METRICS.items()
    ]
    shuffled = any(not original.equal(shown) for original, shown, _ in pictures.values())
    names = ["original", "shown to the model", "reconstruction"] if shuffled else ["original", "reconstruction"]
    columns = {"psnr": "PSNR (dB)", "ssim": "SSIM", "psnr_visible": "visible (dB)", "exact_pixels": "exact (%)"}
    lines = []
    for row in rows[:SHOWN_IN_REPORT]:
        images = [picture(image, 150) for image in pictures[row["index"]]]
        images = images if shuffled else [images[0], images[2]]
        lines.append([Path(row["image"]).name, *images, *(row[key] for key in columns)])
    left_out = len(rows) - len(lines)
    write_text(
        folder / "report.html",
        page(
            "What the shared gradients give away",
            Markup(f"<p>{code(command)}</p>"),
            heading("Over all images"),
            table(["score", "mean", "std", "n", *["perfect, not in the mean"] * perfect], totals),
            heading("Image by image"),
            paragraph(f"The first {len(lines)} images; {left_out} more are in results.json.", note=True)
            if left_out
            else Markup(""),
            table(["image", *names, *columns.values()], lines),
        ),
    )
