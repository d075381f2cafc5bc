"""scripts/text_table.py: one row for a run, with how many sentences were behind a gradient."""

import json
import sys

import pytest

from scripts.text_table import COLUMNS, main
from utils.errors import UserError


def test_runs_of_other_batches_have_rows_of_their_own(tmp_path, monkeypatch, capsys):
    for batch in (1, 2):
        run = tmp_path / "runs" / "small" / f"dager-{batch}"
        run.mkdir(parents=True)
        summary = {key: {"mean": 10.0 * batch, "std": 1.0, "n": 4} for key in COLUMNS}
        (run / "results.json").write_text(json.dumps({"summary": summary}))
        size = f"batch_size: {batch}\n" if batch > 1 else ""  # runs from before there were batches
        (run / "config.yaml").write_text(
            f"attack: dager\nmask_ratio: 0.0\nattacker_knowledge: none\ndata: {{}}\n{size}"
        )
    out = tmp_path / "table.json"
    monkeypatch.setattr(sys, "argv", ["", "--runs", str(tmp_path / "runs"), "--output", str(out)])
    main()
    rows = json.loads(out.read_text())["rows"]
    assert [(row["batch_size"], row["n"], row["bleu"]["mean"]) for row in rows] == [(1, 4, 10.0), (2, 4, 20.0)]
    assert "| attacker | batch | n |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "holds no results: run scripts/reproduce/text.sh"),
        ('{"summary": ', "is not a results.json"),
        ("[]", "it holds a list"),
        ("{}", "has no 'summary'"),
        ('{"summary": {}}', "is no run of attack.py on sentences"),
    ],
)
def test_what_is_no_run_is_refused_and_nothing_is_written(tmp_path, monkeypatch, content, words):
    (tmp_path / "runs" / "small").mkdir(parents=True)
    if content:
        (tmp_path / "runs" / "small" / "results.json").write_text(content)
    monkeypatch.setattr(sys, "argv", ["", "--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "table.json")])
    with pytest.raises(UserError, match=words):
        main()
    assert not (tmp_path / "table.json").exists()
