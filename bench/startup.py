"""What a start takes, part by part, from launching the process to the first token of the first answer.

    python -m bench.startup --weights weights/demo

Cog's own server is started once with nothing prepared (kernels to compile, weights to repack), then `--rounds` times
like every later start. The parts within setup are those that the service itself logs (starling/startup.py); with
`--engine reference` there are fewer. `--alone` starts no server, only the service in a process of its own, which needs
no Cog.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.command import checkpoint, count, report_errors
from starling.weights import LOCK_PATH

PARTS = {
    "server": "Cog's server starts, and its worker",
    "imports": "the worker imports cog, predict.py, torch, starling",
    "weights": "weights are found, and verified where a lock names them",
    "operations": "kernels are loaded (the first time: compiled); on a GPU its context is made first",
    "model": "the model is mapped into memory (the first time: repacked); onto a GPU it is read, and repacked there",
    "tokenizer": "tokenizer.json is read",
    "kv_cache": "the KV cache is allocated",
    "runner": "what all steps share is allocated: on a GPU pinned memory, and tables for sampling",
    "grammars": "the tables for schemas and regular expressions are built",
    "warm_up": "one real prediction; on a GPU its decode step is captured",
    "ready": "until the health check says READY",
    "first token": "the first request's first text",
}


def start_line(log: str) -> dict[str, Any]:
    """The line that the service logs about its start. Cog wraps each line of our log in JSON of its own."""
    for text in log.splitlines():
        message = json.loads(text)["fields"]["message"] if text.startswith("{") else text
        if '"event": "start"' in message:
            line: dict[str, Any] = json.loads(message[message.index("{") :])
            return line
    raise RuntimeError("the log has no line about the start")


def one_start(environ: dict[str, str]) -> tuple[dict[str, float], dict[str, Any]]:
    """Seconds per part, and the service's own line (start_line)."""
    from starling.client import Client  # their own imports are not installed everywhere
    from starling.local_server import LocalServer

    server = LocalServer(environ=environ)
    began_s = time.time()
    with server:
        ready_s = time.time()
        client = Client(server.url)
        with client.stream(prompt="What is the capital of France?", temperature=0, max_tokens=16) as answer:
            next(iter(answer))
            first_s = time.time()
        client.close()
        line = start_line(server.log)
    seconds = {"server": line["process_began"] - began_s, **line["seconds"]}
    return seconds | {"ready": ready_s - began_s - sum(seconds.values()), "first token": first_s - ready_s}, line


ALONE = """
import json, os, time
from starling.logs import configure
configure()
from starling.request import Request
from starling.service import Service
from starling.settings import Settings
service = Service.load(Settings.from_env(os.environ))
began_s = time.time()
answer = service.generate(Request(prompt="What is the capital of France?", temperature=0, max_tokens=16))
next(iter(answer))
print(json.dumps({"ready": began_s, "first token": time.time() - began_s}))
service.close()
"""


def one_load(environ: dict[str, str]) -> tuple[dict[str, float], dict[str, Any]]:
    """The same for the service without a server."""
    began_s = time.time()
    command = [sys.executable, "-c", ALONE]
    done = subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    end = json.loads(done.stdout.splitlines()[-1])
    line = start_line(done.stderr)
    seconds = {"server": 0.0, **line["seconds"]}
    seconds["imports"] += line["process_began"] - began_s
    ready_s = end["ready"] - began_s - sum(seconds.values())
    return seconds | {"ready": ready_s, "first token": end["first token"]}, line


def copy_of(weights: Path, folder: Path) -> Path:
    """A copy of the checkpoint's own files, without what was derived from them."""
    copy = folder / weights.name
    copy.mkdir()
    for pattern in ("*.json", "*.safetensors"):
        for path in weights.glob(pattern):
            shutil.copy2(path, copy)
    return copy


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.startup", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--weights", type=checkpoint, default=str(LOCK_PATH.parent / "demo"), help="default: the demo")
    parser.add_argument("--rounds", type=count, default=5, help="later starts (default: %(default)s)")
    parser.add_argument("--alone", action="store_true", help="start the service without Cog's server")
    parser.add_argument("--engine", choices=("engine", "reference"), help="default: STARLING_ENGINE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        environ = {"STARLING_WEIGHTS": str(copy_of(options.weights.resolve(), folder)), "HOME": str(folder)}
        environ |= {"STARLING_ENGINE": options.engine} if options.engine else {}
        start = one_load if options.alone else one_start
        first, line = start(environ)
        later = [start(environ)[0] for _ in range(options.rounds)]
    median = {part: statistics.median(each[part] for each in later) for part in first}
    print(f"{options.weights.name}: {line['operations']}, {line['processor']}, torch {line['versions']['torch']}")
    print(f"seconds     first start   later (median of {options.rounds})")
    timed = [part for part in PARTS if part in first]
    for part in timed:
        print(f"{part:11s} {first[part]:11.2f} {median[part]:8.2f}   {PARTS[part]}")
    for name, parts in (("READY", timed[:-1]), ("first token", timed)):
        first_s, later_s = (sum(each[part] for part in parts) for each in (first, median))
        print(f"from nothing to {name}: {first_s:.2f} s the first time, {later_s:.2f} s later")


if __name__ == "__main__":
    main()
