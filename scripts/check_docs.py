"""Run every command of README.md and docs/ in a fresh clone, each within the time its page states.

    python scripts/check_docs.py --output runs/check_docs
    python scripts/check_docs.py --output runs/check_docs --only attacks.md --data CIFAR10=datasets/cifar10
    python scripts/check_docs.py --output runs/check_docs --only servers.md --data DIR=datasets/cifar10/val \\
        --data DIR2=datasets/cifar10/train

A page states a command's cost in the comment behind it (`# 20 s`) or in the column `cost` of its table, or a script
does in its head (`Cost: 20 s`); what comes out stands in the next block marked as text or in the column `expect`: its
words and numbers must be printed, its files be there. Each page has its own clone of the last commit and the
environment of the caller; datasets/ is shared. Words in capitals stand for files of one's own: --data gives them,
also whole paths (--data datasets/weights=FOLDER). DIR means other pictures on other pages: go page by page. What
cannot run, or takes longer than --longest, is listed with its reason. Finished rows are kept in rows.json: the same
command goes on, and repeats what failed.
"""

import ast
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.errors import UserError, run_command
from utils.tool_parser import ToolParser

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
VARIABLES = r"(?:[A-Z_]+=(?:\"[^\"]*\"|'[^']*'|\S+) +)*"
PROGRAMS = r"python3? |torchrun |make |git |pip |sbatch |\./train\.sh|scripts/\S+\.sh|\.\w+/bin/python |\w+\.py --?\w"
STARTS = re.compile(rf"(?:time +)?{VARIABLES}(?:{PROGRAMS})")
UNITS = {"s": 1, "second": 1, "min": 60, "minute": 60, "h": 3600, "hour": 3600}
WORDS = {"a quarter of an hour": "15 min", "half an hour": "30 min", "an hour": "1 h", "a day": "24 h"}
DEFAULTS = {
    "DIR": "datasets/photographs",
    "DIR2": "datasets/photographs",
    "PHOTOGRAPH": "datasets/photographs/coffee.png",
}
PLACEHOLDER = re.compile(r"(?<![\w./-])([A-Z][A-Z0-9_]*)(?=[\s/.:\"']|$)")
WRITES = re.compile(r"(?:(--(?:output|work|json|figure|contact_sheet)[ =])|(\bOUT=))(\S+)")
NOT_HERE = {  # in this order
    r"(?<!\.)\.\.\.(?!\.)|\bNAME\b|\bK\b": "shows a form, not one command",
    r"ILSVRC2012|datasets/imagenet": "needs ImageNet",
    r"NNODES=|\bsbatch\b": "needs several machines",
    r"train\.sh|nproc_per_node[ =]8|gpu\.sh|PLAN=(full|paper)|PRESET=(gpu|paper)": "needs GPUs",
    r"pip install|git clone|-m venv|oldest\.sh|fuzz\.py|prepare_weights\.py \w|^make lint": "installs or downloads",
}


@dataclass(frozen=True)
class Command:
    """page: relative to the repository; text: as the page has it; language: of its block, or quoted;
    cost, expected: what the page says.
    """

    page: str
    text: str
    language: str = "quoted"
    cost: str = ""
    expected: str = ""


