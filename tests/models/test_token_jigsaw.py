"""models/token_jigsaw.py: which places it masks, what it permutes, and on what its draws depend."""

import math

import pytest
import torch

from models.token_jigsaw import TokenJigsaw
from utils.errors import UserError


def sentences(*lengths: int) -> torch.Tensor:
    """Ids whose tokens are all different, padded to the longest."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.arange(100, 100 + length)
    return ids


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.7, 1.0])
def test_windows_mask_the_ceiling_and_keep_ends_and_padding(ratio):
    ids = sentences(22, 10, 4, 3)
    mask, source = TokenJigsaw(ratio, window=10).draw(ids)
    for row, length in enumerate((22, 10, 4, 3)):
        expected = 0
        for first in range(1, length - 1, 10):
            places = range(first, min(first + 10, length - 1))
            number = math.ceil(round(ratio * len(places), 9))
            found = mask[row, places].sum().item()
            assert found == (number if number > 1 else 0)
            assert sorted(source[row, places].tolist()) == list(places)  # nothing leaves its window
            expected += found
        assert mask[row].sum() == expected and not mask[row, 0] and not mask[row, length - 1 :].any()
    assert torch.equal(source[~mask], torch.arange(22).expand(4, -1)[~mask])


def test_pieces_of_ngram_tokens_stay_together():
    ids = sentences(26)
    mask, source = TokenJigsaw(1.0, window=12, ngram=3).draw(ids)
    blocks = source[0, 1:25].view(8, 3)
    assert mask[0, 1:25].all() and ((blocks - blocks[:, :1]) == torch.arange(3)).all()
    assert ((blocks[:, 0] - 1) % 3 == 0).all()


def test_a_sentence_draws_the_same_in_any_company():
    jigsaw, ids = TokenJigsaw(0.5, window=4), sentences(9, 13, 7)
    masks, sources = jigsaw.draw_for([3, 4, 5], ids)
    mask, source = jigsaw.draw_for([5], ids[2:, :7])
    assert torch.equal(masks[2, :7], mask[0]) and torch.equal(sources[2, :7], source[0])


def test_the_global_batch_does_not_depend_on_the_number_of_processes():
    ids = sentences(9, 13, 7, 11)
    whole, _ = TokenJigsaw(0.5, window=4).draw(ids)
    for rank in range(2):
        part, _ = TokenJigsaw(0.5, window=4).draw(ids[rank::2], rank, 2)
        assert torch.equal(part, whole[rank::2])


def test_its_state_continues_the_stream():
    ids, jigsaw = sentences(12, 12), TokenJigsaw(0.5, window=5)
    jigsaw.draw(ids)
    state, expected = jigsaw.state_dict(), jigsaw.draw(ids)
    other = TokenJigsaw(0.5, window=5, seed=9)
    other.load_state_dict(state)
    assert all(torch.equal(*pair) for pair in zip(other.draw(ids), expected, strict=True))


def test_the_published_code_loses_its_window():
    """A sentence whose last window has one token leaves nothing to shuffle for the rest of the batch."""
    ids = sentences(7, 12)  # 5 inner tokens in windows of 4: the last one has 1
    kept, _ = TokenJigsaw(1.0, window=4).draw(ids)
    lost, _ = TokenJigsaw(1.0, window=4, shrinking=True).draw(ids)
    assert kept[1, 1:11].all() and not lost[1].any()
    assert torch.equal(kept[0], lost[0])


def test_ratio_zero_draws_nothing():
    mask, source = TokenJigsaw(0).draw(sentences(9))
    assert not mask.any() and torch.equal(source[0], torch.arange(9)) and not TokenJigsaw(0).count


@pytest.mark.parametrize(
    "options", [{"mask_ratio": 1.5}, {"mask_ratio": 0.5, "window": 0}, {"mask_ratio": 0, "ngram": 0}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError):
        TokenJigsaw(**options)
