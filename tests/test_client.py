"""The client's timeouts and errors, without a server."""

import json
from collections.abc import Iterator

import httpx
import pytest

from starling.client import AnswerError, Client

URL = "http://127.0.0.1:1"
EVENTS = {"content-type": "text/event-stream"}


class Stalled(httpx.SyncByteStream):
    """One chunk of text, then nothing until the timeout."""

    def __iter__(self) -> Iterator[bytes]:
        yield b'event: output\ndata: {"chunk": "one "}\n\n'
        raise httpx.ReadTimeout("timed out")


@pytest.mark.parametrize(("options", "timeout_s"), [({}, 600), ({"timeout_s": 7.5}, 7.5)])
def test_every_wait_for_the_server_has_a_timeout(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, float], timeout_s: float
) -> None:
    waits = []

    def handle(transport: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
        waits.append(request.extensions["timeout"])
        return httpx.Response(200, headers=EVENTS)

    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", handle)
    client = Client(URL, **options)
    with client.stream(prompt="hello"):
        pass
    assert client.cancel("pred_1")
    client.close()
    assert waits == [dict.fromkeys(("connect", "read", "write", "pool"), timeout_s)] * 2


@pytest.mark.parametrize(("status", "found"), [(200, True), (404, False)])
def test_a_cancel_says_whether_there_was_a_prediction(
    monkeypatch: pytest.MonkeyPatch, status: int, found: bool
) -> None:
    paths = []

    def handle(transport: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
        paths.append(request.url.raw_path)
        return httpx.Response(status)

    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", handle)
    client = Client(URL)
    assert client.cancel("a/b?c") == found
    client.close()
    assert paths == [b"/predictions/a%2Fb%3Fc/cancel"]


def test_a_cancel_that_reaches_no_server_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def handle(transport: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
        if b"broken" in request.url.raw_path:
            return httpx.Response(502, text="Bad Gateway")
        raise httpx.ConnectTimeout("timed out")

    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", handle)
    client = Client(URL)
    with pytest.raises(AnswerError, match=f"{URL} failed: timed out"):
        client.cancel("pred_1")
    with pytest.raises(AnswerError, match="502 Bad Gateway"):
        client.cancel("broken")
    client.close()


def test_a_timeout_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def handle(transport: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
        if b"stalls" in request.content:
            return httpx.Response(200, headers=EVENTS, stream=Stalled())
        raise httpx.ConnectTimeout("timed out")

    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", handle)
    client = Client(URL)
    with pytest.raises(AnswerError, match=f"{URL} failed: timed out"), client.stream(prompt="hello"):
        pass
    said = []
    with pytest.raises(AnswerError, match=f"{URL} failed: timed out"), client.stream(prompt="stalls") as answer:
        said.extend(answer)
    assert said == ["one "]
    client.close()


@pytest.mark.parametrize(
    ("response", "said"),
    [
        (httpx.Response(406, json={"error": "Add @cog.streaming"}), f"still starting.*: see {URL}/health-check"),
        (httpx.Response(405), f"405 Method Not Allowed from {URL}/predictions"),
        (httpx.Response(422, json={"detail": [{"loc": ["body", "top_p"], "msg": "is 7"}]}), "422 top_p: is 7"),
    ],
)
def test_a_refusal_says_what_to_do(monkeypatch: pytest.MonkeyPatch, response: httpx.Response, said: str) -> None:
    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", lambda transport, request: response)
    client = Client(URL)
    with pytest.raises(AnswerError, match=said), client.stream(prompt="hello"):
        pass
    client.close()


@pytest.mark.parametrize(
    ("error", "said", "kind"),
    [
        ("Prediction failed: Generator iteration error: RequestError: a: b\nc", "a: b\nc", "RequestError"),
        ("NoRoomError: it is too long", "it is too long", "NoRoomError"),  # as replicas say it
        ("Prediction failed: worker died", "Prediction failed: worker died", ""),
    ],
)
def test_a_failed_answer_says_what_the_service_said(
    monkeypatch: pytest.MonkeyPatch, error: str, said: str, kind: str
) -> None:
    body = f"event: completed\ndata: {json.dumps({'status': 'failed', 'error': error})}\n\n"
    response = httpx.Response(200, headers=EVENTS, text=body)
    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", lambda transport, request: response)
    client = Client(URL)
    with pytest.raises(AnswerError) as caught, client.stream(prompt="hello") as answer:
        list(answer)
    client.close()
    assert (str(caught.value), caught.value.kind) == (said, kind)
