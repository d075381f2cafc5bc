"""Attacks by equations on a ViT-S/14 with random, trained and fine-tuned weights, in float32 and float64, as one table.

    python scripts/weights_table.py --images FOLDER --tuned FILE --lpips_trunk FILE --output runs/weights_table

A cell is a run of attack.py in a folder of its own: finished ones are kept, and the same command continues. Writes
weights_table.json and weights_table.md into the output folder, also of a part of the cells (--cells). What an attack
refuses stands in its cell. --kept FILE: a cell that is not finished here keeps its row of FILE, a weights_table.json of
earlier runs, marked `kept`.
"""

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from attacks.threat_model.leak import RefusalError
from eval.report import read_results
from reports.tables import Measured, Table, markdown
from utils.errors import CONTINUES, UserError, run_command
from utils.files import existing_file, existing_folder, write_json, write_text
from utils.run_once import run_once
from utils.tool_parser import ToolParser

SHAPE = {"patch_size": 14, "embed_dim": 384, "depth": 12, "num_heads": 6, "init_values": 1e-5, "num_classes": 1000}
# Attack, mask ratio, side of the images in pixels. With 256 patches of 384 dimensions token_span has too few equations
# and first_block takes an hour an image: both attack 49 patches.
SETTINGS = (
    ("closed_form", 0.0, 224),
    ("joint", 0.0, 224),
    ("token_span", 0.0, 98),
    ("closed_form", 0.27, 224),
    ("mjp_aware", 0.27, 112),
    ("joint", 0.27, 112),
    ("mjp_aware", 0.27, 224),
    ("joint", 0.27, 224),
    ("first_block", 0.0, 98),
)
COMMAND = "python scripts/weights_table.py --images IMAGENET_SAMPLE/val --tuned FILE --lpips_trunk FILE --output DIR"
LPIPS = ("lpips_alex", "lpips_alex_unverified")
SCORES = ("psnr", "psnr_visible", "psnr_masked", "ssim", "psnr_baseline", "bits_leaked", "seconds")


class Cell(NamedTuple):
    weights: str
    attack: str
    mask_ratio: float
    side: int
    dtype: str

    @property
    def folder(self) -> str:
        return f"{self.weights}/{self.attack}_{self.mask_ratio:g}_{self.side}_{self.dtype}"


def cells(names: Sequence[str]) -> Iterator[Cell]:
    """Yield the cells, all weights of a setting together, so that an interrupted table has whole rows."""
    for attack, ratio, side in SETTINGS:
        for dtype in ("float32", "float64"):
            yield from (Cell(name, attack, ratio, side, dtype) for name in names)


def chosen(patterns: Sequence[str], names: Sequence[str]) -> set[Cell]:
    """Return the cells whose folder one of the patterns matches. Raises UserError for a pattern that matches none."""
    found: set[Cell] = set()
    for pattern in patterns:
        hits = {cell for cell in cells(names) if fnmatch(cell.folder, pattern)}
        if not hits:
            first = next(cells(names)).folder
            raise UserError(f"--cells '{pattern}' matches no cell of this table: they are called as '{first}'")
        found |= hits
    return found


def kept_rows(path: Path | None) -> dict[Cell, dict]:
    """Return the measured rows of an earlier weights_table.json by cell."""
    rows = read_results(path, "rows")["rows"] if path else []
    return {Cell(*(row[key] for key in Cell._fields)): row | {"kept": True} for row in rows}


def victim(name: str, files: dict[str, Path], mask_ratio: float) -> list[str]:
    """Return the options of attack.py for the victim; under MJP all have an unknown row, drawn where the file has
    none."""
    unknown = ["--model_options.unknown", "true"] if mask_ratio else []
    if name == "random":
        return ["--model", "vit", *unknown, *(f"--model_options.{key}={value}" for key, value in SHAPE.items())]
    classes = ["--model_options.num_classes", "1000"] if name == "trained" else []
    return ["--checkpoint", str(files[name]), *classes, *unknown]


