"""What the server and its clients have agreed on: the model, its inputs and the local training."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from data.images import class_folders, class_of, list_images, read_images
from data.transforms import IMAGENET_MEAN, IMAGENET_STD
from models import build_model
from models.jigsaw import Jigsaw, shuffle_patches
from utils.seeds import derive_seed


def new_model(config: dict) -> nn.Module:
    """Return the model of the run, freshly initialised from its seed; with an unknown position embedding where MJP is
    on."""
    options = json.loads(config["model-options"]) | ({"unknown": True} if config["mask-ratio"] > 0 else {})
    size = {"image_size": config["image-size"], "num_classes": config["classes"]}
    return build_model(config["model"], seed=config["seed"], **size, **options).eval()


def about(config: dict) -> dict:
    """Return what the server knows of an update beside the weights: fields of leak_file.About."""
    return {
        "batch_size": config["batch-size"],
        "image_shape": (3, config["image-size"], config["image-size"]),
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "lr": config["lr"],
        "steps": config["local-steps"],
        "masked": config["mask-ratio"] > 0,
        "note": "an update of examples/flower",
    }


def local_batch(folder: str, number: int, config: dict) -> tuple[Tensor, Tensor]:
    """Return the images (B, 3, S, S) and labels (B,) a client trains on in round `number`, counted from 1: the next
    batch-size of its folder. Labels are the places of the class folders."""
    paths, size = list_images(folder), config["batch-size"]
    chosen = [paths[(number - 1) * size + place] for place in range(size)]
    names = class_folders(folder)
    labels = torch.tensor([names.index(class_of(path, folder)) % config["classes"] for path in chosen])
    return read_images(chosen, config["image-size"], IMAGENET_MEAN, IMAGENET_STD), labels


def train(model: nn.Module, images: Tensor, labels: Tensor, number: int, client: str, config: dict) -> float:
    """Take plain SGD steps, each over the whole batch, in place; with MJP under one mask. Returns the last loss."""
    inputs = (images,)
    if config["mask-ratio"] > 0:
        blocks = {"min_block": config["min-block"], "max_block": config["max-block"]}
        seed = derive_seed(config["seed"], "client", Path(client).name)
        hidden, source = Jigsaw(model.grid, config["mask-ratio"], "block", **blocks, seed=seed).draw_for([number])
        inputs = (shuffle_patches(images, source, model.patch_size), hidden)
    optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"])
    for _ in range(config["local-steps"]):
        optimizer.zero_grad()
        loss = cross_entropy(model(*inputs), labels)
        loss.backward()
        optimizer.step()
    return loss.item()
