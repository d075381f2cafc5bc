"""Accuracy on ImageNet-C and the mean corruption error, normalised by AlexNet's errors and not.

    python -m eval.mce --results F [--clean_error PERCENT] [--json FILE]

The two are easily taken for each other: the CVPR version of the MJP paper prints the unnormalised one, Hendrycks &
Dietterich (ICLR 2019) and most others the normalised one. Both are over the 15 standard corruptions at 5 severities and
nothing less; the four extra corruptions are listed beside them.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from data.corruptions import CORRUPTIONS, SEVERITIES, STANDARD
from data.options import DataOptions
from eval.accuracy import accuracy
from eval.natural import open_folder, required
from eval.options import SubjectOptions
from eval.subject import open_model, outputs_of
from models.jigsaw import Jigsaw
from utils.distributed import Processes
from utils.errors import UserError, reason, run_command
from utils.files import existing_folder, write_json
from utils.notes import Notes
from utils.tool_parser import ToolParser

# AlexNet's top-1 error in percent, mean over the severities (Hendrycks & Dietterich, table 1, with the digits of their
# evaluation code), and on clean images.
ALEXNET_ERROR = {
    "gaussian_noise": 88.6428, "shot_noise": 89.4468, "impulse_noise": 92.2640, "defocus_blur": 81.9880,
    "glass_blur": 82.6268, "motion_blur": 78.5948, "zoom_blur": 79.8360, "snow": 86.6816, "frost": 82.6572,
    "fog": 81.9324, "brightness": 56.4592, "contrast": 85.3204, "elastic_transform": 64.6056, "pixelate": 71.7840,
    "jpeg_compression": 60.6500,
}  # fmt: skip
ALEXNET_CLEAN_ERROR = 43.5


def mce(errors: Mapping[str, float], baseline: Mapping[str, float] = ALEXNET_ERROR) -> float:
    """Return the normalised mean corruption error: 100 x mean of error / AlexNet's error; 100 is AlexNet, lower is
    better.

    errors: top-1 error in percent by corruption, averaged over the severities. Other than standard ones are left out.
    """
    return 100 * fmean(error / baseline[name] for name, error in standard(errors).items())


def mce_unnormalised(errors: Mapping[str, float]) -> float:
    """Return the mean error over the standard corruptions, in percent; lower is better. errors: as for `mce`."""
    return fmean(standard(errors).values())


def relative_mce(
    errors: Mapping[str, float],
    clean_error: float,
    baseline: Mapping[str, float] = ALEXNET_ERROR,
    baseline_clean_error: float = ALEXNET_CLEAN_ERROR,
) -> float:
    """Return what corruption adds to the clean error, in percent of what it adds to AlexNet's; lower is better.

    errors: as for `mce`. clean_error: top-1 error in percent on clean images.
    """
    found = standard(errors)
    return 100 * fmean((error - clean_error) / (baseline[name] - baseline_clean_error) for name, error in found.items())


def standard(errors: Mapping[str, float]) -> dict[str, float]:
    """Return the errors of the 15 standard corruptions. Raises UserError when one is missing: their mean is no mCE."""
    if missing := [name for name in STANDARD if name not in errors]:
        raise UserError(f"mCE needs all 15 corruptions at 5 severities, {len(missing)} lack: {', '.join(missing)}")
    return {name: errors[name] for name in STANDARD}


def corruption_errors(rows: Sequence[Mapping]) -> dict[str, float]:
    """Return the top-1 error in percent by corruption, the mean over severities 1 to 5, of those that have all five.

    rows: {"corruption", "severity", "acc1" in percent, ...}. Raises UserError for rows that are not of this form, twice
    the same, or of unknown corruptions.
    """
    errors: dict[str, dict[int, float]] = {}
    for row in rows:
        try:
            name, severity, acc1 = row["corruption"], row["severity"], row["acc1"]
            valid = name in CORRUPTIONS and severity in SEVERITIES and 0 <= acc1 <= 100
        except (KeyError, TypeError):
            valid = False
        if not valid:
            raise UserError(f"{row} is not a row of ImageNet-C: it needs corruption, severity (1-5) and acc1 (0-100)")
        if severity in errors.setdefault(name, {}):
            raise UserError(f"{name} at severity {severity} is there twice: keep one of the rows")
        errors[name][severity] = 100 - acc1
    return {name: fmean(found.values()) for name, found in errors.items() if len(found) == len(SEVERITIES)}


def summarize(rows: Sequence[Mapping], clean_error: float | None = None) -> dict:
    """Return {"mce", "mce_unnormalised", "relative_mce", "errors", "clean_error"} of ImageNet-C rows, in percent.

    relative_mce is None without a clean error, and all three where not every standard corruption has five severities.
    """
    errors = corruption_errors(rows)
    complete = all(name in errors for name in STANDARD)
    return {
        "mce": mce(errors) if complete else None,
        "mce_unnormalised": mce_unnormalised(errors) if complete else None,
        "relative_mce": relative_mce(errors, clean_error) if complete and clean_error is not None else None,
        "errors": errors,
        "clean_error": clean_error,
    }


def table(rows: Sequence[Mapping], summary: Mapping) -> list[str]:
    """Return lines of text: error per corruption and severity, corruption error, and the means, each by its full
    name."""
    known = {(row["corruption"], row["severity"]): 100 - row["acc1"] for row in rows}
    lines = [f"{'top-1 error (%)':22s}" + "".join(f"{severity:8d}" for severity in SEVERITIES) + "    mean      CE"]
    for name in CORRUPTIONS:
        if not any((name, severity) in known for severity in SEVERITIES):
            continue
        cells = [known.get((name, severity), math.nan) for severity in SEVERITIES]
        mean = summary["errors"].get(name, math.nan)
        ratio = 100 * mean / ALEXNET_ERROR[name] if name in ALEXNET_ERROR else math.nan
        lines.append(
            f"{name:22s}" + "".join("       -" if math.isnan(v) else f"{v:8.2f}" for v in (*cells, mean, ratio))
        )
    for key, label in (
        ("mce", "mCE, normalised by AlexNet (%)"),
        ("mce_unnormalised", "mCE, unnormalised: mean error (%)"),
        ("relative_mce", "relative mCE, normalised by AlexNet (%)"),
    ):
        if summary[key] is not None:
            lines.append(f"{label:62s}{summary[key]:8.2f}")
    return lines


def imagenet_c(
    peers: Processes,
    *,
    model: SubjectOptions,
    data: DataOptions,
    seed: int = 0,
    limit: int | None = None,
    clean_error: float | None = None,
    log: Callable[[str], None] | None = None,
    notes: Notes | None = None,
) -> dict:
    """Return {"imagenet_c": [row of `accuracy` with corruption and severity], "mce": `summarize`} of data.path.

    That folder holds <corruption>/<severity>/<class>/<image>; what is there is scored. The images are not cropped a
    second time, and resized only where the model's input has another size. limit: images per corruption and severity.
    clean_error: as for `summarize`. model, data, seed: as for `open_model`.
    """
    root = Path(required(data.path, "data.path", "the folder of ImageNet-C"))
    existing_folder(root, "ImageNet-C folder")
    pairs = [(name, level) for name in CORRUPTIONS for level in SEVERITIES if (root / name / str(level)).is_dir()]
    if not pairs:
        raise UserError(f"'{root}' has no corruptions: expected {root}/gaussian_noise/1/<class>/<image>.JPEG and so on")
    network, inputs = open_model(peers, model, data, seed=seed, notes=notes)
    uncropped, clean = replace(inputs, data=replace(inputs.data, crop=False)), [Jigsaw(network.grid, 0.0)]
    rows = []
    for name, level in pairs:
        loader = open_folder(root / name / str(level), peers, uncropped, limit)
        loader.dataset.label_map = outputs_of(network, loader, notes)
        (row,) = accuracy(network, loader, peers, clean, log)
        rows.append({"corruption": name, "severity": level} | {key: row[key] for key in row if key != "mask_ratio"})
        if log:
            log(f"{name} {level}: acc1 {row['acc1']:.2f} ({len(rows)}/{len(pairs)})")
    summary = summarize(rows, clean_error)
    for line in table(rows, summary) if log else ():
        log(line)
    return {"imagenet_c": rows, "mce": summary}


def read_rows(path: Path) -> list[dict]:
    """Return the ImageNet-C rows of a results.json. Raises UserError when there are none."""
    if not path.is_file():
        raise UserError(f"--results '{path}' {'is not a file' if path.exists() else 'does not exist'}")
    try:
        rows = json.loads(path.read_text()).get("imagenet_c")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--results '{path}' is not a results.json ({reason(error)}): pass one of eval.py") from error
    if not isinstance(rows, list) or not rows:
        raise UserError(f"--results '{path}' has no imagenet_c rows: run eval.py --suite imagenet-c first")
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = ToolParser(prog="python -m eval.mce", description=__doc__)
    parser.add_argument("--results", type=Path, metavar="F", required=True, help="results.json with imagenet_c rows")
    text = "top-1 error on clean images in percent, for the relative mCE"
    parser.add_argument("--clean_error", type=float, metavar="PERCENT", help=text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the means and the error of every corruption")
    args = parser.parse_args(argv)
    if args.clean_error is not None and not 0 <= args.clean_error <= 100:
        parser.error(f"--clean_error must be between 0 and 100, got {args.clean_error}")
    if args.json:
        existing_folder(args.json.absolute().parent, "--json: folder")
    rows = read_rows(args.results)
    standard(corruption_errors(rows))
    summary = summarize(rows, args.clean_error)
    print("\n".join(table(rows, summary)))
    if args.json:
        write_json(args.json, summary)


if __name__ == "__main__":
    run_command(main)
