"""eval/text_scores.py and text_report.py: known answers, and what the page shows."""

import pytest

from eval.text_scores import any_order, in_place, score_sentence, text_overlap
from reports.sentences import colours


def test_recovery_in_place_and_in_any_order():
    assert in_place([1, 2, 3, 4], [1, 3, 2, 4]) == 50 and any_order([1, 2, 3, 4], [1, 3, 2, 4]) == 100
    assert any_order([7, 7, 7], [7, 7, 8]) == pytest.approx(200 / 3)  # each as often as it occurs
    assert in_place([], []) == any_order([], []) == 100


def test_overlap_by_the_libraries():
    same = text_overlap("the soup was cold today", "the soup was cold today")
    assert all(value == pytest.approx(100) for value in same.values())
    other = text_overlap("cold was soup the", "the soup was cold")
    assert other["rouge1"] == pytest.approx(100) and other["rouge2"] == 0 and other["rougeL"] == pytest.approx(25)
    assert other["bleu"] < 35
    assert text_overlap("", "the soup")["bleu"] == 0


def test_special_tokens_do_not_count_and_short_answers_are_padded():
    original, shown = [2, 10, 11, 12, 13, 3], [2, 12, 11, 10, 13, 3]
    hidden = [False, True, False, True, False, False]
    scores = score_sentence([2, 10, 11, 12], original, shown, hidden, lambda ids: " ".join(map(str, ids)))
    assert scores["tokens_in_place"] == 75 and scores["tokens_any_order"] == 75
    assert scores["tokens_shown"] == 25 and scores["tokens_visible"] == 50 and scores["tokens_masked"] == 100
    nothing_hidden = score_sentence(original, original, original, [False] * 6, str)
    assert nothing_hidden["tokens_masked"] != nothing_hidden["tokens_masked"]


def test_colours_count_every_token_once():
    assert colours(list("abca"), list("abac")) == ["exact", "exact", "moved", "moved"]
    assert colours(list("aab"), list("abc")) == ["exact", "wrong", "moved"]
