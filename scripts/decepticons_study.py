"""What a server whose feed-forward layers are bins of tokens reads of batches of sentences, with and without MJP.

    python -m data.docstrings --output DIR
    python scripts/decepticons_study.py --data DIR --output docs/results/decepticons.json

DIR: train.csv (label,text), here sentences of docstrings. They are joined and cut into pieces of LENGTH tokens; every
second piece is the server's own and sets its thresholds, the clients' are drawn from the others. Random weights, three
repetitions with other sentences, masks and weights. A found sentence is compared with the true one it shares most
places with. `in_place`: tokens that stand where the client's model read them, special ones included; `content`: tokens
that are found in their sentence at all, which is what is left where MJP hides places; `detected`: whether the detector,
with the model before as reference, raises an alarm.
"""

import statistics
import sys
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from attacks.malicious.decepticons import decepticons
from attacks.malicious.decepticons_server import Decepticons
from attacks.malicious.server import Knowledge
from attacks.threat_model.leak import Leak
from data.text import Encoder, open_sentences, train_tokenizer
from defenses.detector import suspicion, weight_statistics
from models import build_model
from models.token_jigsaw import TokenJigsaw
from utils.errors import run_command
from utils.files import write_json
from utils.tool_parser import ToolParser

LENGTH, VOCABULARY, REPEATS, BATCHES, RATIOS = 32, 1000, 3, (1, 8, 32), (0.0, 0.5)
VICTIMS = {"text_small": {}, "bert": {"embed_dim": 128, "depth": 4, "num_heads": 2}}


def sentences(folder: str) -> tuple[Tensor, int]:
    """Return (token ids (M, LENGTH) of pieces that begin with [CLS] and end with [SEP], size of the vocabulary)."""
    texts = open_sentences(folder, "train").texts
    tokenizer = train_tokenizer(texts, VOCABULARY)
    encoder = Encoder(tokenizer.to_str(), 4096)
    rows = [encoder(text) for text in texts]
    inner, first, last = torch.cat([row[1:-1] for row in rows]), rows[0][0], rows[0][-1]
    inner = inner[: len(inner) // (LENGTH - 2) * (LENGTH - 2)].reshape(-1, LENGTH - 2)
    ends = [value.expand(len(inner), 1) for value in (first, last)]
    return torch.cat([ends[0], inner, ends[1]], dim=1), tokenizer.get_vocab_size()


def leak_of(model: nn.Module, ids: Tensor, mask: Tensor | None, seed: int) -> Leak:
    """Return what one step on sentences (B, n) shares; mask (B, n), of MJP, or None."""
    labels = torch.randint(2, (len(ids),), generator=torch.Generator().manual_seed(seed))
    wanted = dict(model.named_parameters())
    loss = nn.functional.cross_entropy(model(ids) if mask is None else model(ids, mask), labels)
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    shared = {name: value for name, value in zip(wanted, gradients, strict=True) if value is not None}
    return Leak(model, shared, tuple(ids.shape[1:]), len(ids))


def shares(found: Tensor, truth: Tensor, mask: Tensor) -> dict[str, float | None]:
    """Return the shares of tokens of found sentences (B, n) beside the true ones (B, n), best assigned."""
    same = found[:, None] == truth[None]  # (B, B, n)
    row, column = linear_sum_assignment(same.sum(dim=2).numpy(), maximize=True)
    right = torch.zeros_like(mask)
    right[column] = same[row, column]
    both = 0
    for one, other in zip(row, column, strict=True):
        own, true = (value[value > 0].bincount(minlength=2**16) for value in (found[one], truth[other]))
        both += int(torch.minimum(own, true).sum())
    visible = float(right[~mask].double().mean())
    return {"in_place": float(right.double().mean()), "visible": visible, "content": both / truth.numel()}


def measured(victim: str, batch: int, ratio: float, own: Tensor, public: Tensor, vocabulary: int, seed: int) -> dict:
    """Return the scores of one repetition."""
    about = {"vocab_size": vocabulary, "max_length": LENGTH, "num_classes": 2, "unknown": ratio > 0}
    model = build_model(victim, seed=seed, **about, **VICTIMS[victim]).eval()
    server, generator = Decepticons(), torch.Generator().manual_seed(seed)
    sent = server.tamper(model, Knowledge((LENGTH,), (0.0,), (1.0,), public), generator=generator).eval()
    chosen = torch.randperm(len(own), generator=generator)[:batch]
    mask, source = TokenJigsaw(ratio, seed=seed).draw_for(range(batch), own[chosen])
    seen = own[chosen].gather(1, source)
    found = decepticons(leak_of(sent, seen, mask if ratio else None, seed), generator=generator)
    told = {key: float(found.diagnostics[key]) for key in ("tokens", "placed", "sentences")}
    told["detected"] = float(bool(suspicion(weight_statistics(sent.state_dict(), model.state_dict()))))
    promised = server.guarantee(batch * LENGTH, rows=server.rows(model))
    return told | shares(found.images, seen, mask) | {"promised": promised}


def main(argv: list[str] | None = None) -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    parser.add_argument("--data", required=True, metavar="DIR", help="folder with train.csv (label,text)")
    args = parser.parse_args(argv)
    ids, vocabulary = sentences(args.data)
    own, public = ids[::2], ids[1::2]
    cells = []
    for victim in VICTIMS:
        for batch in BATCHES:
            for ratio in RATIOS:
                rows = [measured(victim, batch, ratio, own, public, vocabulary, seed) for seed in range(REPEATS)]
                scores = {
                    key: {"mean": statistics.fmean(row[key] for row in rows), "smallest": min(row[key] for row in rows)}
                    | {"largest": max(row[key] for row in rows)}
                    for key in rows[0]
                }
                cells.append({"victim": victim, "batch": batch, "ratio": ratio, "n": REPEATS, **scores})
                print(
                    {key: value if not isinstance(value, dict) else value["mean"] for key, value in cells[-1].items()}
                )
    command = "python scripts/decepticons_study.py --data DIR --output FILE"
    about = {"command": command, "length": LENGTH, "public": len(public), "private": len(own)}
    write_json(args.output, about | {"cells": cells})
    print(f"{args.output}: {len(cells)} cells")


if __name__ == "__main__":
    run_command(main)
