"""How close a reconstructed sentence comes to the private one: its tokens in place, its tokens in any order, and the
scores of summaries and translations by the libraries that define them."""

from collections import Counter
from collections.abc import Sequence
from functools import cache


@cache
def scorers() -> tuple:
    """(ROUGE of rouge-score, sentence BLEU of sacrebleu), whose imports take seconds that only sentences need."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    return RougeScorer(["rouge1", "rouge2", "rougeL"]), BLEU(effective_order=True, tokenize="none")


def in_place(found: Sequence[int], original: Sequence[int]) -> float:
    """Percentage of the original's tokens that stand at the same place; higher is closer."""
    pairs = zip(found, original, strict=False)
    return 100 * sum(one == other for one, other in pairs) / len(original) if original else 100.0


def any_order(found: Sequence[int], original: Sequence[int]) -> float:
    """Percentage of the original's tokens that were found, each as often as it was, wherever; higher is closer."""
    common = Counter(found) & Counter(original)
    return 100 * sum(common.values()) / len(original) if original else 100.0


def text_overlap(found: str, original: str) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L (F1, rouge-score) and sentence BLEU (sacrebleu, up to 4-grams, exponential
    smoothing, shorter texts by their own order), all in percent of 100; higher is closer. Words are split at spaces."""
    scorer, bleu = scorers()
    rouge = scorer.score(original, found)
    bleu = bleu.sentence_score(found, [original]).score
    return {key: 100 * rouge[key].fmeasure for key in ("rouge1", "rouge2", "rougeL")} | {"bleu": bleu}


def score_sentence(
    found: Sequence[int], original: Sequence[int], shown: Sequence[int], hidden: Sequence[bool], words
) -> dict[str, float]:
    """Scores of one sentence of token ids; the first and last token, [CLS] and [SEP], which everybody knows, are left
    out. shown: as the model saw it, shuffled; hidden: its masked places; words(ids) -> the text of ids.

    tokens_in_place and tokens_any_order (order-aware and order-free recovery) against the original; tokens_shown, the
    former against `shown`; tokens_visible and tokens_masked, the places that are not masked, in place against `shown`,
    and the masked ones as a set (NaN where there are none); rouge1, rouge2, rougeL, bleu. All in percent.
    """
    inner = slice(1, len(original) - 1)
    found = [*found, *[0] * (len(original) - len(found))][: len(original)]
    places = [(one, other, away) for one, other, away in zip(found, shown, hidden, strict=True)][inner]
    seen = [(one, other) for one, other, away in places if not away]
    masked = [(one, other) for one, other, away in places if away]
    missing = float("nan")
    return {
        "tokens_in_place": in_place(found[inner], original[inner]),
        "tokens_any_order": any_order(found[inner], original[inner]),
        "tokens_shown": in_place(found[inner], shown[inner]),
        "tokens_visible": in_place(*zip(*seen, strict=True)) if seen else missing,
        "tokens_masked": any_order(*zip(*masked, strict=True)) if masked else missing,
        **text_overlap(words(found[inner]), words(original[inner])),
    }
