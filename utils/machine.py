"""What a number was made with: the code, the packages and the machine."""

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("torch", "torchvision", "timm", "numpy", "scipy", "scikit-image", "scikit-learn", "pillow", "jsonargparse")


def code_version() -> dict:
    """Return {"commit", "dirty"} of the code that runs; dirty: tracked files differ from the commit. None outside of
    git."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=60
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def describe_machine() -> dict:
    """Return {"python", "packages": {name: version}, "machine": {...}} of this process."""
    found = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    machine = {
        "host": platform.node(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "GPUs": ", ".join(found) or "none",
    }
    packages = {name: version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "packages": packages, "machine": machine}


def processor() -> str:
    """Return the processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def command_line() -> str:
    """Return the command of this process, as one would type it."""
    return shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])


def environment() -> dict:
    """Return what the numbers of this process were made with: command, code, packages and machine."""
    return {"command": command_line(), "code": code_version(), **describe_machine()}


def in_words(about: dict) -> str:
    """Return `environment` in one line."""
    code, packages = about["code"], ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    changed = ", uncommitted changes" if code["dirty"] else ""
    machine = ", ".join(f"{key} {value}" for key, value in about["machine"].items())
    return f"{about['command']} | code {code['commit']}{changed} | Python {about['python']}, {packages} | {machine}"