def attack_options(cell: Cell, given: Namespace, files: dict[str, Path]) -> list[str]:
    """Return the options of attack.py for a cell."""
    options = ["--attack", cell.attack, *victim(cell.weights, files, cell.mask_ratio), "--images", str(given.images)]
    options += ["--num_images", str(given.num_images), "--mask_ratio", str(cell.mask_ratio), "--dtype", cell.dtype]
    options += ["--image_size", str(cell.side), "--lpips", "alex", "--lpips_trunk", str(given.lpips_trunk)]
    return options


def measure(cell: Cell, given: Namespace, files: dict[str, Path]) -> dict:
    """Return the row of a cell, from its folder or after running attack.py in it."""
    row: dict = cell._asdict()
    try:
        found = run_once("attack.py", attack_options(cell, given, files), given.output / cell.folder)["summary"]
    except RefusalError as error:  # a result; a folder of other options is none
        return row | {"refused": str(error)}
    return row | {"n": found["psnr"]["n"]} | {key: found[key] for key in (*SCORES, *LPIPS) if key in found}


def as_table(rows: list[dict]) -> Table:
    lines = []
    for row in rows:
        setting = [row["weights"], row["attack"], f"{row['mask_ratio']:g}", row["side"], row["dtype"]]
        psnr, ssim = row.get("psnr"), row.get("ssim")
        lpips = next((row[key] for key in LPIPS if key in row), None)
        scores = [Measured(psnr["mean"], psnr["std"]) if psnr else Measured(None)]
        scores += [Measured(one["mean"], one["std"], ".3f", ".3f") if one else Measured(None) for one in (ssim, lpips)]
        lines.append(setting + scores)
    header = ["weights", "attack", "masked", "px", "dtype", "PSNR (dB)", "SSIM", "LPIPS"]
    return Table(header, lines, "± sample standard deviation over images")


def main() -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True, metavar="FOLDER", help="photographs")
    default = Path("datasets/weights/vit_small_patch14_saliency.safetensors")
    parser.add_argument("--trained", type=Path, default=default, help="pretrained ViT (default: %(default)s)")
    parser.add_argument("--tuned", type=Path, metavar="FILE", help="a fine-tuned checkpoint with an unknown row")
    parser.add_argument("--lpips_trunk", type=Path, required=True, metavar="FILE", help="AlexNet of LPIPS")
    parser.add_argument("--cells", nargs="+", default=["*"], metavar="GLOB", help="only these, as 'tuned/joint_0_*'")
    parser.add_argument("--kept", type=Path, metavar="FILE", help="rows of earlier runs, for cells not finished here")
    parser.add_argument("--num_images", type=int, default=4, metavar="N", help="photographs (default: %(default)s)")
    parser.add_argument("--only_finished", action="store_true", help="attack nothing: the table of the finished cells")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="of the table")
    given = parser.parse_args()
    existing_folder(given.images, "folder of photographs")
    files = {"trained": given.trained} | ({"tuned": given.tuned} if given.tuned else {})
    for what, file in {**files, "LPIPS": given.lpips_trunk}.items():
        existing_file(file, f"{what} weights")
    names = ("random", "trained", "tuned")
    wanted, kept = chosen(given.cells, ["random", *files]), kept_rows(given.kept)
    given.output.mkdir(parents=True, exist_ok=True)
    rows: dict[Cell, dict] = {cell: kept[cell] for cell in cells(names) if cell in kept}
    for cell in cells(["random", *files]):
        finished = (given.output / cell.folder / "results.json").is_file()
        if not finished and (given.only_finished or cell not in wanted):
            continue
        rows[cell] = measure(cell, given, files)
        print(cell.folder, rows[cell].get("refused") or rows[cell]["psnr"], flush=True)
        ordered = [rows[cell] for cell in cells(names) if cell in rows]
        write_json(given.output / "weights_table.json", {"command": COMMAND, "rows": ordered})
        write_text(given.output / "weights_table.md", markdown(as_table(ordered)))


if __name__ == "__main__":
    run_command(main, CONTINUES)
