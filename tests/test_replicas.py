"""Two replicas on Ray Serve: one is killed, and no request that had not begun to stream is lost.

These are slow, and Ray is installed by nothing else:
    pip install -r requirements-replicas.txt
    pytest -m slow tests/test_replicas.py
"""

import asyncio
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest

from starling.client import AnswerError, Client
from starling.local_server import free_port
from tests.waiting import HANG_S, wait_for

if TYPE_CHECKING:
    from starling.replicas import Event

ROOT = Path(__file__).parent.parent
SLOTS = 2
FRANCE = "What is the capital of France?"


class Cluster:
    """`python -m starling.replicas` with two replicas, in a process of its own."""

    def __init__(self, weights: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        environ = {"STARLING_WEIGHTS": str(weights), "COG_MAX_CONCURRENCY": str(SLOTS), "STARLING_THREADS": "1"}
        environ |= {"STARLING_KV_CACHE_BYTES": str(200 << 20), "RAY_USAGE_STATS_ENABLED": "0"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "starling.replicas", "--least=2", "--most=2", "--cores=0.5", f"--port={self.port}"],
            env=os.environ | environ,
            cwd=ROOT,
            start_new_session=True,
        )
        self.client = Client(self.url, HANG_S)
        wait_for(self.ready)

    def ready(self) -> bool:
        assert self.process.poll() is None
        try:
            return httpx.get(f"{self.url}/health-check").is_success and len(self.replicas()) == 2
        except httpx.TransportError:
            return False

    def replicas(self) -> list[psutil.Process]:
        """The processes of the replicas that hold a model."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                name = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if "Replica:default:starling" in name:
                found.append(process)
        return found

    def ask(self, **inputs: Any) -> str:
        with self.client.stream(**{"prompt": FRANCE, "temperature": 0, **inputs}) as answer:
            return "".join(answer)

    def close(self) -> None:
        self.client.close()
        started = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGINT)
        self.process.wait(HANG_S)
        for process in psutil.wait_procs(started, timeout=10)[1]:  # Ray leaves none, unless it was cut off
            process.kill()


def on_ray(test: Callable[..., None]) -> Callable[..., None]:
    missing = importlib.util.find_spec("ray") is None
    return pytest.mark.slow(pytest.mark.skipif(missing, reason="needs ray[serve], of requirements-replicas.txt")(test))


def test_without_ray_its_installation_is_told() -> None:
    hidden = "import runpy, sys; sys.modules['ray'] = None; runpy.run_module('starling.replicas', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", hidden], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("ray is not installed") and len(done.stderr.splitlines()) == 1
    assert "pip install -r requirements-replicas.txt" in done.stderr


@pytest.fixture(scope="module")
def cluster(demo_folder: Path) -> Iterator[Cluster]:
    cluster = Cluster(demo_folder)
    yield cluster
    cluster.close()


@on_ray
def test_an_answer_streams_and_comes_whole(cluster: Cluster) -> None:
    with cluster.client.stream(prompt=FRANCE, temperature=0) as answer:
        chunks = list(answer)
    assert "".join(chunks) == "The capital of France is Paris." and len(chunks) > 1
    assert answer.metrics["output_token_count"] == 7
    body = {"input": {"prompt": FRANCE, "temperature": 0}}
    whole = httpx.post(f"{cluster.url}/predictions", json=body, timeout=HANG_S).json()
    assert (whole["status"], "".join(whole["output"])) == ("succeeded", "".join(chunks))


@on_ray
@pytest.mark.parametrize(
    ("content", "status", "fault"),
    [
        (b"{", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b"[]", 422, "not of the form"),
        (b'{"input": 1}', 422, "no object"),
        (json.dumps({"input": {"prompt": ""}}).encode(), 422, "neither"),
        (json.dumps({"input": {"prompt": "a" * (4 << 20)}}).encode(), 413, "longer than 4194304 bytes"),
    ],
    ids=["cut off", "deep", "list", "number", "nothing to answer", "too long"],
)
def test_what_cannot_run_is_refused(cluster: Cluster, content: bytes, status: int, fault: str) -> None:
    answer = httpx.post(f"{cluster.url}/predictions", content=content)
    assert answer.status_code == status
    assert fault in answer.text


@on_ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's, as it is imported
def test_of_a_body_that_is_too_long_the_rest_is_not_read() -> None:
    from starlette.requests import Request

    from starling.replicas import MAX_BODY_BYTES, BodyError, body_of

    taken = 0

    async def receive() -> dict[str, Any]:
        nonlocal taken
        taken += 1 << 20
        return {"type": "http.request", "body": bytes(1 << 20), "more_body": True}

    with pytest.raises(BodyError):
        asyncio.run(body_of(Request({"type": "http"}, receive)))
    assert taken == MAX_BODY_BYTES + (1 << 20)


@on_ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fault_of_our_own_ends_its_request_with_an_error() -> None:
    from starling.replicas import Replica

    class Broken(Replica):
        def __init__(self) -> None:
            self._service = SimpleNamespace(generate=lambda request: {}["a secret prompt"])  # type: ignore[assignment]
            self._threads = ThreadPoolExecutor(1)

    async def events() -> list["Event"]:
        return [event async for event in Broken().stream({"prompt": "a"})]

    (event,) = asyncio.run(events())
    assert "KeyError" in event["error"] and "secret" not in event["error"] and not event["again"]


@on_ray
def test_a_killed_replica_loses_nothing_that_had_not_begun(cluster: Cluster) -> None:
    """More requests than both replicas take: some stream, some wait. One replica is killed in the midst of it."""
    begun: list[int] = []

    def ask(number: int) -> str:
        chunks: list[str] = []
        try:
            with cluster.client.stream(prompt=FRANCE, temperature=0, min_tokens=150, max_tokens=150) as answer:
                for chunk in answer:
                    chunks.append(chunk)
                    if len(chunks) == 1:
                        begun.append(number)
        except AnswerError:
            return "cut" if chunks else "lost"
        return "whole"

    with ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(ask, number) for number in range(12)]
        wait_for(lambda: len(begun) >= 2 * SLOTS)
        cluster.replicas()[0].kill()
        outcomes = [answer.result() for answer in answers]
    assert "lost" not in outcomes
    assert outcomes.count("cut") <= SLOTS  # those that the dead one was streaming
    assert outcomes.count("whole") >= 12 - SLOTS
    wait_for(cluster.ready)  # Ray puts another in its place
    assert cluster.ask() == "The capital of France is Paris."
