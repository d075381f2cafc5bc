"""scripts/check_docs.py: which commands a page shows, what it states about them, and what running one says."""

import argparse

import pytest

from scripts.check_docs import PAGES, Command, check, cost_of, filled, missing, read_commands, stated_seconds, why_not

PAGE = """Prose of
lines with `python eval.py --help` and `python attack.py
--output runs/c`.

| task | command | cost | expect |
|---|---|---|---|
| a | `make demo` | 7 min | `runs/demo/report.html` |

    DATA=DIR python train.py --output runs/a \\
        --seed 1   # about 20 s
    not a command

```text
PSNR (dB)   91.5  6
```

    for seed in 0 1; do
        echo $seed
    done

```python
print(1)
```
"""


def test_a_page_is_read_in_its_order(tmp_path):
    (tmp_path / "page.md").write_text(PAGE)
    found = read_commands(tmp_path / "page.md")
    assert [command.text.split("\n")[0] for command in found] == [
        "python attack.py --output runs/c",
        "make demo",
        "DATA=DIR python train.py --output runs/a --seed 1",
        "for seed in 0 1; do",
        "print(1)",
    ]
    assert (found[1].cost, found[1].expected) == ("7 min", "`runs/demo/report.html`")
    assert (found[2].cost, found[2].expected) == ("about 20 s", "PSNR (dB)   91.5  6\n")
    assert [command.language for command in found] == ["quoted", "quoted", "", "", "python"]


def test_every_page_states_or_inherits_the_time_of_its_long_scripts():
    for command in (command for page in PAGES for command in read_commands(page)):
        if "scripts/reproduce" in command.text:
            assert cost_of(command), f"{command.page}: {command.text}"


@pytest.mark.parametrize(
    ("cost", "seconds"),
    [("about 20 s", 20), ("2.5 hours of 2 cores", 9000), ("half an hour", 1800), ("seconds a leak", 60), ("", None)],
)
def test_a_stated_time_is_understood(cost, seconds):
    assert stated_seconds(cost) == seconds


def test_what_a_page_expects_is_looked_for(tmp_path):
    expected = "PSNR (dB)   91  6\n...\n"
    assert missing(expected, "log: PSNR (dB)  93.2  6 images", tmp_path) == []
    assert missing(expected, "PSNR (dB)  40  6", tmp_path) == ["PSNR (dB)   91  6"]
    assert missing("97.1 ± 0.1 % (3 seeds)", "acc1 97.3", tmp_path) == []
    assert missing("97.1 ± 0.1 % (3 seeds)", "acc1 90.0", tmp_path) == ["97.1 of '97.1 ± 0.1 % (3 seeds)'"]
    assert missing("`runs/a/report.html`", "", tmp_path) == ["runs/a/report.html"]


def test_what_cannot_run_says_why(tmp_path):
    def reason(text: str, cost: str = "", **data: str) -> str:
        return why_not(Command("page", text, "", cost), filled(text, data, 3), tmp_path, 60)

    (tmp_path / "val").mkdir()
    assert reason("python eval.py --data.path datasets/imagenet") == "needs ImageNet"
    assert reason("make demo", "7 min") == "takes long: --longest 420 runs it"
    assert reason("python train.py --output DIR", "200 epochs: for a GPU") == "needs GPUs"
    assert reason("python attack.py --images CIFAR10/val --output DIR").startswith("needs CIFAR10")
    assert reason("python attack.py --images CIFAR10/val --output DIR", CIFAR10=str(tmp_path)) == ""
    assert reason("python attack.py --leak leaks --output DIR") == "needs leaks, which no command before made"
    assert reason("python eval.py --checkpoint runs/a/last.pt") == "needs runs/a/last.pt, which no command before made"


@pytest.mark.parametrize(
    ("text", "expected", "verdict"),
    [
        ("echo 91 dB", "91 dB\n", "ok"),
        ("echo 12 dB", "91 dB\n", "not printed: 91 dB"),
        ("echo wrong >&2; exit 3", "", "status 3: wrong"),
    ],
)
def test_a_command_gets_a_verdict(tmp_path, text, expected, verdict):
    options = argparse.Namespace(slack=3, default=60)
    command = Command("page", text, "bash", expected=expected)
    assert check(command, text, tmp_path, tmp_path / "log.txt", options)["verdict"] == verdict
