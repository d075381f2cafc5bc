"""Shell scripts: a variable that is missing is asked for in one line, before anything is done."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [ROOT / "train.sh", *sorted((ROOT / "scripts").rglob("*.sh"))]
MISSING = [  # script, what is set, what is asked for
    ("train.sh", {"OUT": "run"}, "DATA"),
    ("train.sh", {"DATA": "data"}, "OUT"),
    ("train.sh", {"DATA": "data", "OUT": "run", "NNODES": "2"}, "MASTER"),
    ("gpu.sh", {"DEVICE": "cpu", "IMAGES": "images"}, "DATA"),
    ("gpu.sh", {"DEVICE": "cpu", "DATA": "data"}, "IMAGES"),
    ("ablation.sh", {"PRESET": "subset"}, "DATA"),
    ("ablation.sh", {"PRESET": "gpu"}, "DATA"),
    ("ablation.sh", {"PRESET": "paper"}, "DATA"),
    ("claims.sh", {"PRESET": "gpu"}, "CIFAR10"),
    ("claims.sh", {"PRESET": "paper"}, "IMAGENET"),
    ("dlg_batches.sh", {}, "IMAGES"),
    ("finetune.sh", {}, "DATA"),
    ("finetune_photographs.sh", {}, "IMAGES"),
    ("flower.sh", {}, "IMAGES"),
    ("gradvit_mjp.sh", {}, "IMAGES"),
    ("gradvit_prior.sh", {"IMAGES": "images"}, "DATA"),
    ("gradvit_prior.sh", {"DATA": "data"}, "IMAGES"),
    ("inverting_gradients.sh", {}, "DATA"),
    ("joint.sh", {}, "IMAGES"),
    ("ratio_curves.sh", {"MODELS": "one=timm:mixer_b16_224"}, "DATA"),
    ("trained_deit_small.sh", {}, "IMAGES"),
]


@pytest.mark.parametrize("script, given, missing", MISSING)
def test_a_missing_variable_is_asked_for_in_one_line(script, given, missing, tmp_path):
    command = next(path for path in SCRIPTS if path.name == script)
    variables = {"PATH": "/usr/bin:/bin", "PYTHON": "false"} | ({} if missing == "OUT" else {"OUT": f"{tmp_path}/out"})
    done = subprocess.run([command], env=variables | given, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and not list(tmp_path.iterdir()), done
    assert re.fullmatch(rf"error: set {missing} to .+\n", done.stderr), done.stderr


def test_every_variable_that_a_script_needs_is_tested():
    asked = {
        (path.name, name) for path in SCRIPTS for name in re.findall(r"\bneed(?:_folder)? (\w+) \"", path.read_text())
    }
    assert asked == {(script, missing) for script, _, missing in MISSING}
    for path in SCRIPTS:  # bash's own way ends with status 1
        assert not re.search(r"\$\{\w+:?\?", path.read_text()), path.name


@pytest.fixture
def once(tmp_path):
    """once(options...) asks scripts/once.sh for the run OUT/one, by a script that notes its options and, with --finish,
    leaves results; returns what bash did."""
    script = tmp_path / "script.sh"
    script.write_text(
        'echo "$@" >>calls\nmkdir -p "${@: -1}"\n[ "$1" != --finish ] || echo "{}" >"${@: -1}/results.json"'
    )

    def call(*options):
        command = f'. {ROOT}/scripts/once.sh; PYTHON=bash OUT=out; once out/one script.sh "$@"; echo after'
        return subprocess.run(["bash", "-ec", command, "-", *options], cwd=tmp_path, capture_output=True, text=True)

    return call


def test_a_run_is_made_once_and_never_taken_for_one_of_other_options(once, tmp_path):
    for _ in range(2):
        assert once("--finish", "two words").stdout == "after\n"
    refused = once("--finish", "two", "words")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert re.fullmatch(r"error: 'out/one' was made with other options \(see out.commands\): .+\n", refused.stderr)
    assert (tmp_path / "calls").read_text() == "--finish two words --output out/one\n"
    assert (tmp_path / "out.commands").read_text() == "out/one\tscript.sh --finish two\\ words \n"


def test_a_stopped_run_goes_on_with_its_options_alone(once, tmp_path):
    for _ in range(2):
        assert once("--stop").returncode == 0
    assert once("--finish").returncode == 2
    assert (tmp_path / "calls").read_text() == "--stop --output out/one\n" * 2


def test_a_run_whose_options_were_not_kept_is_said_to_be_taken(once, tmp_path):
    (tmp_path / "out" / "one").mkdir(parents=True)
    (tmp_path / "out" / "one" / "results.json").write_text("{}")
    assert once("--finish").stderr == "note: the options of 'out/one' were not kept; it is taken for one of this call\n"
    assert once("--finish").stderr == "" and once("--stop").returncode == 2
    assert not (tmp_path / "calls").exists()


def test_tables_of_many_runs_leave_finished_ones_to_once():
    for path in (ROOT / "scripts" / "reproduce").iterdir():
        assert not re.search(r"-f \S*results\.json\S* \] \|\| *\"\$PYTHON", path.read_text()), path.name
