"""Whom attack.py attacks: clients it simulates on a folder of images, or leak files of a real training.

Both are `LeakSource` (campaigns/campaign.py), as are sentences (campaigns/sentences.py).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from attacks.malicious.sending import sent_model
from attacks.threat_model.applicable import CROSS_ENTROPY, preview_leak
from attacks.threat_model.client import Aggregation, Client, PrivateBatch, Round
from attacks.threat_model.leak import Leak
from attacks.threat_model.local_step import describe_frozen, multi_label
from attacks.threat_model.recorded import about_leak, hidden_patches, list_leaks, open_leak, withheld
from attacks.threat_model.rehearsal import rehearse
from attacks.threat_model.uses import KNOWLEDGE
from campaigns.campaign import LeakSource
from data.attributes import read_attributes
from data.decode import in_words
from data.images import as_sources, class_of, list_images, read_images
from data.inputs import input_scale
from data.outputs import folder_outputs
from utils.errors import UserError
from utils.notes import Notes
from utils.seeds import derive_seed

PUBLIC = 1000  # pictures of a malicious server's own that are read at most


def simulated(client: Client, paths: Sequence[Path], batch_size: int, threat_model: dict[str, str]) -> LeakSource:
    """Return clients that share what `client` shares of `batch_size` images each, the last one of what is left; with
    an aggregation so many clients behind every leak, without those that drop out of its round, whose images are not
    attacked.

    Raises UserError for fewer images than one leak has, and where the client's step fails on noise
    (attacks/threat_model/rehearsal.py).
    """
    together = client.aggregation
    number, each, batch_size = len(paths), batch_size, batch_size * (together.clients if together else 1)
    if len(paths) < batch_size:
        several = f"--clients {together.clients} times " if together else ""
        raise UserError(
            f"{several}--batch_size {each} is more than the {len(paths)} images there are: lower it, or give more "
            f"images"
        )
    rest = len(paths) % batch_size or batch_size
    if rest < batch_size:
        threat_model = threat_model | {"last batch": f"{rest} of {batch_size} images, all that are left"}
    if line := describe_frozen(client.model):
        threat_model = threat_model | {"frozen": line}
    rehearse(client, [size for images in (batch_size, rest) for size in client.sizes(images)])
    sizes: int | list[int] = batch_size
    if together and together.dropout:
        paths, sizes = remaining(paths, together, client.seed)
        rounds = -(-number // batch_size)
        told = f"{len(paths)} of {number} images, over {len(sizes)} of {rounds} rounds"
        threat_model = threat_model | {"images of clients that stayed": told}

    scale = client.terms.scale

    def play(batch: range) -> Round:
        chosen = [paths[index] for index in batch]
        images = read_images(chosen, client.model.arguments["image_size"], **scale).to(next(client.model.parameters()))
        by_image = multi_label(client.model)
        return client.round(batch[0], images, [str(path if by_image else path.parent) for path in chosen])

    terms = vars(client.terms) | {"withhold": [*client.terms.withhold, *client.defense.withheld()]}
    preview = preview_leak(client.model, batch_size, aggregate=together and together.of(batch_size), **terms)
    loss = getattr(client.model, "loss", CROSS_ENTROPY)
    return LeakSource([str(path) for path in paths], sizes, play, threat_model, preview, loss, paths, scale=scale)


def remaining(paths: Sequence[Path], together: Aggregation, seed: int) -> tuple[list[Path], list[int]]:
    """Return the images of the clients that stay until the end of their round, and how many each round has of them.

    A round that all of its clients leave shares nothing. Raises UserError where that is so of every round.
    """
    size = together.clients * together.batch_size
    kept: list[list[Path]] = []
    for start in range(0, len(paths), size):
        own = paths[start : start + size]
        generator = torch.Generator().manual_seed(derive_seed(seed, "clients left", start))
        kept.append([own[place] for place in together.left(len(own), generator)])
    kept = [own for own in kept if own]
    if not kept:
        raise UserError("--client_dropout: all clients leave every round: lower it, or give more images, or --seed")
    return [path for own in kept for path in own], [len(own) for own in kept]


def sized(victim: dict, leak: str | None) -> dict:
    """Return options of build_victim; a model by name gets the side of the images in its leak files, unless told."""
    if not leak or victim["image_size"] or (victim["checkpoint"] and not victim["name"]):
        return victim
    *_, height, width = about_leak(list_leaks(leak)[0]).image_shape
    return victim | {"image_size": height} if height == width else victim


def attack_scale(
    model: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None, leak: str | None, notes: Notes
) -> dict[str, Sequence[float]]:
    """Return mean and std of the model's inputs, as `input_scale`, for simulated clients and leak files without any.

    Where all leak files say their own, it is these the notes speak of.
    """
    abouts = [about_leak(path) for path in list_leaks(leak)] if leak else []
    if abouts and all(about.mean and about.std for about in abouts):
        input_scale(model, abouts[0].mean, abouts[0].std, notes, "the leak file")
        return input_scale(model, mean, std, Notes())
    return input_scale(model, mean, std, notes)


def send(
    model: nn.Module, scale: Mapping[str, Sequence[float]], server_images: str | None, **terms
) -> tuple[nn.Module, dict[str, str]]:
    """Return (what clients receive of the model, the rows of a threat model that say so).

    server_images: folder of the server's own pictures, of which PUBLIC at most are read, spread evenly over it. terms:
    keyword options of attacks.malicious.sending.sent_model.
    """
    public = None
    if server_images:
        paths = list_images(server_images)
        chosen = paths if len(paths) <= PUBLIC else [paths[place * len(paths) // PUBLIC] for place in range(PUBLIC)]
        public = read_images(chosen, model.arguments["image_size"], **scale).to(next(model.parameters()))
    return sent_model(model, **terms, **scale, public=public)


def folder_labels(
    model: nn.Module,
    root: str | Path | Sequence[str],
    notes: Notes,
    others: str = "labelled with the model's own predictions",
) -> dict[str, int]:
    """Return the model output of every folder below `root`, or of several files and folders, that holds images and
    names a class, by its path.

    The rule is that of eval.py (data/outputs.py). others: what becomes of images in folders that name no class, for
    the notes.
    """
    litter: list[str] = []
    sources = as_sources(root)
    names = {
        str(path.parent): class_of(path, source) for source in sources for path in list_images(source, litter=litter)
    }
    if litter:
        notes.state("passed_over", len(litter), in_words(litter, sources[0]))
    outputs = folder_outputs(model.classes, model.arguments["num_classes"], names.values(), notes)
    nameless = sorted({name for name in names.values() if name not in outputs})
    if nameless:
        some = f"'{nameless[0]}'" + (f" and {len(nameless) - 1} more" if len(nameless) > 1 else "")
        notes.assume("labels", f"images in folders that name no class of the model ({some}) are {others}")
    return {folder: outputs[name] for folder, name in names.items() if name in outputs}


def image_attributes(model: nn.Module, file: str | None, paths: Sequence[Path], notes: Notes) -> dict[str, list[int]]:
    """Return the attributes of the private images by their path, from a CSV file as data/attributes.py reads it.

    Images it does not name, or all without a file, are labelled with the model's own predictions, which is noted.
    Raises UserError for a file of other attributes than the model's.
    """
    known: dict[Path, list[int]] = {}
    if file:
        names, samples = read_attributes(Path(file))
        if model.classes is not None and names != list(model.classes):
            raise UserError(f"--attributes '{file}' names other attributes than the model was trained on")
        known = {Path(path).resolve(): values for path, values in samples}
    found = {str(path): known[path.resolve()] for path in paths if path.resolve() in known}
    if missing := len(paths) - len(found):
        notes.assume("labels", f"{missing} images without attributes are labelled with the model's own predictions")
    return found


def private_labels(
    model: nn.Module, root: str | Path | Sequence[str], notes: Notes, attributes: str | None, paths: Sequence[Path]
) -> dict:
    """Return what the images of simulated clients are labelled with: classes by folder, or attributes by image."""
    if multi_label(model):
        return image_attributes(model, attributes, paths, notes)
    if attributes:
        raise UserError("--attributes is for models that tell attributes, and this one tells classes: leave it out")
    return folder_labels(model, root, notes)


def recorded(
    files: Sequence[Path],
    model: nn.Module,
    originals: Sequence[Path],
    *,
    scale: Mapping[str, Sequence[float]],
    attacker_knowledge: str,
    seed: int,
    name: str,
    sent: Mapping[str, str],
) -> LeakSource:
    """Return the clients behind leak files. originals: their images in the order of the files, only to score; or none.

    scale: mean and std where a file does not say. name: of the model, for people. sent: rows of the threat model on
    what the server sent out. Raises UserError for files that do
    not fit the model, and where there are not as many originals as the files say they are of.
    """
    abouts = [about_leak(path) for path in files]
    sizes = [about.batch_size for about in abouts]
    firsts = [sum(sizes[:place]) for place in range(len(sizes))]
    if originals and len(originals) != sum(sizes):
        raise UserError(
            f"--images holds {len(originals)} images and the leaks are of {sum(sizes)}: give the originals in the "
            f"order of the leak files, or leave them out"
        )

    def play(batch: range) -> Round:
        place = firsts.index(batch[0])
        leak = open_leak(files[place], model, attacker_knowledge=attacker_knowledge, **scale)
        generator = torch.Generator().manual_seed(derive_seed(seed, "attack", batch[0]))
        if not originals:
            return Round(None, leak, generator)
        side, like = leak.image_shape[-1], next(model.parameters())
        images = read_images([originals[index] for index in batch], side, leak.mean, leak.std).to(like)
        mask = hidden_patches(leak)
        stay = torch.arange(mask.shape[1])[None]
        return Round(PrivateBatch(images, images, leak.labels, mask, stay), leak, generator)

    preview = open_leak(files[0], model, attacker_knowledge=attacker_knowledge, **scale)
    names = [str(path) for path, size in zip(files, sizes, strict=True) for _ in range(size)]
    about = {"victim": name, **_threat(preview, abouts), **sent}
    behind = [[path] for path, size in zip(files, sizes, strict=True) for _ in range(size)]
    return LeakSource(names, sizes, play, about, preview, abouts[0].loss, originals, behind, scale)


def _threat(leak: Leak, abouts: Sequence) -> dict[str, str]:
    """Return who knows what, from leak files; of several the first speaks for all, except where they differ."""
    about, number = abouts[0], len(abouts)
    images = f"{about.batch_size} image{'s' * (about.batch_size > 1)}"
    gone = withheld(leak)
    listed = f"{', '.join(gone[:3])}{f' and {len(gone) - 3} more' if len(gone) > 3 else ''}"
    says = {True: "active, the file says", False: "not active, the file says", None: "unknown"}
    update = f"update of {about.steps} SGD steps (rate {about.lr:g}) on {images}" if about.lr else ""
    alike = "" if len(set(abouts)) == 1 else ", the first of which is described here"
    return {
        "attacker": "honest-but-curious server: it follows the protocol and looks at what it is sent",
        "source": f"{number} leak file{'s' * (number > 1)} of a real training{alike}",
        "shared": update if about.steps else f"gradient of {images}",
        "not in the leak": listed or "nothing",
        "labels": "in the file" if leak.labels is not None else "hidden",
        "mode": "training" if about.training else "evaluation",
        "loss": about.loss,
        "MJP": says[about.masked],
        "MJP, the attacker": KNOWLEDGE[leak.attacker_knowledge],
        "defence": "whatever the client did; the attacker is not told",
    } | ({"note": about.note} if about.note else {})
