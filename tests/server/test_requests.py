"""What is accepted and refused, case by case, and that a failing request does not affect the others."""

import asyncio
import json
import math
import shutil
from typing import Any

import httpx
import pytest

from bench.load import load
from starling.client import AnswerError, Client
from starling.coglet import FOLDERS
from tests.server.conftest import Echo
from tests.waiting import HANG_S, wait_for


@pytest.mark.parametrize(
    ("inputs", "field", "fault"),
    [
        ({"prompt": 1}, "prompt", 'is not of type "string"'),
        ({"prompt": "a", "max_tokens": "many"}, "max_tokens", 'is not of type "integer"'),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens", 'is not of type "integer"'),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "less than the minimum of 1"),
        ({"prompt": "a", "max_tokens": 8193}, "max_tokens", "greater than the maximum of 8192"),
        ({"prompt": "a", "temperature": -0.1}, "temperature", "less than the minimum"),
        ({"prompt": "a", "seed": -1}, "seed", "less than the minimum of 0"),
        ({"prompt": "a", "mode": "poem"}, "mode", "is not one of"),
        ({"prompt": "a", "messages": "hello"}, "messages", 'is not of type "array"'),
        ({"prompt": "a", "messages": ["hello"]}, "messages/0", 'is not of type "object"'),
        ({"prompt": "a", "seed": None}, "seed", 'is not of type "integer"'),
        ({"prompt": "a", "json_schema": None}, "json_schema", 'is not of type "string"'),
    ],
)
def test_what_does_not_fit_the_form_is_refused(echo: Echo, inputs: dict[str, Any], field: str, fault: str) -> None:
    response = echo.post(**inputs)
    assert response.status_code == httpx.codes.UNPROCESSABLE_ENTITY
    [detail] = response.json()["detail"]
    assert detail["loc"] == ["body", "input", field]
    assert fault in detail["msg"]


@pytest.mark.parametrize(
    "body",
    [b'{"input": {"prompt": "a"', b'{"input": {"prompt": "a", "top_p": NaN}}', b'{"input": {"prompt": "\\ud800"}}'],
    ids=["cut off", "NaN", "lone surrogate"],
)
def test_what_is_not_json_is_refused(echo: Echo, body: bytes) -> None:
    response = httpx.post(
        f"{echo.server.url}/predictions", content=body, headers={"Content-Type": "application/json"}, timeout=HANG_S
    )
    assert response.status_code == httpx.codes.BAD_REQUEST


@pytest.mark.parametrize("inputs", [{"prompt": "a", "top_p": math.nan}, {"prompt": "\ud800"}])
def test_the_client_sends_nothing_that_is_not_json(echo: Echo, inputs: dict[str, Any]) -> None:
    with (
        pytest.raises(AnswerError, match=r"cannot be sent \(.*text must be valid Unicode, and numbers finite"),
        echo.client.stream(**inputs),
    ):
        pass


def test_the_client_reports_what_the_server_finds_wrong_with_each_input(echo: Echo) -> None:
    both = r"^422 (?=.*max_tokens: 0 .*minimum)(?=.*seed: -1 .*minimum)"
    with pytest.raises(AnswerError, match=both) as error, echo.client.stream(prompt="a", max_tokens=0, seed=-1):
        pass
    assert "{" not in str(error.value)


def test_a_body_over_100_mib_is_refused(echo: Echo) -> None:
    body = json.dumps({"input": {"prompt": "a" * (100 << 20)}}).encode()
    try:
        response = httpx.post(
            f"{echo.server.url}/predictions", content=body, headers={"Content-Type": "application/json"}, timeout=HANG_S
        )
    except httpx.WriteError:
        return  # the server answered and closed before all of it was sent
    assert response.status_code == httpx.codes.REQUEST_ENTITY_TOO_LARGE


@pytest.mark.parametrize(
    ("inputs", "output"),
    [
        ({"prompt": "a b", "colour": "red"}, ["a ", "b "]),
        ({"prompt": "a b", "max_tokens": 3.0, "seed": 0.0, "max_new_tokens": 3.0}, ["a ", "b "]),
        ({"prompt": "a\0b"}, ["a\0b "]),
        ({"prompt": "ü 🐦"}, ["ü ", "🐦 "]),
        ({"prompt": "a", "prompt_template": "", "json_schema": "", "regex": ""}, ["a "]),
    ],
    ids=["unknown field", "whole floats for integers", "NUL", "beyond ASCII", "blank texts"],
)
def test_what_is_accepted(echo: Echo, inputs: dict[str, Any], output: list[str]) -> None:
    answer = echo.post(**inputs).json()
    assert (answer["status"], answer["output"]) == ("succeeded", output)


