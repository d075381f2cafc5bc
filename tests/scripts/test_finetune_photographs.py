"""scripts/reproduce/finetune_photographs.sh: which photographs are of which class, and which are for validation."""

import subprocess
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "reproduce" / "finetune_photographs.sh"


def run(images: Path, output: Path) -> subprocess.CompletedProcess:
    settings = {"PATH": "/usr/bin:/bin", "PYTHON": "true", "IMAGES": str(images), "INIT": "weights", "OUT": str(output)}
    return subprocess.run([SCRIPT], env=settings, capture_output=True, text=True)


def test_animals_and_as_many_others_three_of_ten_for_validation(tmp_path):
    for name in [f"n0144076{number}_animal" for number in range(10)] + [
        f"n030000{number}_thing" for number in range(10, 40)
    ]:
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        (folder / "a.JPEG").touch()
        (folder / "b.JPEG").touch()
    outcome = run(tmp_path / "images", tmp_path / "out")
    assert outcome.returncode == 0, outcome.stderr
    found = {path.relative_to(tmp_path / "out.animals"): path for path in (tmp_path / "out.animals").glob("*/*/*")}
    assert all(path.resolve().name == "a.JPEG" and path.exists() for path in found.values())
    counts = {f"{part}/{kind}": sum(path.parts[:2] == (part, kind) for path in found)
              for part in ("train", "val") for kind in ("animal", "other")}  # fmt: skip
    assert counts == {"train/animal": 7, "train/other": 7, "val/animal": 3, "val/other": 3}
    others = sorted(path.name[:9] for path in found if "other" in path.parts)
    assert others == [f"n030000{number}" for number in range(10, 40, 3)]  # spread over all
    assert len(list((tmp_path / "out.data" / "val").glob("*/*"))) == 6


def test_folders_of_other_names_are_refused(tmp_path):
    (tmp_path / "images" / "cat").mkdir(parents=True)
    outcome = run(tmp_path / "images", tmp_path / "out")
    assert outcome.returncode == 2 and "0 classes of animals and 0 others" in outcome.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
