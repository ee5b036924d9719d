"""A thousand random requests, some cancelled, some abandoned: nothing lost, nothing hung, nothing kept."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench.load import load
from starling.client import Client
from starling.local_server import LocalServer
from tests.server.conftest import events
from tests.waiting import HANG_S, wait_for

CONCURRENCY = 32
SPARE_BYTES = 48 << 20  # what an allocator may keep


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[LocalServer]:
    environ = {
        "STARLING_WEIGHTS": str(tiny_folder),
        "STARLING_DEVICE": "cpu",
        "COG_MAX_CONCURRENCY": str(CONCURRENCY),
        # Too small for 32 long requests at once, so that some are preempted.
        "STARLING_KV_CACHE_BYTES": str(24 << 20),
    }
    with LocalServer(environ=environ) as server:
        yield server


def private_bytes(server: LocalServer) -> int:
    """Memory without mapped files, whose pages the system drops and reads again as it likes."""
    assert server.process is not None
    family = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    return sum(info.rss - info.shared for info in (process.memory_info() for process in family))


def journal(server: LocalServer) -> list[dict[str, Any]]:
    """The server's log lines about finished requests."""
    return [line for line in events(server.log) if line["event"] == "request"]


def idle(line: dict[str, Any]) -> bool:
    return line["kv_blocks_free"] == line["kv_blocks"] and line["running"] == line["waiting"] == 0


def test_a_thousand_requests_leave_nothing_behind(server: LocalServer) -> None:
    seed = random.SystemRandom().randrange(2**32)

    def batch(requests: int, seed: int) -> None:
        tally = asyncio.run(load(server.url, requests, CONCURRENCY, max_tokens=48, seed=seed, abuse=0.3))
        assert tally.failures == [], f"seed {seed}"
        assert sum(tally.outcomes.values()) == requests, f"seed {seed}"
        assert {"succeeded", "canceled", "disconnected"} <= set(tally.outcomes), f"seed {seed}"

    batch(400, seed)
    before = private_bytes(server)
    batch(600, seed + 1)
    assert private_bytes(server) < before + SPARE_BYTES, f"seed {seed}"

    client, asked = Client(server.url, HANG_S), 0

    def settled() -> bool:
        """Whether one more request found nothing else running: one whose caller has left may end a moment later."""
        nonlocal asked
        asked += 1
        with client.stream(prompt="last", max_tokens=2) as answer:
            assert "".join(answer) is not None
        return idle(journal(server)[-1])

    wait_for(settled)
    client.close()
    assert server.health()["status"] == "READY"
    # A request whose caller leaves before it has begun writes no line; the warm-up writes one.
    assert 700 <= len(journal(server)) <= 1001 + asked
