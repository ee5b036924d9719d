"""End to end, from HTTP to a model's steps and back, with a tiny random checkpoint."""

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from starling.client import AnswerError, Client
from starling.local_server import LocalServer
from starling.request import Request
from starling.service import Service
from starling.settings import Settings
from tests.cuda.emulated_gpu import is_emulated
from tests.server.conftest import CONTEXT, SLOTS
from tests.waiting import HANG_S, wait_for


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def environment(request: pytest.FixtureRequest) -> dict[str, str]:
    return {"STARLING_DEVICE": request.param, "COG_MAX_CONCURRENCY": str(SLOTS)}


@pytest.fixture(scope="module")
def server(environment: dict[str, str], tiny_folder: Path) -> Iterator[LocalServer]:
    with LocalServer(environ=environment | {"STARLING_WEIGHTS": str(tiny_folder)}) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: LocalServer) -> Iterator[Client]:
    client = Client(server.url, HANG_S)
    yield client
    client.close()


@pytest.fixture(scope="module")
def service(environment: dict[str, str], tiny_folder: Path) -> Iterator[Service]:
    """The same model in this process."""
    service = Service.from_folder(tiny_folder, Settings.from_env(environment))
    yield service
    service.close()


def ask(client: Client, **inputs: Any) -> tuple[str, dict[str, Any]]:
    with client.stream(**inputs) as answer:
        return "".join(answer), answer.metrics


REQUESTS: list[dict[str, Any]] = [
    {"prompt": f"Tell me {n}.", "max_tokens": 20 + 10 * n, "seed": n, "temperature": 0.5 * (n % 3)}
    for n in range(SLOTS)
]


def test_concurrent_streams_say_what_each_says_alone(client: Client, service: Service, background: Any) -> None:
    answers = [background(ask, client, **request) for request in REQUESTS]
    for request, answer in zip(REQUESTS, answers, strict=True):
        text, metrics = answer.result()
        alone = service.answer(Request.parse(**request))
        assert text == alone.text
        for name in ("input_token_count", "output_token_count", "finish_reason", "seed"):
            assert metrics[name] == getattr(alone, name)


def test_eight_answers_are_under_way_at_a_time_and_cancelling_ends_each(client: Client, background: Any) -> None:
    """Each is cancelled once all have begun: had any two run one after the other, the first would have succeeded."""
    begun = threading.Barrier(SLOTS, timeout=HANG_S)
    long = CONTEXT - 100

    def start_then_cancel(number: int) -> str:
        with client.stream(prompt=str(number), min_tokens=long, max_tokens=long) as answer:
            chunks = iter(answer)
            next(chunks)
            begun.wait()
            assert client.cancel(answer.id)
            assert len("".join(chunks)) < long
        return answer.status

    for _ in range(2):  # the slots and blocks of the first round serve the second
        streams = [background(start_then_cancel, number) for number in range(SLOTS)]
        assert [stream.result() for stream in streams] == ["canceled"] * SLOTS
    assert ask(client, prompt="again", max_tokens=3)[1]["output_token_count"] <= 3


def test_a_conversation_finds_its_beginning_in_the_cache(client: Client) -> None:
    first = "x" * 200
    said, _ = ask(client, prompt=first, max_tokens=20, seed=1)
    messages = [{"role": "user", "content": first}, {"role": "assistant", "content": said}]
    _, metrics = ask(client, prompt="y", messages=messages, max_tokens=5)
    assert 200 <= metrics["cached_token_count"] < metrics["input_token_count"]


def test_an_answer_follows_a_regular_expression(client: Client) -> None:
    text, metrics = ask(client, prompt="a", regex="[ab]{5}", max_tokens=50)
    assert re.fullmatch("[ab]{5}", text)
    assert metrics["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("inputs", "kind", "fault"),
    [
        ({"prompt": "a" * CONTEXT}, "NoRoomError", r"\b4096\b"),
        ({"prompt": "a", "max_tokens": CONTEXT}, "NoRoomError", r"\b4096\b"),
        ({"prompt": "a", "regex": "[ab"}, "RequestError", "^regex"),
        ({"prompt": "a", "json_schema": "{"}, "RequestError", "^json_schema"),
    ],
)
def test_what_the_model_cannot_do_is_refused(client: Client, inputs: dict[str, Any], kind: str, fault: str) -> None:
    with pytest.raises(AnswerError, match=fault) as caught:
        ask(client, **inputs)
    assert caught.value.kind == kind
    assert ask(client, prompt="a", max_tokens=2)


def test_prompts_are_never_logged(server: LocalServer, client: Client) -> None:
    secret = "Rumpelstilzchen"
    ask(client, prompt=secret, system_prompt=secret, max_tokens=5)
    for refused in ({"prompt": secret * CONTEXT}, {"prompt": secret, "stop_sequences": "[1]"}):
        with pytest.raises(AnswerError):
            ask(client, **refused)
    assert secret not in server.log


@pytest.mark.gpu
@pytest.mark.skipif(not is_emulated(), reason="needs the emulated GPU, which can be lost")
def test_a_lost_gpu_ends_what_it_ran_and_is_reported(tiny_folder: Path) -> None:
    lost = {"EMULATED_GPU_LOST_AFTER": "30", "STARLING_DEVICE": "cuda", "STARLING_WEIGHTS": str(tiny_folder)}
    with LocalServer(environ=lost) as server:
        client = Client(server.url, HANG_S)
        for _ in range(2):
            with pytest.raises(AnswerError, match=r"Restart the container\.") as caught:
                ask(client, prompt="a", min_tokens=100, max_tokens=100)
            assert caught.value.kind == "EngineStoppedError"
        client.close()
        wait_for(lambda: server.health().get("status") == "UNHEALTHY")
        assert "The device is lost" in server.log
