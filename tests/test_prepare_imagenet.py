"""scripts/prepare_imagenet.py on small tars of the official structure: results, restarts and refusals."""

import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

ROOT = Path(__file__).parents[1]
WNIDS = ("n01440764", "n01443537", "n01484850")
TRAIN_NUMBERS = (10026, 10027, 7)
VAL_IDS = (3, 1, 2, 1, 3)  # ILSVRC2012_ID of the validation images; ID i is WNIDS[i - 1]
VAL_NAMES = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, len(VAL_IDS) + 1)]
VAL_LABELS = {name: WNIDS[number - 1] for name, number in zip(VAL_NAMES, VAL_IDS, strict=True)}


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def plain(name: str) -> tarfile.TarInfo:
    return tarfile.TarInfo(name)


def of_type(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def tar_bytes(members: list[tuple[tarfile.TarInfo, bytes]], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


TRAIN = {
    wnid: {f"{wnid}_{number}.JPEG": jpeg(100 * place + number) for number in TRAIN_NUMBERS}
    for place, wnid in enumerate(WNIDS)
}
VAL = {name: jpeg(seed) for seed, name in enumerate(VAL_NAMES)}
EXPECTED = {f"train/{wnid}/{name}": content for wnid, images in TRAIN.items() for name, content in images.items()}
EXPECTED |= {f"val/{VAL_LABELS[name]}/{name}": content for name, content in VAL.items()}


def class_members(wnid: str) -> list[tuple[tarfile.TarInfo, bytes]]:
    return [(plain(name), content) for name, content in TRAIN[wnid].items()]


def train_tar(**replaced: bytes) -> bytes:
    """The train tar; a class tar can be replaced by other bytes."""
    return tar_bytes([(plain(f"{w}.tar"), replaced.get(w, tar_bytes(class_members(w)))) for w in WNIDS])


def val_members() -> list[tuple[tarfile.TarInfo, bytes]]:
    return [(plain(name), content) for name, content in VAL.items()]


def devkit_tar(ids: tuple[int, ...] = VAL_IDS) -> bytes:
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height"]
    fields.append("num_train_images")
    rows = [(place, wnid, "name", "text", 0, 0, 0, 3) for place, wnid in enumerate(WNIDS, 1)]
    rows.append((4, "n00001740", "entity", "an inner node", 3, np.array([1, 2, 3]), 1, 0))
    synsets = np.empty((len(rows), 1), dtype=[(field, object) for field in fields])
    synsets[:, 0] = rows
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    truth = "".join(f"{number}\n" for number in ids).encode()
    folder = "ILSVRC2012_devkit_t12"
    names = {"data/meta.mat": meta.getvalue(), "data/ILSVRC2012_validation_ground_truth.txt": truth, "readme.txt": b"x"}
    members = [(of_type(folder, tarfile.DIRTYPE), b"")]
    return tar_bytes(members + [(plain(f"{folder}/{name}"), content) for name, content in names.items()], "w:gz")


def sha1(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "scripts/prepare_imagenet.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.fixture
def release(tmp_path: Path) -> SimpleNamespace:
    """The release in tmp_path/in and the place to extract to, tmp_path/home/out."""
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "home").mkdir()
    files = SimpleNamespace(
        train=folder / "ILSVRC2012_img_train.tar",
        val=folder / "ILSVRC2012_img_val.tar",
        devkit=folder / "ILSVRC2012_devkit_t12.tar.gz",
        labels=folder / "labels.txt",
        output=tmp_path / "home" / "out",
    )
    files.train.write_bytes(train_tar())
    files.val.write_bytes(tar_bytes(val_members()))
    files.devkit.write_bytes(devkit_tar())
    files.labels.write_text("".join(f"{name} {wnid}\n" for name, wnid in VAL_LABELS.items()))
    return files


def run_train(files: SimpleNamespace, *more) -> subprocess.CompletedProcess:
    return run("--train", files.train, "--output", files.output, *(more or ["--skip_sha1"]))


def run_val(files: SimpleNamespace, *more) -> subprocess.CompletedProcess:
    return run("--val", files.val, "--val_labels", files.labels, "--output", files.output, "--skip_sha1", *more)


def run_both(files: SimpleNamespace, *labels) -> subprocess.CompletedProcess:
    sums = ["--sha1_train", sha1(files.train), "--sha1_val", sha1(files.val)]
    return run("--train", files.train, "--val", files.val, *labels, "--output", files.output, *sums)


def images_below(output: Path) -> dict[str, bytes]:
    """All that was written, without the marker of the checked sums."""
    return {name: content for name, content in files_below(output).items() if name != ".sha1_checked.json"}


def assert_done(result: subprocess.CompletedProcess, output: Path) -> None:
    assert result.returncode == 0, result.stderr
    assert images_below(output) == EXPECTED
    assert "train: 3 classes, 9 images" in result.stdout
    assert "val: 3 classes, 5 images" in result.stdout


def assert_refused(result: subprocess.CompletedProcess, files: SimpleNamespace, *texts: str) -> None:
    """One error line at the end, status 2, and only OUTPUT was touched."""
    lines = result.stderr.splitlines()
    assert result.returncode == 2, result.stderr
    assert lines[-1].startswith("error: ")
    assert sum("error:" in line for line in lines) == 1
    assert "Traceback" not in result.stderr
    for text in texts:
        assert text in lines[-1]
    assert set(os.listdir(files.output.parent)) <= {"out"}
    assert set(os.listdir(files.output.parents[1])) == {"in", "home"}
    unfinished = {f"train/.{wnid}.partial/{name}" for wnid, images in TRAIN.items() for name in images}
    assert set(images_below(files.output)) <= set(EXPECTED) | unfinished


def test_both_with_devkit(release):
    assert_done(run_both(release, "--devkit", release.devkit), release.output)


def test_both_with_label_file(release):
    assert_done(run_both(release, "--val_labels", release.labels), release.output)


def test_folder_members_are_ignored(release):
    members = [(of_type("./", tarfile.DIRTYPE), b""), *[(plain(f"./{m.name}"), c) for m, c in class_members(WNIDS[0])]]
    release.train.write_bytes(train_tar(**{WNIDS[0]: tar_bytes(members)}))
    assert_done(run_both(release, "--devkit", release.devkit), release.output)


def test_restart_completes_the_unfinished_and_keeps_the_finished(release):
    train, val = release.output / "train", release.output / "val"
    finished, unfinished = train / WNIDS[1], train / f".{WNIDS[0]}.partial"
    kept = [finished / next(iter(TRAIN[WNIDS[1]])), val / VAL_LABELS[VAL_NAMES[0]] / VAL_NAMES[0]]
    cut = val / VAL_LABELS[VAL_NAMES[1]] / VAL_NAMES[1]
    for name, content in EXPECTED.items():
        path = release.output / name
        if path.parent == finished or path in (*kept, cut):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content[:100] if path == cut else content)
    unfinished.mkdir()
    (unfinished / f"{WNIDS[0]}_10026.JPEG").write_bytes(b"half an ima")
    (cut.parent / f".{VAL_NAMES[3]}.123.tmp").write_bytes(b"half an ima")
    for path in kept:
        os.utime(path, (1, 1))
    before = [path.stat() for path in kept]

    assert_done(run_both(release, "--devkit", release.devkit), release.output)

    after = [path.stat() for path in kept]
    assert [(s.st_ino, s.st_mtime_ns) for s in after] == [(s.st_ino, s.st_mtime_ns) for s in before]
    assert not unfinished.exists()


def test_run_after_a_refused_class_gives_the_whole_result(release):
    release.train.write_bytes(train_tar(**{WNIDS[1]: tar_bytes(class_members(WNIDS[1]))[:1200]}))
    assert_refused(run_train(release), release, f"{WNIDS[1]}.tar", "cut short")
    assert (release.output / "train" / WNIDS[0]).exists()
    assert not (release.output / "train" / WNIDS[1]).exists()
    release.train.write_bytes(train_tar())
    assert_done(run_both(release, "--devkit", release.devkit), release.output)


def test_checked_sum_is_remembered_until_the_tar_changes(release):
    sums = ["--sha1_train", sha1(release.train).upper()]
    assert "SHA-1" in run_train(release, *sums).stderr
    assert "SHA-1" not in run_train(release, *sums).stderr
    os.utime(release.train, (1, 1))
    assert "SHA-1" in run_train(release, *sums).stderr
    assert_refused(run_train(release, "--sha1_train", "0" * 40), release, "0" * 40)


def test_wrong_sum(release):
    official = "43eda4fe35c1705d6606a6a7a633bc965d194284"
    result = run("--train", release.train, "--output", release.output)
    assert_refused(result, release, sha1(release.train), official, "--sha1_train", "--skip_sha1", "download")
    assert not release.output.exists()


EVIL = {
    "traversal": plain("../evil.JPEG"),
    "traversal with an official name": plain("../n01440764_1.JPEG"),
    "deep traversal": plain("a/../../../n01440764_1.JPEG"),
    "absolute": plain("/n01440764_1.JPEG"),
    "symlink": of_type("n01440764_1.JPEG", tarfile.SYMTYPE, "../../../../evil"),
    "hard link": of_type("n01440764_1.JPEG", tarfile.LNKTYPE, "n01440764_10026.JPEG"),
    "fifo": of_type("n01440764_1.JPEG", tarfile.FIFOTYPE),
    "device": of_type("n01440764_1.JPEG", tarfile.CHRTYPE),
    "unknown name": plain("notes.txt"),
    "name with a newline": plain("n01440764_1.JPEG\n"),
    "folder outside": of_type("../out2", tarfile.DIRTYPE),
}


@pytest.mark.parametrize("kind", EVIL)
def test_unsafe_member_of_a_class_tar(release, kind):
    inner = tar_bytes([*class_members(WNIDS[0]), (EVIL[kind], b"")])
    release.train.write_bytes(train_tar(**{WNIDS[0]: inner}))
    assert_refused(run_train(release), release, repr(EVIL[kind].name), f"{WNIDS[0]}.tar", str(release.train))


@pytest.mark.parametrize(
    "member",
    [
        plain("../evil.JPEG"),
        plain(f"../{VAL_NAMES[0]}"),
        plain(f"/{VAL_NAMES[0]}"),
        of_type(VAL_NAMES[0], tarfile.SYMTYPE, "/etc/hostname"),
        plain("n01440764_1.JPEG"),
    ],
    ids=["traversal", "traversal with an official name", "absolute", "symlink", "unknown name"],
)
def test_unsafe_member_of_the_val_tar(release, member):
    release.val.write_bytes(tar_bytes([*val_members(), (member, b"")]))
    assert_refused(run_val(release), release, repr(member.name), str(release.val))
    assert not release.output.exists()


def test_unsafe_member_of_the_train_tar(release):
    release.train.write_bytes(tar_bytes([(plain("../n01440764.tar"), tar_bytes(class_members(WNIDS[0])))]))
    assert_refused(run_train(release), release, "'../n01440764.tar'")
    assert not release.output.exists()


CUTS = ("inside an image", "inside a header", "between members", "before the end marker")


@pytest.mark.parametrize("cut", CUTS)
def test_truncated_tar(release, cut):
    for path, run_it in ((release.val, run_val), (release.train, run_train)):
        with tarfile.open(path) as tar:
            last = tar.getmembers()[-1]
            lengths = (last.offset_data + 20, last.offset + 20, last.offset, tar.offset)
        path.write_bytes(path.read_bytes()[: lengths[CUTS.index(cut)]])
        assert_refused(run_it(release), release, str(path), "cut short")


@pytest.mark.parametrize("inner", [b"", tar_bytes([]), b"no tar at all" * 100], ids=["0 bytes", "no members", "junk"])
def test_class_tar_without_images(release, inner):
    release.train.write_bytes(train_tar(**{WNIDS[1]: inner}))
    assert_refused(run_train(release), release, f"{WNIDS[1]}.tar", str(release.train))
    assert not (release.output / "train" / WNIDS[1]).exists()


def test_missing_label(release):
    release.labels.write_text(f"{VAL_NAMES[0]} {WNIDS[0]}\n")
    assert_refused(run_val(release), release, VAL_NAMES[1], "no label", "--val_labels")
    release.devkit.write_bytes(devkit_tar(VAL_IDS[:-1]))
    result = run("--val", release.val, "--devkit", release.devkit, "--output", release.output, "--skip_sha1")
    assert_refused(result, release, VAL_NAMES[-1], "no label")
    assert not release.output.exists()


def test_bad_labels(release):
    release.labels.write_text(f"{VAL_NAMES[0]} ../../n01440764\n")
    assert_refused(run_val(release), release, str(release.labels), "../../n01440764")
    bomb = tar_bytes(
        [(plain("meta.mat"), bytes(1 << 27)), (plain("ILSVRC2012_validation_ground_truth.txt"), b"")], "w:gz"
    )
    for content in (b"junk", devkit_tar()[:200], devkit_tar((4, 4, 4, 4, 4)), bomb):
        release.devkit.write_bytes(content)
        result = run("--val", release.val, "--devkit", release.devkit, "--output", release.output, "--skip_sha1")
        assert_refused(result, release, str(release.devkit))


def test_different_classes_in_train_and_val(release):
    release.train.write_bytes(tar_bytes([(plain(f"{w}.tar"), tar_bytes(class_members(w))) for w in WNIDS[:2]]))
    assert_refused(run_both(release, "--devkit", release.devkit), release, WNIDS[2], "classes")


def test_other_labels_than_those_of_an_earlier_run(release):
    assert run_val(release).returncode == 0
    release.labels.write_text(release.labels.read_text().replace(WNIDS[0], WNIDS[1]))
    result = run_val(release)
    assert result.returncode == 2
    assert "remove that folder" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--output", "{output}"], "--train"),
        (["--val", "{val}", "--output", "{output}"], "--devkit"),
        (["--train", "{train}"], "--output"),
        (["--train", "{train}.gone", "--output", "{output}"], "does not exist"),
        (["--tarin", "{train}", "--output", "{output}"], "unknown option '--tarin': did you mean '--train'"),
    ],
)
def test_bad_command_line(release, arguments, text):
    result = run(*(argument.format(**{k: str(v) for k, v in vars(release).items()}) for argument in arguments))
    assert_refused(result, release, text)


def test_output_that_cannot_be_written(release):
    release.output.write_text("a file is in the way")
    result = run_train(release)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(f"error: cannot prepare '{release.output}'")


def test_official_tars_must_give_the_official_counts(release, monkeypatch):
    spec = importlib.util.spec_from_file_location("prepare_imagenet", ROOT / "scripts" / "prepare_imagenet.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setitem(script.SHA1, "train", sha1(release.train))
    monkeypatch.setattr(sys, "argv", ["", "--train", str(release.train), "--output", str(release.output)])
    with pytest.raises(script.UserError, match="holds 3 classes, expected 1000"):
        script.main()
    monkeypatch.setitem(script.OFFICIAL, "train", (3, 9))
    script.main()
    next((release.output / "train" / WNIDS[0]).iterdir()).unlink()
    with pytest.raises(script.UserError, match="holds 8 images, expected 9"):
        script.main()


def test_help_names_every_option():
    text = run("--help").stdout
    for option in ("train", "val", "devkit", "val_labels", "output", "sha1_train", "sha1_val", "skip_sha1"):
        assert f"--{option} " in text
