"""Every way of giving up stops the generation at once, and keeps the text so far."""

import json
import socket
from collections.abc import Iterator
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Queue
from threading import Thread
from typing import Any

import httpx
import pytest
from httpx_sse import connect_sse

from tests.server.conftest import Echo
from tests.waiting import HANG_S, wait_for


def said_two_words(echo: Echo, name: str) -> None:
    wait_for(lambda: ("said", 2) in echo.journal(name))


def stopped(echo: Echo, name: str) -> None:
    """The generation was told to stop while it waited at its gate, which never opens; nothing more was said."""
    wait_for(lambda: ("close", 2) in echo.journal(name))
    assert echo.journal(name) == [("start", 0), ("said", 1), ("said", 2), ("cancelled", 2), ("close", 2)]
    assert echo.post(prompt="next").json()["output"] == ["next "]


def test_the_cancel_endpoint_ends_a_stream_with_its_text_so_far(echo: Echo) -> None:
    name = echo.name()
    body = {"id": name, "input": {"prompt": f"{name} b gate:never c"}}
    with (
        httpx.Client(timeout=HANG_S) as http,
        connect_sse(http, "POST", f"{echo.server.url}/predictions", json=body) as sse,
    ):
        said_two_words(echo, name)
        assert echo.client.cancel(name)
        *_, last = sse.iter_sse()
    assert last.event == "completed"
    assert last.json()["status"] == "canceled"
    assert last.json()["output"] == [f"{name} ", "b "]
    stopped(echo, name)


def test_a_client_that_disconnects_from_a_stream(echo: Echo) -> None:
    name = echo.name()
    with echo.client.stream(prompt=f"{name} b gate:never c") as answer:
        chunks = iter(answer)
        assert [next(chunks), next(chunks)] == [f"{name} ", "b "]
    stopped(echo, name)


def test_the_cancel_endpoint_ends_a_whole_answer(echo: Echo, background) -> None:
    name = echo.name()
    answer: Future[httpx.Response] = background(echo.post, request_id=name, prompt=f"{name} b gate:never c")
    said_two_words(echo, name)
    assert echo.client.cancel(name)
    assert answer.result().json()["status"] == "canceled"
    stopped(echo, name)


def test_a_client_that_disconnects_while_waiting_for_the_whole_answer(echo: Echo) -> None:
    name = echo.name()
    body = json.dumps({"input": {"prompt": f"{name} b gate:never c"}}).encode()
    head = ("POST /predictions HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(body)}")
    with socket.create_connection(("127.0.0.1", echo.server.port)) as connection:
        connection.sendall("\r\n".join((*head, "", "")).encode() + body)
        said_two_words(echo, name)
    stopped(echo, name)


@pytest.fixture
def webhook() -> Iterator[tuple[str, "Queue[dict[str, Any]]"]]:
    """An address that accepts webhooks, and what it has received."""
    got: Queue[dict[str, Any]] = Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}/", got
        server.shutdown()


def test_an_answer_asked_for_with_respond_async(echo: Echo, webhook: tuple[str, "Queue[dict[str, Any]]"]) -> None:
    address, got = webhook
    name = echo.name()
    body = {
        "id": name,
        "input": {"prompt": f"{name} b gate:never c"},
        "webhook": address,
        "webhook_events_filter": ["completed"],
    }
    accepted = httpx.post(
        f"{echo.server.url}/predictions", json=body, headers={"Prefer": "respond-async"}, timeout=HANG_S
    )
    assert accepted.status_code == httpx.codes.ACCEPTED
    said_two_words(echo, name)
    assert echo.client.cancel(name)
    completed = got.get(timeout=HANG_S)
    assert completed["status"] == "canceled"
    assert completed["output"] == [f"{name} ", "b "]
    stopped(echo, name)


def test_cancelling_one_leaves_the_others(echo: Echo, background) -> None:
    gate, kept, dropped = echo.name(), echo.name(), echo.name()
    answer = background(echo.post, prompt=f"{kept} gate:{gate} end")
    wait_for(lambda: ("said", 1) in echo.journal(kept))
    with echo.client.stream(prompt=f"{dropped} b gate:never") as cancelled:
        next(iter(cancelled))
        said_two_words(echo, dropped)
    stopped(echo, dropped)
    echo.open(gate)
    assert answer.result().json()["output"] == [f"{kept} ", "end "]


def test_cancelling_an_unknown_prediction(echo: Echo) -> None:
    assert not echo.client.cancel("nobody")
