"""Weights of HuggingFace's BERT under the names of models/text.py: any BertModel, with or without a classifier."""

import torch
from torch import Tensor

OUTER = {
    "embeddings.word_embeddings.weight": "token_embed.weight",
    "embeddings.LayerNorm.": "embed_norm.",
    "pooler.dense.": "pooler.",
    "classifier.": "head.",
}
INNER = {
    "attention.output.dense.": "attn.proj.",
    "attention.output.LayerNorm.": "norm1.",
    "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
    "output.LayerNorm.": "norm2.",
}


def from_huggingface(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename and join; heads of other tasks are left out. Sentences are of token type 0, so its row alone is kept."""
    weights = {_current(key.removeprefix("bert.")): value for key, value in weights.items()}
    renamed = {
        "pos_embed": weights["embeddings.position_embeddings.weight"][None],
        "type_embed": weights["embeddings.token_type_embeddings.weight"][None, :1],
    }
    for key, value in weights.items():
        for old, new in OUTER.items():
            if key.startswith(old):
                renamed[new + key.removeprefix(old)] = value
        if not key.startswith("encoder.layer."):
            continue
        number, name = key.removeprefix("encoder.layer.").split(".", 1)
        for old, new in INNER.items():
            if name.startswith(old):
                renamed[f"blocks.{number}.{new}{name.removeprefix(old)}"] = value
        if name.startswith("attention.self.query."):
            parts = [weights[key.replace(".query.", f".{part}.")] for part in ("query", "key", "value")]
            renamed[f"blocks.{number}.attn.qkv.{name.rsplit('.', 1)[1]}"] = torch.cat(parts)
    return renamed


def _current(key: str) -> str:
    """Early files call a LayerNorm's weight and bias gamma and beta."""
    return key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
