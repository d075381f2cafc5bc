"""eval/assignment.py: rows that are no numbers are no pictures."""

import torch

from eval.assignment import assign


def test_rows_that_hold_nan_are_the_last_to_be_chosen():
    targets = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    for broken in (torch.nan, torch.inf):
        rows = torch.tensor([[broken, 0.0], [0.9, 1.1], [0.1, -0.1]])  # more of them than targets
        assert assign(rows, targets).tolist() == [2, 1]
