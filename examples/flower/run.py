"""A federated training on this machine: a SuperLink, one SuperNode for each image folder, and the app, over loopback.

    python examples/flower/run.py --images CLIENT_0 CLIENT_1 --leaks leaks --rounds 3 --config batch-size=1 lr=0.01

Needs flwr 1.42 or newer (docs/flower.md). --config overrides [tool.flwr.app.config] of pyproject.toml. Every process it
starts ends with it.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.request import urlopen

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BIN = Path(sys.executable).parent


def free_ports(number: int) -> list[int]:
    """Return ports nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def start(stack: ExitStack, log: Path, environment: dict, program: str, *arguments) -> subprocess.Popen:
    """Start one of Flower's programs; leaving the stack ends it and what it has started."""
    command = [str(BIN / program), *map(str, arguments)]
    with open(log, "w") as file:
        to = {"stdout": file, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, env=environment, start_new_session=True, **to)
    stack.callback(end, process)
    return process


def end(process: subprocess.Popen) -> None:
    """Ask a process to stop, then end what is left of it and of all it has started."""
    started = family(process.pid)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
    for pid in started:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def family(pid: int) -> list[int]:
    """Return the process and its descendants."""
    pairs = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.splitlines()
    found = [pid]
    for parent in found:
        found += [int(child) for child, above in map(str.split, pairs) if int(above) == parent]
    return found


def wait_for(url: str, process: subprocess.Popen, log: Path, seconds: float = 60) -> None:
    """Wait until a GET of `url` succeeds."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit and process.poll() is None:
        try:
            with urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    sys.exit(f"error: the SuperLink did not start:\n{log.read_text()[-2000:]}")


def toml(value: object) -> str:
    """Return a value as TOML: a number as it is written, anything else as text."""
    try:
        float(value)
    except ValueError:
        return json.dumps(value)
    return str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, nargs="+", required=True, help="one image folder for each client")
    parser.add_argument("--leaks", type=Path, required=True, help="folder for what the server received")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of the training (default: 1)")
    parser.add_argument("--config", nargs="*", default=[], help="overrides of the app's config, as key=value")
    given = parser.parse_args()
    for folder in given.images:
        if not folder.is_dir():
            sys.exit(f"error: image folder '{folder}' does not exist")
    if list(given.leaks.glob("*.safetensors")):
        sys.exit(f"error: '{given.leaks}' holds leak files already: choose another folder")
    if not (BIN / "flower-superlink").exists():
        sys.exit(f"error: Flower is not installed for {sys.executable}: see docs/flower.md")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: stopped"))  # leaves the stack below, and so ends all
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server, *nodes = free_ports(1 + len(given.images))
        connection = f'[superlink]\ndefault = "loopback"\n[superlink.loopback]\naddress = "127.0.0.1:{server}"\n'
        (home / "config.toml").write_text(connection + "insecure = true\n")
        path = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])
        environment = os.environ | {"FLWR_HOME": str(home), "PYTHONPATH": str(ROOT), "PATH": path}
        environment |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        local = ["--insecure", "--host", "127.0.0.1", "--port"]
        quiet = "--disable-runtime-dependency-installation"
        log = home / "superlink.log"
        link = start(stack, log, environment, "flower-superlink", *local, server, quiet)
        wait_for(f"http://127.0.0.1:{server}/health", link, log)
        for number, (folder, port) in enumerate(zip(given.images, nodes, strict=True)):
            about = f'client={number} images="{folder.resolve()}"'
            link_to = ["--superlink", f"127.0.0.1:{server}", "--node-config", about]
            start(stack, home / f"node_{number}.log", environment, "flower-supernode", *local, port, *link_to)
        overrides = {"clients": len(given.images), "rounds": given.rounds, "leaks": str(given.leaks.resolve())}
        overrides |= dict(entry.split("=", 1) for entry in given.config)
        (home / "run.toml").write_text("".join(f"{key} = {toml(value)}\n" for key, value in overrides.items()))
        command = [str(BIN / "flwr"), "run", str(HERE), "loopback", "--stream", "--run-config", home / "run.toml"]
        done = subprocess.run(list(map(str, command)), env=environment).returncode
        expected = len(given.images) * given.rounds
        if done or len(list(given.leaks.glob("*.safetensors"))) < expected:
            for file in sorted(home.glob("*.log")):
                print(f"--- {file.name}\n{file.read_text()[-4000:]}", file=sys.stderr)
            sys.exit(f"error: the run did not leave {expected} leak files in '{given.leaks}': see the logs above")


if __name__ == "__main__":
    main()
