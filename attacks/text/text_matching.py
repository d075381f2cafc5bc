"""Gradient matching on sentences: the loop of attacks/matching over embeddings, then the nearest tokens.

A token enters the model as a row of its embedding table. The candidate is such rows (n, D), free vectors, and the token
table's own gradient takes no part. What comes out is read as the token whose row is most similar, both centred over
their D values (the similarity of breaching divides by squared norms; this is the cosine). An attacker without
knowledge of MJP believes that no place is masked; others read the mask off the position rows, as token_rows.py does.

`text_dlg`: Deep Leakage from Gradients on text (Zhu et al., 2019, whose code for it was never released): L-BFGS on the
squared distance as for images, but from small vectors, as rows of a table are, and with restarts. `tag`: TAG (Deng et
al., 2021), whose distance adds an L1 term with weights that fall from the first layer to the last; settings of
breaching.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor

from attacks.matching import MatchingOptions, attack_with, match
from attacks.matching.options import SearchOptions, Watch
from attacks.matching.requirements import check_step
from attacks.text.bigram_order import order_hidden
from attacks.text.sentence import check_sentence, present_rows
from attacks.text.token_rows import POSITIONS, TOKENS
from attacks.threat_model.leak import Leak, Reconstruction, RefusalError
from attacks.threat_model.local_step import causal
from attacks.threat_model.uses import LABELS, MJP, PUBLIC
from utils.errors import UserError


@dataclass(frozen=True)
class TextMatchingOptions(SearchOptions):
    """Options of gradient matching on sentences."""

    iterations: int = 1000
    """Steps of the optimizer."""
    vocabulary: str = "all"
    """Tokens that may be read: all, or leaked: only those whose row of the token table's gradient is not zero."""


def match_text(
    leaks: Sequence[Leak],
    options: TextMatchingOptions,
    *,
    generator: Sequence[torch.Generator],
    watch: Watch | None = None,
) -> list[Reconstruction]:
    """Reconstruct the sentence behind each leak.

    diagnostics: those of `match`, and similarity (mean cosine of the vectors found with the rows they are read as).
    """
    if options.vocabulary not in ("all", "leaked"):
        raise UserError(f"vocabulary must be all or leaked, got '{options.vocabulary}'")
    embedded = [_embedded(leak) for leak in leaks]
    search = {field.name: getattr(options, field.name) for field in fields(SearchOptions)}
    found = match(embedded, MatchingOptions(**search, boxed=False), generator=generator, watch=watch)
    return [
        _read(leak, inner.mask, result, options.vocabulary, drawn)
        for leak, inner, result, drawn in zip(leaks, embedded, found, generator, strict=True)
    ]


def check_text_matching(leak: Leak, options: dict, loss: str, attack: str) -> None:
    """Raise UserError unless the leak is of one sentence whose step can be repeated."""
    check_sentence(leak, attack)
    check_step(leak, loss, attack)
    if causal(leak.model) and options["labels"] != "joint":
        raise UserError(
            f"attack '{attack}': the labels of a language model are its tokens: set attack_options.labels joint"
        )
    if causal(leak.model) and leak.model.tied and options["vocabulary"] == "leaked":
        why = "the decoder of this model is the token table, so every row of its gradient holds something"
        raise RefusalError(f"attack '{attack}': {why}: set attack_options.vocabulary all")


text_matching = partial(
    attack_with, run=match_text, check=check_text_matching, uses=(LABELS, MJP, PUBLIC)
)  # preset -> attack


def _embedded(leak: Leak) -> Leak:
    """Return the leak as one of a model of embeddings (n, D), with the mask the attacker believes in."""
    mask = None
    if leak.attacker_knowledge != "none" and leak.model.hides_positions:
        if leak.mask is not None:
            mask = leak.mask.flatten()
        elif POSITIONS in leak.gradients:
            mask = ~present_rows(leak.gradients[POSITIONS][0], leak.gradients.get(TOKENS))[: leak.image_shape[0]]
    gradients = {name: value for name, value in leak.gradients.items() if name != TOKENS}
    shape = (leak.image_shape[0], leak.model.embed_dim)
    known = "none" if mask is None else "mask"
    return replace(leak, gradients=gradients, image_shape=shape, attacker_knowledge=known, mask=mask, source=None)


def _read(
    leak: Leak, mask: Tensor | None, found: Reconstruction, vocabulary: str, generator: torch.Generator
) -> Reconstruction:
    """Read vectors (1, n, D) as token ids (1, n); hidden ones in the order the language suggests."""
    table = leak.model.token_embed.weight.detach()
    rows = torch.arange(0 if leak.model.pad is None else 1, len(table))  # no sentence holds padding
    if vocabulary == "leaked":
        rows = present_rows(leak.gradient(TOKENS, "text_match").cpu()).nonzero()[:, 0]
    table = table[rows.to(table.device)].to(found.images)
    centred = (values - values.mean(dim=-1, keepdim=True) for values in (found.images, table))
    one, other = (torch.nn.functional.normalize(values, dim=-1) for values in centred)
    best = (one @ other.T).max(dim=-1)
    ids = rows[best.indices.cpu()]
    if mask is not None:
        ids = order_hidden(leak, ids[0], mask.cpu(), generator)[None]
    knew = {"mask": "inferred"} if mask is not None and leak.mask is None else {}  # to the loop it was told
    return Reconstruction(ids, found.diagnostics | knew | {"similarity": float(best.values.mean())}, found.labels)


text_dlg = text_matching(
    TextMatchingOptions(
        objective="l2",
        optimizer="lbfgs",
        lr=1.0,
        iterations=300,
        init="randn_truncated",
        restarts=3,
        stop_below=1e-7,
    ),
    name="text_dlg",
)
tag = text_matching(
    TextMatchingOptions(
        objective="tag",
        layer_weights="linear",
        optimizer="adamw",
        lr=0.05,
        schedule="linear",
        warmup=50,
        clip=1.0,
        init="randn_truncated",
        labels="joint",
    ),
    name="tag",
)
