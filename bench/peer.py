"""Another engine to compare ours with, in a process of its own."""

import json
import subprocess
from pathlib import Path
from typing import Any


class Peer:
    """Another engine, loaded by peers.py in its own process and waiting for questions."""

    def __init__(self, engine: str, python: Path, model: Path, threads: int, longest: int) -> None:
        """`longest`: the most tokens of context that `ask` will name."""
        script = Path(__file__).parent / "peers.py"
        self._process = subprocess.Popen(
            [str(python), str(script), engine, str(model), str(threads), str(longest)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.name = engine
        self.version = self._answer()

    def ask(self, *question: object) -> Any:
        assert self._process.stdin
        self._process.stdin.write(" ".join(map(str, question)) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with status {self._process.wait()}; its message is above.")
        return json.loads(line)

    def close(self) -> None:
        self._process.communicate()
