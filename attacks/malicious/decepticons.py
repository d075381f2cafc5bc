"""Read sentences from the feed-forward layers that a malicious server has turned into bins of tokens.

See attacks/malicious/decepticons_server.py for what the rows read. A bin with one token holds a (e + p) + b + tag: its
embedding e and position p, up to the two numbers of LayerNorm. Correlation with all pairs of a token that occurs (the
rows of the token table that are not zero) and a place tells both, and what the pair does not explain is the tag, which
is the same for all tokens of a sentence. No optimisation, and no language model.
"""

import torch
from torch import Tensor, nn

from attacks.malicious.assembly import cluster
from attacks.malicious.bins import Hits, read_rows
from attacks.text.sentence import present_rows
from attacks.threat_model.checks import checked
from attacks.threat_model.leak import Leak, Reconstruction, RefusalError

TABLE = "token_embed.weight"
FOUND = 1e-4  # 1 - correlation up to which a pair is what a bin holds
APART = 10.0  # times as far the next pair has to be
TAGS = 1e-3  # difference of two tags, in parts of the largest, up to which tokens are of one sentence


def check_decepticons(leak: Leak, options: dict, loss: str, attack: str) -> None:
    """Raise UserError unless the model's bins are a malicious server's and their gradients are shared."""
    if not hasattr(leak.model, "token_bins"):
        raise RefusalError(
            f"attack '{attack}' reads bins that a malicious server has set: use the server 'decepticons'"
        )
    for name in (*_names(leak), TABLE):
        leak.gradient(name, attack)


@checked(check_decepticons, uses=())
def decepticons(leak: Leak, *, generator: torch.Generator) -> Reconstruction:
    """Return the sentences (B, n) of a batch, 0 where no token was found, the fullest first.

    Tokens that MJP hides come back without their places and fill those that are left over. `generator` is not drawn
    from. diagnostics: bins (filled ones), tokens (that one pair alone explains), placed (of these, with a place),
    sentences (tags), exact (every place of every sentence is told). Raises UserError by its check.
    """
    model, number = leak.model, leak.image_shape[0]
    bins = model.token_bins
    weight, bias = (
        torch.stack([leak.gradient(name, "decepticons").cpu() for name in _names(leak)[part::2]]) for part in (0, 1)
    )
    hits = read_rows(weight, bias, bins.functional, bins.edges, cumulative=True)
    present = present_rows(leak.gradient(TABLE, "decepticons").double().cpu()).nonzero()[:, 0]
    pairs, tokens, places = _pairs(model, present, number)
    pair, sure, tags = _matched(hits, pairs)
    groups = _sentences(tags, sure, leak.batch_size)
    ids = torch.zeros(leak.batch_size, number, dtype=torch.int64)
    placed = 0
    for sentence, rows in enumerate(groups):
        loose = [int(tokens[pair[row]]) for row in rows if places[pair[row]] < 0]
        for row in sorted(rows, key=lambda row: float(hits.weights[row])):  # the best come last
            if places[pair[row]] >= 0:
                ids[sentence, places[pair[row]]] = tokens[pair[row]]
        placed += int((ids[sentence] > 0).sum())
        free = (ids[sentence] == 0).nonzero()[:, 0].tolist()
        for place, token in zip(free, loose, strict=False):
            ids[sentence, place] = token
    told = {"bins": len(hits.inputs), "tokens": int(sure.sum()), "placed": placed, "sentences": len(groups)}
    return Reconstruction(ids, told | {"exact": placed == ids.numel()})


def _names(leak: Leak) -> list[str]:
    """Return the names of weight and bias of the first feed-forward layer of every block of bins."""
    blocks = range(len(leak.model.blocks) - 1)
    return [f"blocks.{place}.mlp.fc1.{part}" for place in blocks for part in ("weight", "bias")]


@torch.no_grad()
def _pairs(model, present: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (tokens as the first block reads them (M, D), their ids (M,), their places (M,), -1 for a hidden one)."""
    table = model.token_embed.weight[present].double().cpu()
    rows = model.pos_embed[0, :number].double().cpu()
    if model.unknown_pos_embed is not None:
        rows = torch.cat([rows, model.unknown_pos_embed[0].double().cpu()])
    if model.type_embed is not None:
        rows = rows + model.type_embed[0].double().cpu()
    places = torch.arange(len(rows))
    places[number:] = -1
    pairs = (table[:, None] + rows[None]).flatten(0, 1)  # (V * rows, D)
    if isinstance(model.embed_norm, nn.LayerNorm):  # which the server has made a plain one
        pairs = nn.functional.layer_norm(pairs, pairs.shape[1:], eps=model.embed_norm.eps)
    return pairs, present.repeat_interleave(len(rows)), places.repeat(len(present))


def _matched(hits: Hits, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (the best pair of every bin (F,), whether it alone explains it, the tag (F,)).

    The last coordinate, of the tag, takes no part in the correlation.
    """
    read, known = hits.inputs[:, :-1], pairs[:, :-1]
    means = [value.mean(dim=1, keepdim=True) for value in (read, known)]
    read, known = read - means[0], known - means[1]
    sizes = [value.norm(dim=1) for value in (read, known)]
    near = (read / sizes[0][:, None]) @ (known / sizes[1][:, None]).T  # (F, M)
    best = near.topk(2, dim=1)
    off = (1 - best.values).clamp_min(0)
    sure = (off[:, 0] < FOUND) & (off[:, 1] > APART * off[:, 0].clamp_min(FOUND / APART))
    pair = best.indices[:, 0]
    scale = sizes[0] / sizes[1][pair]
    shift = means[0][:, 0] - scale * means[1][pair, 0]
    return pair, sure, (hits.inputs[:, -1] - shift) / scale - pairs[pair, -1]


def _sentences(tags: Tensor, sure: Tensor, most: int) -> list[list[int]]:
    """Return the bins of every sentence, the fullest first: those that are sure and have one tag."""
    rows = sure.nonzero()[:, 0]
    if not len(rows):
        return []
    own = tags[rows]
    groups = [[int(rows[place]) for place in group] for group in cluster(own, TAGS * float(own.abs().max()))]
    return sorted(groups, key=len, reverse=True)[:most]
