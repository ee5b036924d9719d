"""A stand-in for Cog's server that ignores SIGTERM, except for logging it.

Its health is $STUBBORN_STATUS, and it answers everything with "hello".
"""

import json
import os
import signal
from http.server import BaseHTTPRequestHandler, HTTPServer

METRICS = {
    "output_token_count": 1,
    "tokens_per_second": 10.0,
    "time_to_first_token": 0.1,
    "input_token_count": 1,
    "cached_token_count": 0,
    "finish_reason": "stop",
    "seed": 7,
}
EVENTS = {
    "start": {"id": "one", "status": "processing"},
    "output": {"chunk": "hello"},
    "completed": {"status": "succeeded", "metrics": METRICS},
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.answer("application/json", json.dumps({"status": os.environ["STUBBORN_STATUS"]}))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        events = [f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in EVENTS.items()]
        self.answer("text/event-stream", "".join(events))

    def answer(self, kind: str, body: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body.encode())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: print("SIGTERM", flush=True))
    print("began", flush=True)
    HTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
