"""The client's timeouts, without a server."""

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
