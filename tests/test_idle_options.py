"""Options that would change nothing are refused: who gives one believes that it did."""

import pytest

from options import AttackConfig
from utils.commandline import load
from utils.errors import UserError

GIVEN = ["--model=deit_tiny", "--images=pictures", "--output=run"]


@pytest.mark.parametrize(
    "options, words",
    [
        (["--local_lr=0.5"], "--local_lr must be used with --local_steps above 1"),
        (["--local_batch_size=2"], "--local_batch_size must be used with --local_steps above 1"),
        (["--pretrain_lr=0.1"], "--pretrain_lr must be used with --pretrain_steps"),
        (["--success_tokens=0.5"], "--success_tokens must be used with --data.kind text"),
        (["--data.path=sentences"], "--data.path must be used with --data.kind text"),
        (["--metric_only", "--defense=noise"], "--defense must be left out with --metric_only"),
        (["--metric_only", "--local_steps=2"], "--local_steps must be left out with --metric_only"),
    ],
)
def test_an_idle_option_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        load(AttackConfig, [*GIVEN, *options])


def test_options_that_are_used_are_not():
    for options in (["--local_steps=2", "--local_lr=0.5"], ["--pretrain_steps=1", "--pretrain_lr=0.1"],
                    ["--metric_only", "--withhold=pos_embed"]):  # fmt: skip
        load(AttackConfig, [*GIVEN, *options])
