"""Weights of HuggingFace's BERT and GPT-2 under the names of models/text.py: any BertModel, with or without a
classifier, and the GPT2LMHeadModel."""

import re

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

GPT2_BUFFERS = re.compile(r"h\.\d+\.attn\.(?:masked_)?bias$")  # the causal mask, which old files have
GPT2_BLOCK = {
    "ln_1.": "norm1.",
    "attn.c_attn.": "attn.qkv.",
    "attn.c_proj.": "attn.proj.",
    "ln_2.": "norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}


def from_gpt2(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename, and turn matrices, which GPT-2 has as (inputs, outputs). Without a decoder it is the token table."""
    weights = {key: value for key, value in weights.items() if not GPT2_BUFFERS.fullmatch(key)}
    renamed = {"token_embed.weight": weights.pop("wte.weight"), "pos_embed": weights.pop("wpe.weight")[None]}
    renamed["head.weight"] = weights.pop("lm_head.weight", renamed["token_embed.weight"])
    for key, value in weights.items():
        found = re.fullmatch(r"h\.(\d+)\.(\w+\.(?:c_\w+\.)?)(weight|bias)", key)
        if found and found[2] in GPT2_BLOCK:
            matrix = value.T.contiguous() if value.dim() == 2 else value
            renamed[f"blocks.{found[1]}.{GPT2_BLOCK[found[2]]}{found[3]}"] = matrix
        else:
            renamed[key.replace("ln_f.", "norm.")] = value
    return renamed


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
        if name.startswith("attention.self.query."):
            parts = [weights[key.replace(".query.", f".{part}.")] for part in ("query", "key", "value")]
            renamed[f"blocks.{number}.attn.qkv.{name.rsplit('.', 1)[1]}"] = torch.cat(parts)
        elif not name.startswith(("attention.self.key.", "attention.self.value.")):
            old = next((old for old in INNER if name.startswith(old)), None)  # a part that is not known keeps its name
            renamed[f"blocks.{number}.{INNER[old]}{name.removeprefix(old)}" if old else key] = value
    return renamed


def _current(key: str) -> str:
    """Return a key by today's names: early files call a LayerNorm's weight and bias gamma and beta."""
    return key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
