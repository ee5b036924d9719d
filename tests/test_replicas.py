"""What replicas do themselves, without Ray; then two of them on Ray Serve: one is killed, and no request is lost that
had not begun to stream.

The latter tests are slow, and nothing else installs Ray:
    pip install -r requirements-replicas.txt
    pytest -m slow tests/test_replicas.py
"""

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest
from httpx_sse import EventSource

from starling.client import Answer, AnswerError, Client
from starling.errors import RequestError
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
            [
                sys.executable,
                "-m",
                "starling.replicas",
                "--min-replicas=2",
                "--max-replicas=2",
                "--cores=0.5",
                f"--port={self.port}",
            ],
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


def test_without_ray_it_says_how_to_install_it() -> None:
    hidden = "import runpy, sys; sys.modules['ray'] = None; runpy.run_module('starling.replicas', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", hidden], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("ray is not installed") and len(done.stderr.splitlines()) == 1
    assert "pip install -r requirements-replicas.txt" in done.stderr


RAY = {
    "ray": ("serve",),
    "ray.serve": (),
    "ray.exceptions": ("RayActorError",),
    "ray.serve.exceptions": ("DeploymentUnavailableError",),
    "ray.serve.handle": ("DeploymentHandle",),
    "starlette": (),
    "starlette.requests": ("Request",),
    "starlette.responses": ("JSONResponse", "Response", "StreamingResponse"),
}


@pytest.fixture
def replicas(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """starling.replicas where Ray is not installed: it finds only Ray's names, and the tests supply the behaviour."""
    for name, members in RAY.items():
        module = ModuleType(name)
        vars(module).update({member: type(member, (Exception,), {"Application": None}) for member in members})
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "starling.replicas", raising=False)
    module = importlib.import_module("starling.replicas")
    monkeypatch.setattr(module, "RETRY_PAUSE_S", 0)
    yield module
    del sys.modules["starling.replicas"]


class Replicas:
    """A front's replicas: each request gets the next of `scripts`, whose errors are raised and events yielded."""

    def __init__(self, *scripts: list[Any]) -> None:
        self.asked = 0
        self._scripts = scripts

    def options(self, method_name: str, stream: bool) -> "Replicas":
        return self

    async def remote(self, fields: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        self.asked += 1
        for event in self._scripts[min(self.asked, len(self._scripts)) - 1]:
            if isinstance(event, Exception):
                raise event
            yield event


CHUNK, RESULT = {"chunk": "a"}, {"result": {"seed": 7}}
FULL, OURS = {"error": "EngineError: full", "again": True}, {"error": "RequestError: no", "again": False}
DIED = {"error": "The replica died while it answered. Ask again.", "again": False}


@pytest.mark.parametrize("how", ["RayActorError", "DeploymentUnavailableError", "again"])
def test_a_request_restarts_elsewhere_until_its_text_has_begun(replicas: ModuleType, how: str) -> None:
    fault = FULL if how == "again" else getattr(replicas, how)()
    told = FULL if how == "again" else DIED
    for scripts, asked, events in (
        ([[CHUNK, RESULT]], 1, [CHUNK, RESULT]),
        ([[OURS], [CHUNK, RESULT]], 1, [OURS]),
        ([[fault], [fault], [CHUNK, CHUNK, RESULT]], 3, [CHUNK, CHUNK, RESULT]),
        ([[CHUNK, fault], [CHUNK, RESULT]], 1, [CHUNK, told]),
        ([[fault]], replicas.ATTEMPTS, [told]),
    ):
        handle = Replicas(*scripts)
        assert collected(replicas.Front(handle)._answer({})) == events
        assert handle.asked == asked


def collected(events: AsyncIterator[Any]) -> list[Any]:
    async def collect() -> list[Any]:
        return [event async for event in events]

    return asyncio.run(collect())


def test_events_and_the_whole_answer_are_as_cogs_server_sends_them(replicas: ModuleType) -> None:
    for script, status, metrics, error in (
        ([CHUNK, CHUNK, RESULT], "succeeded", {"seed": 7}, None),
        ([CHUNK, CHUNK, OURS], "failed", {}, "RequestError: no"),
    ):
        answer = asyncio.run(replicas.as_one("i", Replicas(script).remote({})))
        wanted = {"id": "i", "output": ["a", "a"], "status": status, "error": error, "metrics": metrics}
        assert answer == wanted
        sent = collected(replicas.as_sent_events("i", Replicas(script).remote({})))
        with httpx.Client(transport=httpx.MockTransport(lambda _, sent=sent: streamed(sent))) as http:
            source = EventSource(http.get("http://replicas"))
            streaming = Answer(source)
            with contextlib.nullcontext() if error is None else pytest.raises(AnswerError) as caught:
                assert list(streaming) == ["a", "a"]
        assert error is None or f"{caught.value.kind}: {caught.value}" == error
        assert (streaming.id, streaming.status, streaming.metrics) == ("i", status, metrics)


def streamed(sent: list[str]) -> httpx.Response:
    return httpx.Response(200, text="".join(sent), headers={"Content-Type": "text/event-stream"})


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not of the form"),
        (b'{"input": 1}', "not an object"),
        (b'{"input": {"prompt": "a", "top_p": 2}}', "top_p is 2"),
    ],
)
def test_a_body_is_checked_before_a_replica_is_asked(replicas: ModuleType, body: bytes, fault: str) -> None:
    with pytest.raises(RequestError, match=fault):
        replicas.fields_of(body)
    fields = replicas.fields_of(b'{"input": {"prompt": "a", "colour": "red", "max_new_tokens": 3}}')
    assert fields == {"prompt": "a", "max_new_tokens": 3}


