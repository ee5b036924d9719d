"""Answers stream as they are generated, concurrently."""

import re
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
from httpx_sse import connect_sse

from starling.client import AnswerError
from starling.local_server import ROOT
from tests.server.conftest import SLOTS, Echo
from tests.waiting import HANG_S, wait_for


def test_the_readmes_example_runs(echo: Echo, capsys: pytest.CaptureFixture[str]) -> None:
    _, code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    address = "http://localhost:5000"
    assert address in code
    exec(code.replace(address, echo.server.url), {})
    assert capsys.readouterr().out.startswith("Hello, how are you? \nsucceeded: {")


def test_eight_streams_start_before_any_goes_on(echo: Echo, background) -> None:
    """The gate opens only when the client has read the first chunk of every stream. If streams were buffered before
    being sent, or ran one after the other, none would ever get past it."""
    gate = echo.name()
    order: list[tuple[int, str]] = []
    firsts = threading.Semaphore(0)

    def read(stream: int) -> str:
        with echo.client.stream(prompt=f"first gate:{gate} second third") as answer:
            chunks = []
            for chunk in answer:
                order.append((stream, chunk))
                chunks.append(chunk)
                if len(chunks) == 1:
                    firsts.release()
            return "".join(chunks)

    texts = [background(read, stream) for stream in range(SLOTS)]
    for _ in range(SLOTS):
        assert firsts.acquire(timeout=HANG_S)
    echo.open(gate)
    assert [text.result() for text in texts] == ["first second third "] * SLOTS
    assert sorted(order[:SLOTS]) == [(stream, "first ") for stream in range(SLOTS)]


def test_the_events_of_a_stream(echo: Echo) -> None:
    with (
        httpx.Client(timeout=HANG_S) as http,
        connect_sse(
            http, "POST", f"{echo.server.url}/predictions", json={"input": {"prompt": "a b c", "seed": 0}}
        ) as sse,
    ):
        events = [(event.event, event.json()) for event in sse.iter_sse()]
    kinds = [kind for kind, _ in events]
    assert kinds[0] == "start"
    assert kinds[-1] == "completed"
    assert [data for kind, data in events if kind == "output"] == [
        {"chunk": f"{word} ", "index": index} for index, word in enumerate("abc")
    ]
    metrics = {
        "input_token_count": 3,
        "output_token_count": 3,
        "cached_token_count": 0,
        "time_to_first_token": 0.25,
        "tokens_per_second": 10.0,
        "finish_reason": "stop",
        "seed": 0,
    }
    assert {data["name"]: data["value"] for kind, data in events if kind == "metric"} == metrics
    completed = events[-1][1]
    assert completed["status"] == "succeeded"
    assert completed["output"] == ["a ", "b ", "c "]
    assert completed["metrics"].items() >= metrics.items()


def test_each_answer_has_its_own_metrics(echo: Echo, background) -> None:
    """They are recorded on coglet's threads, while other predictions begin and end."""

    def ask(number: int) -> dict[str, object]:
        with echo.client.stream(prompt=f"a gate:{gate}" + " b" * number, seed=number) as answer:
            for _ in answer:
                begun.release()
        return answer.metrics

    for _ in range(5):
        gate, begun = echo.name(), threading.Semaphore(0)
        asked = [background(ask, number) for number in range(SLOTS)]
        for _ in range(SLOTS):
            assert begun.acquire(timeout=HANG_S)
        echo.open(gate)
        for number, metrics in enumerate(asked):
            assert metrics.result().items() >= {"seed": number, "output_token_count": 1 + number}.items()


def test_the_whole_answer_as_json(echo: Echo) -> None:
    answer = echo.post(prompt="a b").json()
    assert answer["status"] == "succeeded"
    assert answer["output"] == ["a ", "b "]
    assert answer["metrics"]["finish_reason"] == "stop"


def test_one_more_than_the_slots_is_refused_at_once(echo: Echo, background, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client then retries for a while."""
    gate = echo.name()
    names = [echo.name() for _ in range(SLOTS)]
    held = [background(echo.post, prompt=f"{name} gate:{gate}") for name in names]
    wait_for(lambda: all(echo.journal(name) for name in names))
    refused = httpx.post(f"{echo.server.url}/predictions", json={"input": {"prompt": "late"}}, timeout=HANG_S)
    assert refused.status_code == httpx.codes.CONFLICT
    assert "capacity" in refused.json()["error"]

    def asked_again(after_s: float) -> None:
        echo.open(gate)  # a slot will soon be free
        time.sleep(after_s)

    monkeypatch.setattr("starling.client.BUSY_RETRY_S", -1.0)
    with pytest.raises(AnswerError, match=r"^409 .*capacity"), echo.client.stream(prompt="late"):
        pass
    monkeypatch.setattr("starling.client.BUSY_RETRY_S", HANG_S)
    monkeypatch.setattr("starling.client.time", SimpleNamespace(monotonic=time.monotonic, sleep=asked_again))
    with echo.client.stream(prompt="late") as answer:
        assert list(answer) == ["late "]
    assert [answer.result().json()["status"] for answer in held] == ["succeeded"] * SLOTS
    assert echo.post(prompt="again").json()["output"] == ["again "]
