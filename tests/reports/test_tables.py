"""reports/tables.py: the same values as Markdown, LaTeX, CSV and lines of text."""

import csv
import io

from reports.tables import Measured, Table, comma_separated, latex, markdown, plain, write_table

HOSTILE = r"50% of_a & {b} $c$ #1 ~x^2 \input{/etc/passwd} <d>|e"
TABLE = Table(
    ["model", "top-1 (%)", "n"],
    [[HOSTILE, Measured(97.25, 0.123456), 3], ["b", Measured(None), 1], ["c", Measured(7.0, None, ".3g"), 2]],
    "50 % ± 1",
)


def test_measured_values_say_what_is_known():
    assert str(Measured(97.26, 0.04)) == "97.3 ± 0.0"
    assert str(Measured(1234.5, 0.123, ".3g", ".2g")) == "1.23e+03 ± 0.12"
    assert str(Measured(3.0)) == "3.0" and str(Measured(None, 1.0)) == "–"


def test_markdown_aligns_numbers_and_keeps_its_columns():
    lines = markdown(TABLE).splitlines()
    assert lines[:2] == ["| model | top-1 (%) | n |", "| --- | ---: | ---: |"]
    assert r"<d>\|e | 97.2 ± 0.1 | 3 |" in lines[2]
    assert lines[3:] == ["| b | – | 1 |", "| c | 7 | 2 |"]


def test_markdown_puts_wide_tables_below_each_other():
    header = ["model", "attack", *(f"score {place}" for place in range(9))]
    wide = Table(header, [["vit", "naive", *range(9)], ["vit", "adaptive", *range(10, 19)]])
    first, second = markdown(wide).split("\n\n")
    assert first.splitlines()[2] == "| vit | naive | 0 | 1 | 2 | 3 | 4 |"
    assert second.splitlines()[0] == "| model | attack | score 5 | score 6 | score 7 | score 8 |"
    assert second.splitlines()[3] == "| vit | adaptive | 15 | 16 | 17 | 18 |"


def test_latex_prints_what_names_contain():
    text = latex(TABLE)
    assert r"\begin{tabular}{lrr}" in text and r"\caption{50 \% $\pm$ 1}" in text
    expected = (
        r"50\% of\_a \& \{b\} \$c\$ \#1 \textasciitilde{}x\textasciicircum{}2 "
        r"\textbackslash{}input\{/etc/passwd\} \textless{}d\textgreater{}\textbar{}e & 97.2 $\pm$ 0.1 & 3 \\"
    )
    assert expected in text.splitlines()
    assert r"b & -- & 1 \\" in text.splitlines()
    assert text.count("{") == text.count("}")


def test_csv_has_full_precision_and_a_column_of_spreads():
    rows = list(csv.reader(io.StringIO(comma_separated(TABLE))))
    assert rows[0] == ["model", "top-1 (%)", "top-1 (%) std", "n"]
    assert rows[1] == [HOSTILE, "97.25", "0.123456", "3"]
    assert rows[2] == ["b", "", "", "1"] and rows[3] == ["c", "7.0", "", "2"]


def test_plain_lines_are_aligned():
    lines = plain(TABLE)
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split() == ["b", "–", "1"]


def test_all_three_files_are_written(tmp_path):
    write_table(tmp_path / "scores", TABLE)
    assert {path.name for path in tmp_path.iterdir()} == {"scores.md", "scores.tex", "scores.csv"}
    assert (tmp_path / "scores.tex").read_text() == latex(TABLE)
