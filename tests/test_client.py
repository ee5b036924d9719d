"""The client's timeouts and errors, without a server."""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator

import httpx
import pytest

from starling.client import AnswerError, Client
from tests.waiting import HANG_S

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
    with pytest.raises(AnswerError, match=f"{URL} failed: timed out$"), client.stream(prompt="hello"):
        pass
    said = []
    with pytest.raises(AnswerError, match=f"{URL} failed: timed out$"), client.stream(prompt="stalls") as answer:
        said.extend(answer)
    assert said == ["one "]
    client.close()


@pytest.mark.parametrize(
    ("response", "said"),
    [
        (httpx.Response(406, json={"error": "Add @cog.streaming"}), f"still starting.*: see {URL}/health-check"),
        (httpx.Response(405), f"405 Method Not Allowed from {URL}/predictions"),
        (httpx.Response(422, json={"detail": [{"loc": ["body", "top_p"], "msg": "is 7"}]}), "422 top_p: is 7"),
        (httpx.Response(500, json={"error": "the worker died"}), "500 the worker died"),
        # As proxies and other servers may answer
        (httpx.Response(404, json={"detail": "none"}), '404 {"detail":"none"}'),
        (httpx.Response(502, json=["down"]), r'502 \["down"\]'),
        (httpx.Response(502, content=b"caf\xe9"), "502 caf\N{REPLACEMENT CHARACTER}"),
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


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ("", "closed the connection before the answer was complete"),
        ('event: error\ndata: {"error": "no more"}\n\n', "no more"),
    ],
)
def test_an_answer_that_is_cut_off_is_not_taken_for_a_whole_one(
    monkeypatch: pytest.MonkeyPatch, last: str, said: str
) -> None:
    body = f'event: output\ndata: {{"chunk": "one "}}\n\n{last}'
    response = httpx.Response(200, headers=EVENTS, text=body)
    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", lambda transport, request: response)
    with (
        contextlib.closing(Client(URL)) as client,
        client.stream(prompt="hello") as answer,
        pytest.raises(AnswerError, match=said),
    ):
        list(answer)


def test_as_many_answers_stream_at_a_time_as_a_server_has_slots() -> None:
    """256 at most: more than httpx keeps open unless told otherwise."""
    slots = 256
    with socket.create_server(("127.0.0.1", 0), backlog=slots) as server, contextlib.ExitStack() as stack:

        def answer_all() -> None:
            for _ in range(slots):
                connection = stack.enter_context(server.accept()[0])
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")

        thread = threading.Thread(target=answer_all, daemon=True)
        thread.start()
        client = stack.enter_context(contextlib.closing(Client(f"http://127.0.0.1:{server.getsockname()[1]}", HANG_S)))
        for _ in range(slots):
            stack.enter_context(client.stream(prompt="hello"))
        thread.join()
