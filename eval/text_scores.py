"""How close a reconstructed sentence comes to the private one: SENTENCE_METRICS is the table of all scores, of tokens
and of summaries and translations by the libraries that define them."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from reports.metrics import Metric


@cache
def scorers() -> tuple:
    """Return (ROUGE of rouge-score, sentence BLEU of sacrebleu), whose imports take seconds that only sentences
    need."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    return RougeScorer(["rouge1", "rouge2", "rougeL"]), BLEU(effective_order=True, tokenize="none")


def in_place(found: Sequence[int], original: Sequence[int]) -> float:
    """Return the percentage of the original's tokens that stand at the same place; higher is closer."""
    pairs = zip(found, original, strict=False)
    return 100 * sum(one == other for one, other in pairs) / len(original) if original else 100.0


def any_order(found: Sequence[int], original: Sequence[int]) -> float:
    """Return the percentage of the original's tokens that were found, each as often as it was, wherever; higher is
    closer."""
    common = Counter(found) & Counter(original)
    return 100 * sum(common.values()) / len(original) if original else 100.0


def text_overlap(found: str, original: str) -> dict[str, float]:
    """Return ROUGE-1, ROUGE-2 and ROUGE-L (F1, rouge-score) and sentence BLEU (sacrebleu, up to 4-grams, exponential
    smoothing, shorter texts by their own order), all in percent of 100; higher is closer. Words are split at spaces."""
    scorer, bleu = scorers()
    rouge = scorer.score(original, found)
    bleu = bleu.sentence_score(found, [original]).score
    return {key: 100 * rouge[key].fmeasure for key in ("rouge1", "rouge2", "rougeL")} | {"bleu": bleu}


@dataclass(frozen=True)
class SentenceComparison:
    """What the scores of a sentence are computed from: token ids without those the tokenizer adds, [CLS] and [SEP].

    model_input: the original as the victim's model saw it, shuffled; mask: its masked places; words(ids): their text.
    """

    found: Sequence[int]
    original: Sequence[int]
    model_input: Sequence[int]
    mask: Sequence[bool]
    words: Callable[[Sequence[int]], str]

    def at(self, masked: bool) -> tuple[list[int], list[int]]:
        """Return (found, model's input) at the masked places, or at the others."""
        places = [place for place, away in enumerate(self.mask) if bool(away) == masked]
        return [self.found[place] for place in places], [self.model_input[place] for place in places]

    @cached_property
    def overlap(self) -> dict[str, float]:
        """Return ROUGE and BLEU of the texts."""
        return text_overlap(self.words(self.found), self.words(self.original))


def _unless_none(score: Callable, pair: tuple[Sequence[int], Sequence[int]]) -> float:
    """Return a score of (found, true) tokens, NaN where there are none."""
    return score(*pair) if pair[1] else float("nan")


SENTENCE_METRICS = {
    "tokens_in_place": Metric(
        lambda one: in_place(one.found, one.original),
        "in place",
        "%",
        "higher",
        "tokens of the original found at their own place",
    ),
    "tokens_any_order": Metric(
        lambda one: any_order(one.found, one.original),
        "any order",
        "%",
        "higher",
        "tokens of the original found, each as often as it occurs, anywhere",
    ),
    "tokens_shown": Metric(
        lambda one: in_place(one.found, one.model_input),
        "in place, input",
        "%",
        "higher",
        "against what the model saw, tokens shuffled where it uses MJP",
        refines="tokens_in_place",
    ),
    "tokens_visible": Metric(
        lambda one: _unless_none(in_place, one.at(masked=False)),
        "visible",
        "%",
        "higher",
        "places that are not masked, against the model's input",
        refines="tokens_shown",
    ),
    "tokens_masked": Metric(
        lambda one: _unless_none(any_order, one.at(masked=True)),
        "masked, as a set",
        "%",
        "higher",
        "tokens at the masked places, in any order",
    ),
    "rouge1": Metric(lambda one: one.overlap["rouge1"], "ROUGE-1", "", "higher", "overlap of words, F1 of 100"),
    "rouge2": Metric(
        lambda one: one.overlap["rouge2"], "ROUGE-2", "", "higher", "overlap of pairs of words, F1 of 100"
    ),
    "rougeL": Metric(
        lambda one: one.overlap["rougeL"], "ROUGE-L", "", "higher", "longest common subsequence of words, F1 of 100"
    ),
    "bleu": Metric(lambda one: one.overlap["bleu"], "BLEU", "", "higher", "n-grams of up to four words, of 100"),
    "label_found": Metric(None, "label found", "%", "higher", "sentences whose label the attack found"),
    "seconds": Metric(None, "attack time", "s", "", "seconds per sentence"),
}


def score_sentence(
    found: Sequence[int],
    original: Sequence[int],
    model_input: Sequence[int],
    mask: Sequence[bool],
    words: Callable[[Sequence[int]], str],
    inner: slice = slice(1, -1),
) -> dict[str, float]:
    """Return the scores of SENTENCE_METRICS that are functions of one sentence of token ids, of the places `inner`: the
    tokens that the tokenizer adds, [CLS] and [SEP], everybody knows. Scores of places that do not exist are NaN."""
    found = [*found, *[0] * (len(original) - len(found))][: len(original)]
    one = SentenceComparison(found[inner], original[inner], model_input[inner], mask[inner], words)
    return {name: metric.function(one) for name, metric in SENTENCE_METRICS.items() if metric.function}
