"""Cog's own traces of our predictor, received by a collector on loopback."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from starling.local_server import LocalServer
from tests.waiting import HANG_S, wait_for

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = "00f067aa0ba902b7"


class Collector:
    """An OTLP collector over HTTP that keeps what it receives."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                collector.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def spans(self) -> dict[str, Any]:
        found = {}
        for body in list(self.bodies):
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    found |= {span.name: span for span in scope.spans}
        return found

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


def test_a_request_that_carries_a_trace_continues_it(collector: Collector, tiny_folder: Path) -> None:
    secret = "Rumpelstilzchen"
    environ = {
        "STARLING_WEIGHTS": str(tiny_folder),
        "STARLING_DEVICE": "cpu",
        "COG_MAX_CONCURRENCY": "4",
        "COG_TRACE_CONFIGURED": "true",  # these two are written into the image because of cog.yaml's `observability`
        "COG_TRACE_SAMPLER": "parentbased_always_off",
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    with LocalServer(environ=environ) as server:
        body = {"input": {"prompt": secret, "max_tokens": 5}}
        url = f"{server.url}/predictions"
        stream = {"Accept": "text/event-stream"}
        assert httpx.post(url, json=body, headers=stream, timeout=HANG_S).is_success
        headers = stream | {"traceparent": f"00-{TRACE}-{CALLER}-01"}
        answer = httpx.post(url, json=body, headers=headers, timeout=HANG_S)
        assert "succeeded" in answer.text and answer.text.count("event: output") >= 1
        spans = wait_for(lambda: (s := collector.spans()).keys() >= {"cog.prediction", "cog.prediction.invoke"} and s)
    assert all(span.trace_id.hex() == TRACE for span in spans.values())  # the other request has none
    assert spans["cog.prediction.invoke"].end_time_unix_nano > spans["cog.prediction.invoke"].start_time_unix_nano
    assert not any(secret.encode() in body for body in collector.bodies)