def read_commands(page: Path) -> list[Command]:
    """Return the commands of a page in its order: blocks of shell and Python, and those quoted in tables and prose."""
    name = str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else page.name
    found: list[Command] = []
    for language, block in blocks(page.read_text()):
        if language == "text":
            if found:
                found[-1] = replace(found[-1], expected=block)
        elif language == "python":
            found.append(Command(name, block, "python"))
        elif language == "prose":
            found += [replace(command, page=name) for command in quoted(block)]
        elif language in ("", "bash", "console"):
            found += [replace(command, page=name, language=language) for command in typed(block)]
    return found


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yield (language, content) of each part of a page: fenced and indented blocks, and the prose between them."""
    for part in re.split(r"(^```\w*[^\n]*\n.*?^```|(?<=\n\n)(?: {4}[^\n]*\n)+)", text, flags=re.DOTALL | re.MULTILINE):
        if fenced := re.fullmatch(r"```(\w*)\n(.*?)```", part, flags=re.DOTALL):
            yield fenced[1], fenced[2]
        elif part.startswith("    "):
            yield "", re.sub("^    ", "", part, flags=re.MULTILINE)
        elif not part.startswith(
            "```"
        ):  # a fence with a file's name is that file: tests/test_contributing.py writes it
            yield "prose", part


def typed(block: str) -> Iterator[Command]:
    """Yield the commands of a block of shell: a line each, or a loop as a whole."""
    block = re.sub(r"\\\n\s*", "", block)
    if block.startswith("for "):
        yield Command("", block.strip())
        return
    for line in block.splitlines():
        text, _, comment = line.partition(" #")
        if STARTS.match(text):
            yield Command("", text.strip(), cost=comment.strip())


def quoted(prose: str) -> Iterator[Command]:
    """Yield the commands in backticks: of table rows under a `cost`, and those that write or start a script."""
    header: list[str] = []
    parts = (re.sub(r"`[^`]+`", lambda span: " ".join(span[0].split()), part) for part in prose.split("\n\n"))
    prose = "\n\n".join(parts)  # code that goes on in the next line is one command
    for line in prose.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        header = (header or cells) if cells else []
        row = dict(zip(header, cells, strict=False))
        for text in re.findall(r"`([^`]+)`", line):
            listed = "cost" in row and text in row.get("command", "")
            if STARTS.match(text) and (listed or "--output" in text or "scripts/reproduce" in text):
                expected = row.get("expect", "") if listed else ""
                yield Command("", text, cost=row["cost"] if listed else "", expected=expected)


def stated_seconds(cost: str) -> float | None:
    """Return the most seconds that words state, such as 'about 2 min'; 'seconds' is a minute, 'minutes' are ten."""
    for words, number in WORDS.items():
        cost = cost.lower().replace(words, number)
    units = "|".join(sorted(UNITS, key=len, reverse=True))
    if found := re.findall(rf"(\d+(?:\.\d+)?) ?({units})s?\b", cost):
        return max(float(number) * UNITS[unit] for number, unit in found)
    word = re.search(r"\b(seconds|minutes)\b", cost)
    return {"seconds": 60.0, "minutes": 600.0}[word[0]] if word else None


def cost_of(command: Command) -> float | None:
    """Return the seconds stated beside a command, or else the most that the head of its script states."""
    script = re.search(r"scripts/\S+\.(?:sh|py)", command.text)
    if (seconds := stated_seconds(command.cost)) is not None or not script:
        return seconds
    text = (ROOT / script[0]).read_text()
    if script[0].endswith(".py"):
        stated = re.search(r"\bCost: ([^.]*)", ast.get_docstring(ast.parse(text)) or "")
        return stated_seconds(" ".join(stated[1].split())) if stated else None
    head = text.partition("\nset -")[0]
    return max((seconds for line in head.splitlines() if (seconds := stated_seconds(line))), default=None)


def missing(expected: str, printed: str, folder: Path) -> list[str]:
    """Return what a page expects and a command did not print: lines of a block, numbers and files of a table cell."""
    if "\n" in expected:
        lines = [line.split() for line in printed.splitlines()]
        return [
            line
            for line in expected.splitlines()
            if line.strip(" .") and not any(holds(words, line) for words in lines)
        ]
    files = re.findall(r"`(\S+/\S+)`", expected)
    gone = [file for file in files if not (folder / file).exists()]
    plain = re.sub(r"`[^`]*`|\(n = \d+\)|\(\d+ seeds?\)", "", expected)
    numbers = [float(text) for text in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?", printed.replace(",", ""))]
    for text, spread in re.findall(r"(\d+(?:\.\d+)?)(?: ± (\d+(?:\.\d+)?))?", plain.replace(",", "")):
        reach = max(3 * float(spread or 0), 0.02 * float(text))
        gone += [] if any(abs(number - float(text)) <= reach for number in numbers) else [f"{text} of '{expected}'"]
    return gone


def holds(words: list[str], line: str) -> bool:
    """Return whether printed words hold those of a line in a row, numbers within a fifth or both below a thousandth."""
    wanted = line.split()
    starts = range(len(words) - len(wanted) + 1)
    return any(all(map(alike, words[start:], wanted)) for start in starts)


def alike(word: str, wanted: str) -> bool:
    """Return whether two words are equal, or numbers near to each other."""
    try:
        found, number = float(word), float(wanted)
    except ValueError:
        return word == wanted
    return abs(found - number) <= max(0.2 * abs(number), 1e-3)


def why_not(command: Command, text: str, folder: Path, longest: float) -> str:
    """Return why a command is not run here, or ''. `text` has its placeholders filled in."""
    for pattern, reason in NOT_HERE.items():
        if command.language != "python" and re.search(pattern, command.text):
            return reason
    if "GPU" in command.cost:
        return "needs GPUs"
    if (seconds := cost_of(command)) is not None and seconds > longest:
        return f"takes long: --longest {seconds:.0f} runs it"
    if seconds is None and "scripts/reproduce" in command.text:
        return "states no time, neither here nor in its head"
    if command.language == "python":
        return ""
    inputs = WRITES.sub("", text)
    if names := sorted(set(PLACEHOLDER.findall(inputs))):
        return f"needs {', '.join(names)}: --data {names[0]}=PATH"
    needed = re.findall(r"(?<![\w/])((?:runs|datasets)/[\w./-]+|[\w/.-]+\.(?:pth?|safetensors))(?=[\s\"']|$)", inputs)
    needed += re.findall(r"--(?:leak|images|checkpoint|data\.path) (\S+)", inputs)
    if gone := [file for file in needed if not (folder / file).exists()]:
        return f"needs {gone[0]}, which no command before made"
    return ""


def filled(text: str, data: dict[str, str], number: int) -> str:
    """Return a command with its placeholders replaced; what it writes to a placeholder goes to runs/NUMBER."""
    text = re.sub(r"\[[^\]]* [^\]]*\]", "", text)  # an option that may be left out
    text = WRITES.sub(lambda found: (found[1] or found[2]) + re.sub(r"^[A-Z]+$", f"runs/{number}", found[3]), text)
    for name, path in data.items():
        text = re.sub(rf"(?<![\w./-]){re.escape(name)}(?=[\s/.:\"']|$)", path, text)
    return text


def clone(folder: Path, shared: Path, commit: str) -> None:
    """Bring a clone of `commit` to `folder`, with the caller's environment; datasets/ leads to `shared`."""
    if not folder.exists():
        subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
        (folder / ".venv").symlink_to(Path(sys.prefix).absolute())
        (folder / "datasets").symlink_to(shared)
    subprocess.run(["git", "fetch", "-q", str(ROOT), commit], cwd=folder, check=True)
    subprocess.run(["git", "checkout", "-q", "--detach", "-f", commit], cwd=folder, check=True)
    for file in folder.glob("requirements*.txt"):
        os.utime(file, (0, 0))  # older than .venv/.ready, or `make` would install into the caller's environment