@pytest.mark.parametrize(
    ("inputs", "fault"),
    [
        ({}, "neither prompt nor messages is given. Give a prompt, or messages that end with a user turn"),
        ({"prompt": "a" * (7 << 20)}, "hold 7340032 bytes together; at most 1048576 are accepted. Shorten them"),
        ({"prompt": "a", "min_tokens": 9, "max_tokens": 8}, "min_tokens is 9, above max_tokens 8. Lower it, or raise"),
        (
            {"prompt": "a", "max_tokens": 9, "max_new_tokens": 8},
            "max_tokens is 9 and max_new_tokens, its old name, is 8",
        ),
        ({"prompt": "a", "messages": [{"cancelled": "x"}]}, "messages.0.cancelled"),
        ({"prompt": "fail:request"}, "RequestError: max_tokens is 9, and the word cancelled stands here. Lower it"),
    ],
    ids=["nothing asked", "too long", "contradiction", "two names", "the word cancelled in a name", "from the service"],
)
def test_a_request_that_makes_no_sense_is_told_why(echo: Echo, inputs: dict[str, Any], fault: str) -> None:
    response = echo.post(**inputs)
    answer = response.json()
    assert (response.status_code, answer["status"]) == (httpx.codes.OK, "failed")
    assert "RequestError: " in answer["error"]
    assert fault in answer["error"]
    assert "Traceback" not in answer["logs"]


def test_a_fault_of_the_server_is_reported_in_short_and_logged_in_full(echo: Echo) -> None:
    answer = echo.post(prompt="a fail:surprise").json()
    assert answer["status"] == "failed"
    assert "EngineError: The server failed on this request (KeyError). Its log has the traceback" in answer["error"]
    assert "a surprise" not in answer["error"]
    assert answer["logs"] == ""
    wait_for(lambda: "KeyError: 'a surprise'" in echo.server.log)
    assert "Traceback (most recent call last)" in echo.server.log

    answer = echo.post(prompt="a fail:engine").json()
    assert answer["status"] == "failed"
    assert "EngineError: the engine is out of luck" in answer["error"]


def test_a_failing_request_leaves_the_others_and_the_server_alone(echo: Echo, background) -> None:
    gate, name = echo.name(), echo.name()
    kept = background(echo.post, prompt=f"{name} gate:{gate} end")
    wait_for(lambda: ("said", 1) in echo.journal(name))
    for inputs in ({"prompt": "a fail:surprise"}, {"prompt": "fail:request"}, {"prompt": "a", "top_p": 2}, {}):
        assert echo.post(**inputs).json().get("status") != "succeeded"
    echo.open(gate)
    assert kept.result().json()["output"] == [f"{name} ", "end "]
    assert echo.server.health()["status"] == "READY"


def test_prompts_are_never_logged(echo: Echo) -> None:
    """Whatever happens to a request, its texts are not in the log of the server or its worker."""
    secret = "Rumpelstilzchen"
    message = {"role": "user", "content": secret}
    assert echo.post(prompt=f"{secret} b").json()["status"] == "succeeded"
    assert echo.post(prompt=secret, system_prompt=secret, messages=[message], stop_sequences=secret).is_success
    with echo.client.stream(prompt=f"{secret} gate:never") as answer:
        next(iter(answer))
    for inputs in (
        {"prompt": f"{secret} fail:surprise"},
        {"prompt": f"{secret} fail:request"},
        {"prompt": [secret]},
        {"prompt": "a", "mode": secret},
        {"prompt": "a", "messages": [secret]},
        {"prompt": "a", "messages": [{"role": secret, "content": secret}]},
        {"prompt": "a", "messages": [{"role": "user", "content": [secret]}]},
        {"prompt": "a", "prompt_template": secret},
        {"prompt": secret * (1 << 17)},
        {"prompt": "a", "stop_sequences": f'["{secret}", ""]'},
        {"prompt": "a", "stop_sequences": f'["{secret}'},
    ):
        assert echo.post(**inputs).json().get("status") != "succeeded", inputs
    assert echo.post(prompt="the end").json()["status"] == "succeeded"
    assert secret not in echo.server.log


def test_a_prediction_leaves_no_folder_behind(echo: Echo) -> None:
    """Unless its ID is a path, which may lead anywhere."""
    small, large, path = echo.name(), echo.name(), f"{echo.name()}/inside"
    assert echo.post(request_id=small, prompt="a").json()["status"] == "succeeded"
    assert "bytes together" in echo.post(request_id=large, prompt="a" * (8 << 20)).json()["error"]
    assert echo.post(request_id=path, prompt="a").json()["status"] == "succeeded"
    try:
        assert not (FOLDERS / small).exists()
        assert not (FOLDERS / large).exists()
        assert (FOLDERS / path / "outputs").is_dir(), "coglet no longer makes them here"
    finally:
        shutil.rmtree((FOLDERS / path).parent)


def test_a_proxy_is_not_used_for_this_machine(echo: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name)
    assert echo.server.health()["status"] in ("READY", "BUSY")
    client = Client(echo.server.url)
    with client.stream(prompt="a b") as answer:
        assert "".join(answer) == "a b "
    client.close()
    tally = asyncio.run(load(echo.server.url, requests=1, concurrency=1, max_tokens=8, seed=0, abuse=0))
    assert tally.outcomes == {"succeeded": 1}
