"""Which output of a model stands for which class of the data: one rule for every script.

1. The checkpoint's own class names, where it has them: folders are looked up by name, and may be a part of them.
2. Plain numbers (0, 1, ..., 11, also 00, 01, ...): the number is the output, as in ImageNetV2.
3. Synsets (n01440764) for a model of as many outputs as ImageNet-1k, -12k, -21k or -22k has classes: the place among
   those, in their published order (for ImageNet-1k that is sorted order).
4. Otherwise the place among the folders, if there are as many as outputs. That is a guess, and noted as one.
"""

from collections.abc import Sequence

from timm.data import ImageNetInfo, infer_imagenet_subset

from data.classes import as_numbers, class_order
from utils.errors import UserError
from utils.notes import Notes


def class_outputs(
    trained: Sequence[str] | None, outputs: int, names: Sequence[str], notes: Notes | None = None
) -> list[int]:
    """Return for each class of the data, by label, the model output that stands for it.

    trained: class names in the order of the outputs, or None where the checkpoint did not record them. Raises UserError
    where the data's classes cannot be those of the model.
    """
    notes = notes or Notes()
    by_name = _by_name(trained, outputs, names, notes)
    if by_name is not None:
        return by_name
    if trained is not None:
        new = [name for name in names if name not in set(trained)]
        raise UserError(
            f"{len(new)} of the data's {len(names)} classes are not among the checkpoint's {len(trained)}: "
            f"'{new[0]}' is new to it; use the data set it was trained on"
        )
    if len(names) != outputs:
        raise UserError(f"{len(names)} classes of data do not fit a checkpoint of {outputs} outputs: use its data")
    notes.assume("classes", _by_place(names))
    return list(range(outputs))


def folder_outputs(
    trained: Sequence[str] | None, outputs: int, names: Sequence[str], notes: Notes | None = None
) -> dict[str, int]:
    """Return the model output of each class folder that has one, for images that need no label to be attacked.

    As `class_outputs` wherever that gives an answer. Else folders that do not name classes of the checkpoint have no
    output; and where the checkpoint names none, several folders get their places, a single one gets nothing. Raises
    UserError for more folders than outputs.
    """
    notes, names = notes or Notes(), class_order(set(names))
    by_name = _by_name(trained, outputs, names, notes)
    if by_name is not None:
        return dict(zip(names, by_name, strict=True))
    if trained is not None:
        places = {name: place for place, name in enumerate(trained)}
        return {name: places[name] for name in names if name in places}
    if len(names) == 1:
        return {}
    if len(names) > max(outputs, 1):
        listed = ", ".join(f"'{name}'" for name in names[:3])
        raise UserError(
            f"the images are in {len(names)} class folders ({listed}, ...) and the model has {outputs} outputs: give "
            f"the folder of one class, or a model with an output for each class"
        )
    notes.assume("classes", _by_place(names))
    return {name: place for place, name in enumerate(names)}


def _by_name(trained: Sequence[str] | None, outputs: int, names: Sequence[str], notes: Notes) -> list[int] | None:
    """Return the outputs that the names themselves tell (rules 1 to 3), or None where they do not."""
    if trained is not None and set(names) <= set(trained):
        places = {name: place for place, name in enumerate(trained)}
        return [places[name] for name in names]
    numbers, known = as_numbers(names), as_numbers(trained or ())
    if numbers is not None and known is not None and set(numbers) <= set(known):  # 07 and 7
        return [known.index(number) for number in numbers]
    if numbers is not None and max(numbers) < outputs:
        if sorted(numbers) != list(range(outputs)):
            some = f"{len(names)} of {outputs}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            notes.assume("classes", f"the numbers that class folders are named by are the model's outputs ({some})")
        elif trained is not None:
            notes.assume("classes", "the numbers that class folders are named by are the places of the model's classes")
        return numbers
    subset = infer_imagenet_subset({"num_classes": outputs})
    synsets = {name: place for place, name in enumerate(ImageNetInfo(subset).label_names())} if subset else {}
    if names and all(name in synsets for name in names):
        if trained is not None:
            notes.assume("classes", f"the {outputs} outputs are {subset}'s classes in their published order")
        return [synsets[name] for name in names]
    return None


def _by_place(names: Sequence[str]) -> str:
    some = ", ".join(f"'{name}' is output {place}" for place, name in list(enumerate(names))[:2])
    return f"classes are the model's outputs in their order ({some}, ...): neither their names nor the file say it"
