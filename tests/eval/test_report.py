"""eval/report.py: results.json files of every kind become tables, and those over mask ratios a figure."""

import json
from pathlib import Path

import pytest
from PIL import Image

from eval.report import collect, curve_panels, main, read_results, tables
from reports.tables import markdown
from utils.errors import UserError, run_command

RATIOS = (0.0, 0.5)


def rows(metric: str, values, std: float = 0.0, seeds: int = 1) -> list[dict]:
    shared = {"images": 10, "skipped": 0, "seeds": seeds}
    return [
        {"mask_ratio": ratio, metric: value, f"{metric}_std": std, "diff_norm": 1.0, "diff_norm_std": 0.5} | shared
        for ratio, value in zip(RATIOS, values, strict=True)
    ]


def accuracy(*values: float, **options) -> dict:
    return {"accuracy": rows("acc1", values, **options)}


def consistency(*values: float, **options) -> dict:
    return {"consistency": rows("consistency", values, **options)}


def write(folder: Path, content: dict) -> Path:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(content))
    return folder


def lines(table) -> list[str]:
    return markdown(table).splitlines()[2:]


def test_several_results_become_mean_and_standard_deviation():
    runs = {"a": [accuracy(90.0, 50.0), accuracy(94.0, 60.0)], "b": [accuracy(80.0, 10.0), accuracy(80.0, 20.0)]}
    table = tables(runs)["accuracy"]
    assert list(table.header) == ["accuracy (%)", "0", "0.5"]
    assert lines(table) == ["| a | 92.0 ± 2.8 | 55.0 ± 7.1 |", "| b | 80.0 ± 0.0 | 15.0 ± 7.1 |"]
    assert "n = 2 runs" in table.caption


def test_a_single_result_keeps_its_spread_over_mask_draws():
    table = tables({"a": [accuracy(90.0, 50.0, std=1.5, seeds=3)]})["accuracy"]
    assert lines(table) == ["| a | 90.0 ± 1.5 | 50.0 ± 1.5 |"] and "3 mask draws" in table.caption
    table = tables({"a": [accuracy(90.0, 50.0)]})["accuracy"]
    assert lines(table) == ["| a | 90.0 | 50.0 |"] and table.caption.endswith("one run")


def test_curves_on_different_ratios_are_refused():
    other = {"accuracy": rows("acc1", (1.0, 2.0))[:1]}
    with pytest.raises(UserError, match="accuracy of a, b was not measured at the same mask ratios"):
        tables({"a": [accuracy(90.0, 50.0)], "b": [other]})


def test_panels_follow_the_layout_of_the_paper():
    runs = {"a": [accuracy(90.0, 50.0, std=1.5, seeds=3), consistency(100.0, 70.0)], "b": [accuracy(80.0, 10.0)]}
    first, second = curve_panels(runs)
    assert (first["xlabel"], first["ylabel"]) == ("Masking ratio γ", "Top-1 Acc. (%)")
    assert first["lines"] == {"a": ([0, 0.5], [90, 50]), "b": ([0, 0.5], [80, 10])}
    assert first["spread"] == {"a": [1.5, 1.5], "b": [0, 0]}
    assert second["lines"] == {"a": ([0, 0.5], [100, 70])}


def test_every_suite_has_its_table():
    scores = {"acc1": 7.0, "rms_calibration_error": 40.0, "aurra": 9.0, "images": 30, "skipped": 0}
    errors = {"gaussian_noise": 50.0, "fog": 40.0}
    position = {"table": "sinusoid_2d", "probe": "absolute", "target": "position", "dimensions": 2, "mae": 0.25}
    runs = {
        "m": [
            {"imagenet_a": [scores]},
            {"imagenet_o": [{"aupr": 20.0, "auroc": 60.0, "fpr95": 80.0, "images": 5, "known_images": 6}]},
            {"mce": {"mce": 55.5, "mce_unnormalised": 45.0, "relative_mce": None, "errors": errors}},
            {"position": [position | {"mae_std": 0.1, "chance": 4.7, "ridge": 0.0, "repeats": 20}]},
            {
                "attention": [
                    {"image": image, "mask_ratio": 0.5, "follows_content": 0.5 + image, "stays_in_place": 0.25}
                    for image in (0, 1)
                ]
            },
            {"summary": {"psnr": {"mean": 30.123, "std": None, "n": 1}, "success": {"mean": 1.0, "n": 1}}},
        ]
    }
    made = tables(runs)
    assert lines(made["imagenet_a"]) == ["| m | 7.00 | 40.00 | 9.00 | 30 |"]
    assert lines(made["imagenet_o"]) == ["| m | 20.00 | 60.00 | 80.00 | 5 |"]
    assert list(made["imagenet_c"].header) == ["top-1 error (%)", "m"]
    assert lines(made["imagenet_c"]) == [
        "| mCE, normalised | 55.5 |",
        "| mCE, unnormalised | 45.0 |",
        "| gaussian noise | 50.0 |",
        "| fog | 40.0 |",
    ]
    assert lines(made["position"]) == ["| m | sinusoid 2d | absolute | position | 2-D | 0.250 ± 0.100 | 4.70 | 20 |"]
    assert lines(made["attention"]) == ["| m | 0.5 | 1.00 ± 0.71 | 0.25 ± 0.00 | 2 |"]
    assert markdown(made["attacks"]).splitlines()[::2] == ["| score | m, n = 1 |", "| PSNR (dB) | 30.1 |"]


def test_the_command_writes_tables_and_figures(tmp_path, capsys):
    for seed, value in ((0, 90.0), (1, 92.0)):
        write(tmp_path / "mjp" / str(seed) / "eval", accuracy(value, 50.0))
        write(tmp_path / "mjp" / str(seed) / "consistency", consistency(100.0, value))
    write(tmp_path / "one", accuracy(70.0, 30.0))
    names = [f"MJP_1={tmp_path / 'mjp'}", str(tmp_path / "one")]
    main(["--runs", *names, "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "| MJP_1 | 91.0 ± 1.4 | 50.0 ± 0.0 |" in printed and "| one | 70.0 | 30.0 |" in printed
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert {f"{stem}.{end}" for stem in ("accuracy", "consistency") for end in ("md", "tex", "csv")} < made
    assert r"MJP\_1 & 91.0 $\pm$ 1.4" in (tmp_path / "out" / "accuracy.tex").read_text()
    with Image.open(tmp_path / "out" / "ratio_curves.png") as image:
        assert image.width > 1000
    document = (tmp_path / "out" / "ratio_curves.pdf").read_bytes()
    assert document.startswith(b"%PDF")
    main(["--runs", *names, "--output", str(tmp_path / "again")])
    assert (tmp_path / "again" / "ratio_curves.pdf").read_bytes() == document


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a results.json"),
        ("[1]", "holds a list"),
        ('{"epochs": 3}', "no results of eval.py, consistency.py or attack.py"),
    ],
)
def test_files_without_results_end_in_one_line(tmp_path, capsys, content, message):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: main(["--runs", f"a={tmp_path}"]))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_missing_runs_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_results(tmp_path / "results.json")
    with pytest.raises(UserError, match="holds no results.json"):
        collect(tmp_path)
