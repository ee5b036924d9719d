"""A thousand random requests, some cancelled, some left by their caller: nothing lost, nothing hung, nothing kept."""

import asyncio
import json
import random
import re
from collections.abc import Iterator

import psutil
import pytest

from bench.load import load
from starling import tokenizer_json
from starling.client import Client
from starling.local_server import LocalServer
from starling.tokenizer import byte_alphabet
from tests.model.tiny import write_checkpoint
from tests.server.conftest import HANG_S

CONCURRENCY = 32
BOS, END_OF_TURN = 256, 257
SPARE_BYTES = 48 << 20  # what an allocator may keep


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, bos_token_id=BOS, eos_token_id=END_OF_TURN, max_position_embeddings=4096)
    controls = {"<s>": BOS, "<|end_of_turn|>": END_OF_TURN}
    tokenizer_json.write(tokenizer_json.byte_level(byte_alphabet() | controls, [], controls), folder)
    environ = {
        "STARLING_WEIGHTS": str(folder),
        "STARLING_DEVICE": "cpu",
        "COG_MAX_CONCURRENCY": str(CONCURRENCY),
        # Too small for 32 long requests at once, so that some are paused.
        "STARLING_KV_CACHE_BYTES": str(24 << 20),
    }
    with LocalServer(environ=environ) as server:
        yield server


def resident_bytes(server: LocalServer) -> int:
    assert server.process is not None
    family = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    return sum(process.memory_info().rss for process in family)


def journal(server: LocalServer) -> list[dict[str, object]]:
    """The lines that the server wrote of finished requests."""
    lines = (json.loads(line) for line in server.log.splitlines() if line.startswith("{"))
    texts = (line.get("fields", {}).get("message", "") for line in lines)
    found = [match[0] for text in texts if (match := re.search(r'\{"event": "request".*\}', text))]
    return [json.loads(text) for text in found] or [
        json.loads(m[0]) for m in re.finditer(r'\{"event": "request".*?\}', server.log)
    ]


def test_a_thousand_requests_leave_nothing_behind(server: LocalServer) -> None:
    seed = random.SystemRandom().randrange(2**32)

    def batch(requests: int, seed: int) -> None:
        tally = asyncio.run(load(server.url, requests, CONCURRENCY, max_tokens=48, seed=seed, abuse=0.3))
        assert tally.failures == [], f"seed {seed}"
        assert sum(tally.outcomes.values()) == requests, f"seed {seed}"
        assert {"succeeded", "canceled", "left"} <= set(tally.outcomes), f"seed {seed}"

    batch(400, seed)
    before = resident_bytes(server)
    batch(600, seed + 1)
    assert resident_bytes(server) < before + SPARE_BYTES, f"seed {seed}"

    client = Client(server.url, HANG_S)
    with client.stream(prompt="last", max_tokens=2) as answer:
        assert "".join(answer) is not None
    client.close()
    assert server.health()["status"] == "READY"
    lines = journal(server)
    # A caller that leaves before its request has begun leaves no line; the warm-up leaves one.
    assert 700 <= len(lines) <= 1002
    assert lines[-1]["kv_blocks_free"] == lines[-1]["kv_blocks"], f"seed {seed}"
    assert (lines[-1]["running"], lines[-1]["waiting"]) == (0, 0), f"seed {seed}"
