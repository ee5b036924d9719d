"""A local server that speaks the parts of the hub's protocol that are used, and misbehaves on demand."""

import gzip
import hashlib
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

PIECE_BYTES = 8 << 10


@dataclass
class Faults:
    """What the server does wrong with one file. Counts are used up, one for each answer to a GET."""

    cut_after: list[int] = field(default_factory=list)  # body bytes of each answer before the connection breaks
    end_after: int | None = None  # every answer claims to be complete, and ends after so many body bytes
    stall_after: int | None = None  # every answer falls silent after so many body bytes
    trickle_after: int | None = None  # every answer goes on a byte at a time after so many body bytes
    flip_byte: int | None = None  # this byte of the file is sent inverted
    longer_by: int = 0  # bytes after the file's end
    statuses: list[int] = field(default_factory=list)  # sent in answer to GET instead of the file
    status_headers: dict[str, str] = field(default_factory=lambda: {"Retry-After": "0"})  # sent with them
    ranges: str = "kept"  # or "ignored", "refused", or "moved" (starts at the file's beginning, and says so)
    size: int | None = None  # claimed by HEAD
    etag: str | None = None
    commit: str | None = None
    redirects: bool = True  # to a signed address, as the hub does for large files
    circles: bool = False  # redirects without end
    compresses: bool = False  # for whoever accepts it
    pause_s: float = 0.0  # after every piece


@dataclass
class HubServer:
    """`files` by name at one repository and revision; `url` is an endpoint for huggingface_hub."""

    repository: str
    revision: str
    files: dict[str, bytes]
    faults: dict[str, Faults] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, name, Range
    headers: list[dict[str, str]] = field(default_factory=list)
    served_bytes: Counter[str] = field(default_factory=Counter)
    url: str = ""
    stopping: threading.Event = field(default_factory=threading.Event)

    def faults_of(self, name: str) -> Faults:
        return self.faults.setdefault(name, Faults())

    def etag(self, name: str) -> str:
        """As on the hub: SHA-256 for files in LFS, git's id for the others."""
        body = self.files[name]
        if name.endswith(".safetensors"):
            return hashlib.sha256(body).hexdigest()
        return hashlib.sha1(f"blob {len(body)}\0".encode() + body).hexdigest()

    @contextmanager
    def running(self) -> Iterator["HubServer"]:
        hub = self

        class Handler(_Handler):
            server_state = hub

        server = _Server(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            self.stopping.set()
            server.shutdown()
            server.server_close()
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that give up or are killed belong to the tests; anything else is a bug in this server."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            traceback.print_exc()


class _Handler(BaseHTTPRequestHandler):
    server_state: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.server_state
        url = urlsplit(self.path)
        name = url.path.rsplit("/", 1)[-1]
        hub.requests.append((self.command, name, self.headers.get("Range", "")))
        hub.headers.append(dict(self.headers))
        if name not in hub.files or f"/{hub.repository}/" not in url.path or f"/{hub.revision}/" not in url.path:
            self._empty(404)
            return
        faults = hub.faults_of(name)
        if self.command == "GET" and faults.statuses:
            self._empty(faults.statuses.pop(0), faults.status_headers)
            return
        identity = {
            "X-Repo-Commit": faults.commit or hub.revision,
            "ETag": f'"{faults.etag or hub.etag(name)}"',
        }
        size = len(hub.files[name]) if faults.size is None else faults.size
        if faults.circles or (faults.redirects and "sig" not in parse_qs(url.query)):
            cdn = f"http://localhost:{self.server.server_port}{url.path}?sig=top-secret"
            linked = {"X-Linked-Size": str(size), "X-Linked-ETag": identity["ETag"], "Location": cdn}
            self._empty(302, identity | linked)
        elif self.command == "HEAD":
            self._empty(200, identity, length=size)
        else:
            self._send(name, faults, identity)

    def _empty(self, status: int, headers: dict[str, str] | None = None, length: int = 0) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def _send(self, name: str, faults: Faults, identity: dict[str, str]) -> None:
        body = bytearray(self.server_state.files[name])
        if faults.flip_byte is not None:
            body[faults.flip_byte] ^= 0xFF
        body += b"x" * faults.longer_by
        if faults.compresses and "gzip" in self.headers.get("Accept-Encoding", ""):
            body = bytearray(gzip.compress(body))
            identity = identity | {"Content-Encoding": "gzip"}
        start = 0
        asked = self.headers.get("Range", "") if faults.ranges != "ignored" else ""
        if asked:
            start = int(asked.removeprefix("bytes=").split("-")[0]) if faults.ranges != "moved" else 0
            if start >= len(body) or faults.ranges == "refused":
                self._empty(416)
                return
        end = len(body) if faults.end_after is None else min(len(body), start + faults.end_after)
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        for key, value in identity.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        self._send_body(name, faults, bytes(body[start:end]))

    def _send_body(self, name: str, faults: Faults, body: bytes) -> None:
        hub = self.server_state
        cut = faults.cut_after.pop(0) if faults.cut_after else None
        limit = min(x for x in (cut, faults.stall_after, len(body)) if x is not None)
        slow_after = limit if faults.trickle_after is None else faults.trickle_after
        at = 0
        try:
            while at < limit:
                piece = 1 if at >= slow_after else min(PIECE_BYTES, limit - at, slow_after - at)
                self.wfile.write(body[at : at + piece])
                hub.served_bytes[name] += piece
                at += piece
                pause_s = 0.02 if at > slow_after else faults.pause_s
                if pause_s and hub.stopping.wait(pause_s):
                    break
            if faults.stall_after is not None:
                hub.stopping.wait()
        except (BrokenPipeError, ConnectionResetError):
            pass
        if limit < len(body):
            self.close_connection = True