def run_here(text: str, language: str, folder: Path, limit: float, log: Path) -> tuple[int | None, float]:
    """Run a command in `folder`; return its status (None: ended after `limit` seconds) and its seconds.

    The seconds are those of the clock, or of the processor where these are fewer: a machine may be busy with more.
    """
    environment = os.environ | {"PATH": f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    words = [sys.executable, "-c", text] if language == "python" else ["bash", "-c", f"set -e\n{text}"]
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with log.open("w") as output:
        process = subprocess.Popen(
            words, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            end(process)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return status, min(time.monotonic() - begun, processor)


def end(process: subprocess.Popen) -> None:
    """End a process with its group: asked first, so that launchers end what they started elsewhere."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)


def check(command: Command, text: str, folder: Path, log: Path, options) -> dict:
    """Run one command; return its row: seconds, bound and verdict."""
    bound = max(options.slack * (cost_of(command) or options.default), 30.0)
    for _, _, place in WRITES.findall(text):
        if (folder / place).is_dir() and place.startswith("runs/") and "--resume" not in text:
            shutil.rmtree(folder / place)  # of an attempt before
    limit = max(4 * bound, 900)  # of the clock: a machine may be busy with more
    status, seconds = run_here(text, command.language, folder, limit, log)
    printed = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", log.read_text(errors="replace")).replace("\r", "\n")
    gone = missing(command.expected, printed, folder) if status == 0 else []
    if status is None:
        verdict = f"ended after {limit:.0f} s"
    elif status:
        verdict = f"status {status}: {(printed.strip().splitlines() or ['nothing printed'])[-1][:200]}"
    elif gone:
        verdict = f"not printed: {gone[0].strip()}"
    else:
        verdict = "ok" if seconds <= bound else "slow"
    return {"seconds": round(seconds, 1), "bound": round(bound), "verdict": verdict}


def table(rows: list[dict]) -> str:
    """Return the rows as Markdown."""
    lines = ["| page | command | seconds | bound | verdict |", "|---|---|---|---|---|"]
    for row in rows:
        shown = " ".join(row["text"].split())
        shown = f"{shown[:97]}..." if len(shown) > 100 else shown
        cells = (row["page"], f"`{shown}`", row["seconds"], row["bound"], row["verdict"])
        lines.append(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--output", required=True, help="folder of clones, logs, rows.json and table.md")
    parser.add_argument("--only", default="", help="regular expression that 'PAGE COMMAND' must hold")
    parser.add_argument(
        "--data", action="append", default=[], help="NAME=PATH of a placeholder or path; may be repeated"
    )
    parser.add_argument("--longest", type=float, default=180, help="stated seconds above which a command is not run")
    parser.add_argument(
        "--default", type=float, default=60, help="seconds for a command whose page states none; 0: list it"
    )
    parser.add_argument("--slack", type=float, default=3, help="a command may take so many times what is stated")
    options = parser.parse_args()
    if wrong := [given for given in options.data if not Path(given.partition("=")[2] or "?").exists()]:
        raise UserError(f"--data '{wrong[0]}' is not NAME=PATH of what exists")
    try:
        re.compile(options.only)
    except re.error as error:
        raise UserError(f"--only '{options.only}' is no regular expression: {error}") from error
    given = dict(word.split("=", 1) for word in options.data)
    data = DEFAULTS | {name: str(Path(path).absolute()) for name, path in given.items()}
    output = Path(options.output).absolute()
    output.mkdir(parents=True, exist_ok=True)
    shared = output / "datasets"
    if not shared.exists():
        subprocess.run([sys.executable, "-m", "data.demo", "--output", str(shared)], cwd=ROOT, check=True)
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
    kept = json.loads((output / "rows.json").read_text()) if (output / "rows.json").exists() else {}
    rows: dict[str, dict] = {}
    for number, command in enumerate(command for page in PAGES for command in read_commands(page)):
        key = f"{command.page} {command.text}"
        if key in rows:
            continue
        folder = output / command.page.replace("/", "_").removesuffix(".md")
        about = {"page": command.page, "text": command.text, "seconds": "", "bound": ""}
        if (row := kept.get(key)) and (row["verdict"] == "ok" or not re.search(options.only, key)):
            rows[key] = row
            continue
        if not re.search(options.only, key):
            continue
        clone(folder, shared, commit)
        text = filled(command.text, data, number)
        unstated = "states no time: --default 60 tries it" if not options.default and cost_of(command) is None else ""
        if reason := why_not(command, text, folder, options.longest) or unstated:
            rows[key] = about | {"verdict": f"not run: {reason}"}
        else:
            rows[key] = about | check(command, text, folder, output / f"{number}.txt", options)
        print(table([rows[key]]).splitlines()[-1], flush=True)
        rows[key] |= {"commit": commit[:12]}
        (output / "rows.json").write_text(json.dumps(kept | rows, indent=1))
    (output / "table.md").write_text(table(list(rows.values())) + "\n")
    failed = [row for row in rows.values() if row["verdict"] != "ok" and not row["verdict"].startswith("not run")]
    ran = [row for row in rows.values() if not row["verdict"].startswith("not run")]
    print(
        f"{len(ran)} commands run, {len(failed)} not as stated, {len(rows) - len(ran)} not run: {output / 'table.md'}"
    )
    sys.exit(bool(failed))


if __name__ == "__main__":
    run_command(main)
