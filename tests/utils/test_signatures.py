"""Options read from source are those of the objects themselves."""

from dataclasses import MISSING, fields, is_dataclass
from inspect import signature

import pytest

from attacks import ATTACKS
from defenses import DEFENSES
from utils.signatures import CALLER, Unknown, described, read_object, read_part

PARTS = {**ATTACKS.data, **DEFENSES.data}


@pytest.mark.parametrize("name", PARTS)
def test_names_and_defaults_are_those_of_the_part(name):
    read, part = read_part(PARTS[name]), {**ATTACKS, **DEFENSES}[name]
    if is_dataclass(part):
        real = {item.name: item.default for item in fields(part)}
        assert MISSING not in real.values()
    else:
        parameters = signature(part).parameters.values()
        real = {item.name: item.default for item in parameters if item.kind is item.KEYWORD_ONLY}
        real = {key: value for key, value in real.items() if key not in CALLER}
    assert {key: option.default for key, option in read.options.items()} == real
    assert Unknown not in real.values()
    assert read.doc and read.place.endswith(".py")


def test_arguments_of_a_docstring():
    text = """Do something.

    Args:
        one: the first
            in two lines. With: a colon
        two, three: both

    Returns:
        four: not an argument
    """
    both = dict.fromkeys(("two", "three"), "both")
    assert described(text) == {"one": "the first in two lines. With: a colon"} | both
    assert described("nothing") == described("Args:") == {}


def test_a_part_that_was_registered_as_an_object():
    def part(leak, *, generator, steps: int = 3):
        """Attack.

        Args:
            steps: number of them
        """

    (option,) = read_object(part).values()
    assert (option.name, option.default, option.help) == ("steps", 3, "number of them")


@pytest.mark.parametrize(
    "declaration", ["attacks.presets.dlg:nothing", "attacks.nothing:dlg", "attacks.linear.closed_form:math"]
)
def test_what_is_no_part_is_refused(declaration):
    with pytest.raises(LookupError):
        read_part(declaration)
