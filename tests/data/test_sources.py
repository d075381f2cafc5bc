"""Images from files, folders and several of both, some of them by their place in the listing."""

from pathlib import Path

import pytest
from PIL import Image

from data.images import class_of, list_images, partition
from options import AttackConfig
from utils.commandline import load, read_options
from utils.errors import UserError


@pytest.fixture
def root(tmp_path):
    for name in ("cat/1.png", "cat/2.png", "dog/3.png", "dog/a,b.png", "single.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


def names(paths) -> list[str]:
    return [path.name for path in paths]


def options(root, *words) -> AttackConfig:
    return load(AttackConfig, ["--model", "lenet", "--output", str(root / "x"), *map(str, words)])[0]


def test_files_and_folders_in_the_order_they_are_given(root):
    assert names(list_images(root / "single.png")) == ["single.png"]
    assert names(list_images([root / "single.png", root / "cat"])) == ["single.png", "1.png", "2.png"]
    assert names(list_images([root / "cat" / "2.png", root / "cat"])) == ["2.png", "1.png"]
    assert names(list_images([str(root / "cat"), str(root / "dog")], 2)) == ["1.png", "3.png"]
    assert names(list_images(root / "cat", index=[1, 0])) == ["2.png", "1.png"]
    with pytest.raises(UserError, match="--index 2: .* holds 2 images"):
        list_images(root / "cat", index=[0, 2])
    with pytest.raises(UserError, match="does not exist"):
        list_images([root / "cat", root / "cow"])


def test_clients_of_one_class_and_of_different_ones():
    paths = [Path(name, str(place)) for name, number in (("a", 3), ("b", 5), ("c", 1)) for place in range(number)]
    assert partition(paths, 2, "listing") == paths

    def taken(size: int, by: str) -> list[str]:
        return [str(path) for path in partition(paths, size, by)]

    assert taken(2, "class") == ["a/0", "a/1", "b/0", "b/1", "b/2", "b/3"]
    # Of the folders with most images left first, so that as many clients as possible can be filled.
    assert taken(2, "classes") == ["b/0", "a/0", "b/1", "a/1", "b/2", "a/2", "b/3", "c/0"]
    assert taken(3, "classes") == ["b/0", "a/0", "c/0"]
    with pytest.raises(UserError, match="takes 6 images of one class, and a folder holds at most 5: lower"):
        partition(paths, 6, "class")
    with pytest.raises(UserError, match="takes 4 images of different classes, and there are 3 folders"):
        partition(paths, 4, "classes")


def test_a_number_of_images_takes_whole_clients(root):
    chosen = list_images([root / "cat", root / "dog"], 2, size=2, by="class")
    assert names(chosen) == ["1.png", "2.png"]
    assert names(list_images(root, 3, size=2, by="class")) == ["1.png", "2.png", "3.png", "a,b.png"]
    with pytest.raises(UserError, match="--num_images 5: .* holds only 4 images for --partition class"):
        list_images(root, 5, size=2, by="class")


def test_the_class_of_a_single_file_is_the_folder_it_lies_in(root):
    assert class_of(root / "cat" / "1.png", root / "cat" / "1.png") == "cat"
    assert class_of(root / "cat" / "1.png", root / "cat") == class_of(root / "cat" / "1.png", root) == "cat"


def test_paths_on_a_command_line(root):
    cat, single, comma = root / "cat", root / "single.png", root / "dog" / "a,b.png"
    assert options(root, "--images", single).images == str(single)
    assert options(root, "--images", comma).images == str(comma)
    several = [str(single), str(cat), str(comma)]
    assert options(root, "--images", *several).images == several
    assert options(root, "--images", f"{single},{cat}", "--seed", "1").images == several[:2]
    assert options(root, "--images", f"[{single}, {cat}]").images == several[:2]
    with pytest.raises(UserError, match="cow' does not exist: check the path"):
        read_options(AttackConfig, ["--model", "lenet", "--output", "x", "--images", str(cat), str(root / "cow")])


def test_several_paths_survive_the_run_folder(root):
    words = ["--model", "lenet", "--output", "x", "--images", str(root / "cat"), str(root / "dog"), "--index", "0,2-3"]
    config, resolved = load(AttackConfig, words)
    (root / "config.yaml").write_text(resolved)
    assert load(AttackConfig, ["--config", str(root / "config.yaml")])[0] == config


@pytest.mark.parametrize(
    "words, places",
    [
        (["25"], [25]),
        (["0,3,5-7"], [0, 3, 5, 6, 7]),
        (["1", "4"], [1, 4]),
        (["2,2,1-2"], [2, 1]),
        (["[3, 5-6]"], [3, 5, 6]),
    ],
)
def test_places_in_the_listing(root, words, places):
    assert options(root, "--images", root / "cat", "--index", *words).indices() == places


@pytest.mark.parametrize("words", [["-1"], ["3:6"], ["5-3"], ["a"], ["1.5"], ["0,"]])
def test_places_that_are_none(root, words):
    with pytest.raises(UserError, match="--index must be"):
        options(root, "--images", root / "cat", "--index", *words)


def test_an_index_goes_with_images_and_without_a_number(root):
    with pytest.raises(UserError, match="--num_images must be left out with --index"):
        options(root, "--images", root, "--index", "0", "--num_images", "2")
    with pytest.raises(UserError, match="--index must be used with --images"):
        options(root, "--audit", "--index", "0")
