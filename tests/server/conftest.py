"""Cog's real server, in a process of its own, over a service that runs at the tests' pace."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from starling import tokenizer_json
from starling.client import Client
from starling.local_server import LocalServer
from starling.tokenizer import byte_alphabet
from tests.model.tiny import write_checkpoint
from tests.waiting import HANG_S

SLOTS = 8
CONTEXT = 4096  # positions of the tiny model
BOS, END_OF_TURN = 256, 257


def events(log: str) -> list[dict[str, Any]]:
    """Our own lines in a server's log, which may lag behind its answers. Cog wraps each line in its own JSON."""
    whole = log[: log.rfind("\n") + 1].splitlines()
    messages = [json.loads(line)["fields"]["message"] for line in whole if line.startswith("{")]
    return [json.loads(message[message.index("{") :]) for message in messages if '"event": ' in message]


class Echo:
    """A running echo server, its gates and its journal."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = LocalServer(
            environ={"ECHO_FOLDER": str(folder), "COG_MAX_CONCURRENCY": str(SLOTS)},
            predictor="tests/server/echo_predictor.py:Predictor",
        )
        self.server.start(timeout_s=HANG_S)
        self.client = Client(self.server.url, timeout_s=HANG_S)
        self._names = iter(range(10**9))

    def close(self) -> None:
        self.client.close()
        self.server.stop()

    def name(self) -> str:
        """A word that no request has used yet, to name a request in the journal, or a gate."""
        return f"n{next(self._names)}"

    def open(self, gate: str) -> None:
        (self.folder / gate).touch()

    def journal(self, name: str) -> list[tuple[str, int]]:
        """What happened to the request whose first word is `name`: (event, words said by then)."""
        path = self.folder / "journal"
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [(event, int(said)) for event, first, said in lines if first == name]

    def post(
        self, headers: dict[str, str] | None = None, request_id: str | None = None, **inputs: Any
    ) -> httpx.Response:
        """One whole answer as JSON. Retries on a full server, since a slot is freed slightly after its answer."""
        body = {"input": inputs} | ({"id": request_id} if request_id else {})
        return self.retry(
            lambda: httpx.post(f"{self.server.url}/predictions", json=body, headers=headers, timeout=HANG_S)
        )

    def retry(self, ask: Callable[[], httpx.Response]) -> httpx.Response:
        response = ask()
        while response.status_code == httpx.codes.CONFLICT:
            time.sleep(0.01)
            response = ask()
        return response


@pytest.fixture(scope="session")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Echo]:
    """One server shared by all tests that leave it as they found it."""
    echo = Echo(tmp_path_factory.mktemp("echo"))
    yield echo
    echo.close()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights, whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, bos_token_id=BOS, eos_token_id=END_OF_TURN, max_position_embeddings=CONTEXT)
    controls = {"<s>": BOS, "<|end_of_turn|>": END_OF_TURN}
    tokenizer_json.write(tokenizer_json.byte_level(byte_alphabet() | controls, [], controls), folder)
    return folder


@pytest.fixture
def own_echo(tmp_path: Path) -> Iterator[Echo]:
    """A server of the test's own, which it may break."""
    echo = Echo(tmp_path)
    yield echo
    echo.close()


@pytest.fixture
def background() -> Iterator[Callable[..., Any]]:
    """Runs a call on a thread of its own; returns its future."""
    with ThreadPoolExecutor(32) as pool:
        yield pool.submit
