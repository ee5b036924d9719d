"""Cog's own HTTP server as a local process, without an image.

python -m starling.local_server        # what scripts/serve runs: in the foreground, on PORT or 5000

with LocalServer(root, {"STARLING_WEIGHTS": "weights/demo"}) as server: ...    # demo, tests, bench
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType

import httpx

from starling.errors import StarlingError
from starling.logs import configure as configure_logs
from starling.openapi import declared_concurrency
from starling.settings import Settings
from starling.weights import locate_weights

ROOT = Path(__file__).resolve().parent.parent
PREDICTOR = "predict.py:Predictor"
COMMAND = ("-m", "cog.server.http", "--host")
POLL_S = 0.05


class ServerError(StarlingError):
    """The server cannot start, failed to start, or exited. If it ran, the message includes the end of its log."""


def place_schema(root: Path) -> None:
    """Put openapi.json where Cog's server looks for it; `cog build` does the same in an image."""
    target = root / ".cog" / "openapi_schema.json"
    document = (root / "openapi.json").read_bytes()
    try:
        if not target.exists() or target.read_bytes() != document:
            target.parent.mkdir(exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as new:
                new.write(document)
            Path(new.name).chmod(0o644)  # the user who serves may not be the one who installed it
            Path(new.name).replace(target)
    except OSError as error:
        raise ServerError(
            f"The inputs' schema cannot be put into {target.parent}: {error}. Make {root} writable for this user, or "
            f"copy openapi.json to {target}."
        ) from error


def server_environment(root: Path, port: int, environ: Mapping[str, str], predictor: str = PREDICTOR) -> dict[str, str]:
    """`environ` and what the server process needs besides.

    The number of concurrent requests is that of predict.py's @concurrent, as in an image, unless COG_MAX_CONCURRENCY
    is set.
    """
    interpreter_dir = str(Path(sys.executable).parent)  # the worker is started as bare `python`
    return {
        "COG_MAX_CONCURRENCY": str(declared_concurrency(root / "predict.py")),
        **environ,
        "COG_PREDICT_TYPE_STUB": predictor,
        "PATH": os.pathsep.join([interpreter_dir, environ.get("PATH", os.defpath)]),
        "PORT": str(port),
    }


def port_from(environ: Mapping[str, str]) -> int:
    """PORT, or 5000. Raises ServerError if it is not a port, or cannot be bound, as when it is in use."""
    text = environ.get("PORT") or "5000"
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 1 << 16):
        raise ServerError(f"PORT is {text!r}: it must be a whole number from 1 to 65535.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # an earlier server's TIME_WAIT does not count
        try:
            probe.bind(("", int(text)))
        except OSError as error:
            raise ServerError(f"Port {text} cannot be used ({error.strerror}). Name another one with PORT.") from error
    return int(text)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def held_signals() -> Iterator[None]:
    """Defer Ctrl-C and similar signals until the block ends, so that a process just started is known to `stop`."""
    if threading.current_thread() is not threading.main_thread():  # signal handlers run only in that one
        yield
        return
    pending: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.signal(number, lambda number, frame: pending.append(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
        for late in pending:
            signal.raise_signal(late)


class LocalServer:
    """The server on a free port of the loopback interface, from `start` to `stop`.

    Args:
        root: the folder of predict.py and openapi.json
        environ: variables added to this process's own
        predictor: FILE:CLASS, relative to `root`
    """

    def __init__(self, root: Path = ROOT, environ: Mapping[str, str] | None = None, predictor: str = PREDICTOR) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._root = root
        self._environ = server_environment(root, self.port, {**os.environ, **(environ or {})}, predictor)
        self._log_path: Path | None = None  # None before `spawn` and after `stop`
        self._log = ""
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "LocalServer":
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    @property
    def log(self) -> str:
        """Everything the server and its worker have written."""
        return self._log if self._log_path is None else self._log_path.read_text(errors="replace")

    def spawn(self) -> None:
        """Start the process and return at once. It has its own session, so that Ctrl-C here does not reach it."""
        place_schema(self._root)
        with tempfile.NamedTemporaryFile(prefix="starling-server-", suffix=".log", delete=False) as log:
            self._log_path = Path(log.name)
            with held_signals():
                self.process = subprocess.Popen(
                    [sys.executable, *COMMAND, "127.0.0.1"],
                    cwd=self._root,
                    env=self._environ,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )

    def start(self, timeout_s: float = 900, waiting: Callable[[float], None] = lambda seconds: None) -> None:
        """Start the process and wait until it is ready; `waiting` is called with the seconds waited so far.

        Raises ServerError with the end of the log if it fails or takes longer than timeout_s.
        """
        began_s = time.monotonic()
        try:
            self.spawn()
            while (status := self.health().get("status")) not in ("READY", "BUSY"):
                waited_s = time.monotonic() - began_s
                if status == "SETUP_FAILED" or self.process is None or self.process.poll() is not None:
                    raise ServerError(f"The server did not start ({status or 'its process ended'}):\n{self._tail()}")
                if waited_s > timeout_s:
                    raise ServerError(f"The server is not ready after {timeout_s:.0f} s ({status}):\n{self._tail()}")
                waiting(waited_s)
                time.sleep(POLL_S)
        except BaseException:
            self.stop()
            raise

    def health(self) -> dict[str, object]:
        """The body of /health-check; empty while nothing listens."""
        try:
            # trust_env=False: a proxy named in the environment cannot reach this machine's loopback interface.
            body: dict[str, object] = httpx.get(f"{self.url}/health-check", timeout=10, trust_env=False).json()
        except httpx.TransportError:
            return {}
        return body

    def stop(self, timeout_s: float = 30) -> None:
        """Stop the server: running predictions get timeout_s to finish, then everything is killed. `log` remains.

        An exception meanwhile, such as Ctrl-C raises, kills it at once.
        """
        if self._log_path is None:
            return
        try:
            if self.process is not None:
                self.process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(timeout_s)
        finally:
            with held_signals():
                if self.process is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(self.process.pid, signal.SIGKILL)  # also a worker that outlived its parent
                    self.process.wait()
                self._log = self.log
                self._log_path.unlink()
                self._log_path = None

    def _tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.splitlines()[-lines:])


def main() -> None:
    """Become the server: on all interfaces, as in an image."""
    os.chdir(ROOT)
    configure_logs()  # weights may be downloaded, which takes a while
    try:
        locate_weights(Settings.from_env(os.environ))
        port = port_from(os.environ)
        place_schema(ROOT)
    except StarlingError as error:
        sys.exit(str(error))
    health = f"http://localhost:{port}/health-check"
    print(
        f"Starting. The server answers once {health} says READY, in seconds to a minute.", file=sys.stderr, flush=True
    )
    os.execve(sys.executable, [sys.executable, *COMMAND, "0.0.0.0"], server_environment(ROOT, port, os.environ))


if __name__ == "__main__":
    main()