@pytest.mark.parametrize("begun", [False, True])
def test_a_caller_that_leaves_stops_the_generation(replicas: ModuleType, begun: bool) -> None:
    """Even while the answer is still being started on a thread of its own, which takes a while."""
    started, cancelled = threading.Event(), threading.Event()

    class Endless:
        cancel = cancelled.set

        def __next__(self) -> str:
            return "a"

    def generate(request: object) -> Endless:
        assert begun or started.wait(HANG_S)
        return Endless()

    replica = object.__new__(replicas.Replica)
    replica._service = SimpleNamespace(generate=generate)
    replica._threads = ThreadPoolExecutor(1)

    async def leave() -> None:
        events = replica.stream({"prompt": "a"})
        first = asyncio.ensure_future(anext(events))
        if begun:
            assert await first == CHUNK
            await events.aclose()
        else:
            await asyncio.sleep(0)
            first.cancel()
            await asyncio.wait([first])

    asyncio.run(leave())
    started.set()
    assert cancelled.wait(HANG_S)
    replica._threads.shutdown()


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
        (b'{"input": 1}', 422, "not an object"),
        (json.dumps({"input": {"prompt": ""}}).encode(), 422, "neither"),
        (json.dumps({"input": {"prompt": "a" * (8 << 20)}}).encode(), 413, "longer than 8388608 bytes"),
    ],
    ids=["cut off", "deep", "list", "number", "nothing to answer", "too long"],
)
def test_what_cannot_run_is_refused(cluster: Cluster, content: bytes, status: int, fault: str) -> None:
    answer = httpx.post(f"{cluster.url}/predictions", content=content)
    assert answer.status_code == status
    assert fault in answer.text


@on_ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from importing Ray
def test_the_rest_of_a_body_that_is_too_long_is_not_read() -> None:
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
def test_an_error_of_our_own_ends_its_request_with_an_error() -> None:
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
def test_a_killed_replica_loses_no_request_that_had_not_begun(cluster: Cluster) -> None:
    """More requests than both replicas take: some stream, some wait. Meanwhile one replica is killed."""
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
