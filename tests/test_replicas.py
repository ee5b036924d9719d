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
from typing import Any

import httpx
import psutil
import pytest
from httpx_sse import EventSource

from predict import METRICS
from starling.client import Answer, AnswerError, Client
from starling.errors import EngineStoppedError, NoRoomError, RequestError
from starling.generation import GenerationResult
from starling.local_server import free_port
from tests.waiting import HANG_S, wait_for

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

    replica = replica_of(replicas, SimpleNamespace(generate=generate))

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


def replica_of(replicas: ModuleType, service: object) -> Any:
    replica = object.__new__(replicas.Replica)
    replica._service, replica._threads = service, ThreadPoolExecutor(1)
    return replica


def test_a_replica_streams_text_and_then_metrics(replicas: ModuleType) -> None:
    class Whole:
        result = GenerationResult("ab", "stop", 3, 2, 0, 0.25, 10.0, seed=7)
        __next__ = iter("ab").__next__

        def cancel(self) -> None: ...

    replica = replica_of(replicas, SimpleNamespace(generate=lambda request: Whole()))
    *chunks, last = collected(replica.stream({"prompt": "x"}))
    assert chunks == [{"chunk": "a"}, {"chunk": "b"}]
    assert set(last["result"]) == set(METRICS) and last["result"]["seed"] == 7
    replica._threads.shutdown()


@pytest.mark.parametrize(
    ("fault", "told", "again"),
    [
        (NoRoomError("too long"), "NoRoomError: too long", False),
        (EngineStoppedError("hung"), "EngineStoppedError: hung", True),
        (KeyError("a secret prompt"), "The server failed on this request (KeyError)", False),
    ],
)
def test_a_replica_says_what_another_could_do_better(
    replicas: ModuleType, fault: Exception, told: str, again: bool
) -> None:
    def generate(request: object) -> None:
        raise fault

    replica = replica_of(replicas, SimpleNamespace(generate=generate))
    (event,) = collected(replica.stream({"prompt": "x"}))
    assert event["error"].startswith(told) and "secret" not in event["error"] and event["again"] == again
    replica._threads.shutdown()


def test_a_replica_whose_engine_hangs_is_unhealthy(replicas: ModuleType) -> None:
    asyncio.run(replica_of(replicas, SimpleNamespace(healthy=True)).check_health())
    with pytest.raises(RuntimeError, match="not making progress"):
        asyncio.run(replica_of(replicas, SimpleNamespace(healthy=False)).check_health())


@pytest.mark.parametrize(
    ("method", "path", "body", "accept", "status", "said"),
    [
        ("GET", "/health-check", b"", "*/*", 200, "READY"),
        ("GET", "/predictions", b"", "*/*", 404, "Use POST"),
        ("POST", "/", b"", "*/*", 404, "Use POST"),
        ("POST", "/predictions", b"{", "*/*", 400, "not JSON"),
        ("POST", "/predictions", b"[]", "*/*", 422, "not of the form"),
        ("POST", "/predictions", b'{"input": {"prompt": "x"}}', "application/json", 200, "succeeded"),
        ("POST", "/predictions", b'{"input": {"prompt": "x"}}', "text/event-stream", 200, "event: completed"),
    ],
)
def test_the_front_answers_as_cogs_server_does(
    replicas: ModuleType, monkeypatch: pytest.MonkeyPatch,
    method: str, path: str, body: bytes, accept: str, status: int, said: str,
) -> None:  # fmt: skip
    async def parts() -> AsyncIterator[bytes]:
        yield body

    monkeypatch.setattr(replicas, "JSONResponse", lambda content, status=200: (status, json.dumps(content)))
    monkeypatch.setattr(replicas, "StreamingResponse", lambda events, media_type: (200, events))
    http = SimpleNamespace(url=SimpleNamespace(path=path), method=method, headers={"accept": accept}, stream=parts)

    async def ask() -> tuple[int, str]:
        code, content = await replicas.Front(Replicas([CHUNK, RESULT]))(http)
        return code, content if isinstance(content, str) else "".join([event async for event in content])

    code, content = asyncio.run(ask())
    assert code == status and said in content


def test_the_rest_of_a_body_that_is_too_long_is_not_read(replicas: ModuleType) -> None:
    taken = 0

    async def parts() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 1 << 20
            yield bytes(1 << 20)

    with pytest.raises(replicas.BodyError, match="longer than 8388608 bytes") as caught:
        asyncio.run(replicas.body_of(SimpleNamespace(stream=parts)))
    assert caught.value.status == 413
    assert taken == replicas.MAX_BODY_BYTES + (1 << 20)


def test_ray_is_told_what_the_options_and_the_environment_say(
    replicas: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployed: dict[str, dict[str, Any]] = {}

    def deployment(served: type, name: str, **options: Any) -> Any:
        deployed[name] = options
        return SimpleNamespace(bind=lambda *_: None)

    ray = SimpleNamespace(deployment=deployment, start=lambda **_: None, run=lambda *_, **__: None)
    monkeypatch.setattr(replicas, "serve", ray)
    monkeypatch.setattr(replicas, "locate_weights", lambda settings: None)
    monkeypatch.setattr(replicas, "signal", SimpleNamespace(signal=lambda *_: None, SIGTERM=0, default_int_handler=0))
    monkeypatch.setattr(sys, "argv", ["replicas", "--min-replicas=0", "--max-replicas=3", "--cores=2", "--gpus=0.5"])
    for slots in (32, 5):  # 32 as in an image, unless the environment says otherwise
        replicas.main()
        assert deployed["starling"]["max_ongoing_requests"] == slots
        scaling = deployed["starling"]["autoscaling_config"]
        assert (scaling["min_replicas"], scaling["max_replicas"], scaling["target_ongoing_requests"]) == (0, 3, slots)
        assert deployed["starling"]["ray_actor_options"] == {"num_cpus": 2, "num_gpus": 0.5}
        monkeypatch.setenv("COG_MAX_CONCURRENCY", "5")


@pytest.mark.parametrize("counts", [(0, 0), (2, 1), (-1, 1)])
def test_a_number_of_replicas_that_cannot_be_is_refused(
    replicas: ModuleType, monkeypatch: pytest.MonkeyPatch, counts: tuple[int, int]
) -> None:
    monkeypatch.setattr(sys, "argv", ["replicas", f"--min-replicas={counts[0]}", f"--max-replicas={counts[1]}"])
    monkeypatch.setattr(replicas, "locate_weights", pytest.fail)
    with pytest.raises(SystemExit):
        replicas.main()


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
