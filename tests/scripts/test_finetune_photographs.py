"""scripts/reproduce/finetune.sh, finetune_photographs.sh: which pictures they take, and what they say of the call."""

import subprocess
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "reproduce"


def start(script: str, output: Path, python: str = "true", **settings: object) -> subprocess.CompletedProcess:
    known = {"PATH": "/usr/bin:/bin", "PYTHON": python, "INIT": "weights", "OUT": str(output)}
    settings = known | {key: str(value) for key, value in settings.items()}
    return subprocess.run([SCRIPTS / script], env=settings, capture_output=True, text=True)


def run(images: Path, output: Path, **settings: object) -> subprocess.CompletedProcess:
    return start("finetune_photographs.sh", output, IMAGES=images, **settings)


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
    outcome = run(tmp_path / "images", tmp_path / "out", PYTHON="echo", SEEDS="0 1", VARIANTS="plain")
    command = "SEEDS='0 1' VARIANTS='plain' IMAGES=IMAGENET/val scripts/reproduce/finetune_photographs.sh"
    assert outcome.returncode == 0 and outcome.stdout.count(f"--command {command}\n") == 2, outcome
    (tmp_path / "images" / "n01440760_animal" / "a.JPEG").unlink()
    refused(run(tmp_path / "images", tmp_path / "out"), tmp_path / "out.animals")


def refused(outcome: subprocess.CompletedProcess, folder: Path) -> None:
    assert outcome.returncode == 2, outcome
    assert outcome.stderr.startswith(f"error: '{folder}' links to other files than this call asks for")
    assert outcome.stderr.count("\n") == 1


def test_pictures_of_an_earlier_call_are_not_taken_along(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    for name in ("train/a", "val/a", "val/b"):
        (data / name).mkdir(parents=True)
        for number in range(6):
            (data / name / f"{number}.jpg").touch()

    def chosen() -> list[str]:
        return sorted(str(path.relative_to(f"{out}.data")) for path in Path(f"{out}.data/val").glob("*/*"))

    part = {"DATA": data, "SKIP": 1, "SEEDS": "0", "VARIANTS": "plain"}
    assert start("finetune.sh", out, python="false", **part, EACH=2).returncode == 1  # before anything was made of them
    first = chosen()
    assert first == ["val/a/1.jpg", "val/a/2.jpg", "val/b/1.jpg", "val/b/2.jpg"]
    refused(start("finetune.sh", out, **part, EACH=1), Path(f"{out}.data"))
    outcome = start("finetune.sh", out, python="echo", **part, EACH=2)
    command = "SEEDS='0' VARIANTS='plain' SKIP='1' EACH='2' DATA=CIFAR10 scripts/reproduce/finetune.sh"
    assert outcome.returncode == 0 and f"--command {command}\n" in outcome.stdout, outcome
    for other in ({"EACH": 1}, {"EACH": 3}, {"EACH": 2, "SKIP": 0}):
        refused(start("finetune.sh", out, **part | other), Path(f"{out}.data"))
    assert chosen() == first and (Path(f"{out}.data") / "train").resolve() == data / "train"


def test_data_without_its_two_folders_is_refused(tmp_path):
    outcome = start("finetune.sh", tmp_path / "out", DATA=tmp_path / "none")
    assert outcome.returncode == 2 and "has no train/ and val/" in outcome.stderr and not list(tmp_path.iterdir())


def test_folders_of_other_names_are_refused(tmp_path):
    (tmp_path / "images" / "cat").mkdir(parents=True)
    outcome = run(tmp_path / "images", tmp_path / "out")
    assert outcome.returncode == 2 and "0 classes of animals and 0 others" in outcome.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
