"""How the server starts, becomes unhealthy, and ends."""

import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from starling.local_server import ROOT, LocalServer, ServerError, free_port, place_schema, port_from
from tests.server.conftest import Echo
from tests.waiting import HANG_S, wait_for

OTHER_ADDRESS = "127.0.0.2"  # also this machine, but a server that listens only on 127.0.0.1 is not reachable here


def worker(echo: Echo) -> psutil.Process:
    assert echo.server.process is not None
    [child] = psutil.Process(echo.server.process.pid).children()
    return child


def test_sigterm_lets_streams_finish(own_echo: Echo, background) -> None:
    def read() -> list[str]:
        with own_echo.client.stream(prompt="a gate:end b") as answer:
            return list(answer)

    stream = background(read)
    whole = background(own_echo.post, prompt="c gate:end d")
    wait_for(lambda: own_echo.journal("a") and own_echo.journal("c"))
    assert own_echo.server.process is not None
    stopped = background(own_echo.server.stop)
    wait_for(lambda: not own_echo.server.health())  # it accepts no more requests
    own_echo.open("end")
    assert stream.result() == ["a ", "b "]
    assert whole.result().json()["output"] == ["c ", "d "]
    stopped.result()
    assert own_echo.server.process.returncode == 0


def test_an_unhealthy_service_fails_the_health_check(own_echo: Echo) -> None:
    assert own_echo.server.health()["status"] == "READY"
    (own_echo.folder / "sick").touch()
    health = own_echo.server.health()
    assert health["status"] == "UNHEALTHY"
    assert "healthcheck returned False" in str(health["user_healthcheck_error"])
    (own_echo.folder / "sick").unlink()
    assert own_echo.server.health()["status"] == "READY"


def test_a_worker_that_is_killed_is_not_replaced(own_echo: Echo, background) -> None:
    """The state that tells an operator to restart the container."""
    stream = background(own_echo.post, prompt="a gate:never")
    wait_for(lambda: own_echo.journal("a"))
    worker(own_echo).kill()
    assert stream.result().json()["status"] == "failed"
    wait_for(lambda: own_echo.server.health().get("status") == "UNHEALTHY")
    assert own_echo.post(prompt="b").json()["status"] == "failed"
    assert own_echo.server.health()["status"] == "UNHEALTHY"


def test_a_setup_that_fails_says_why(tmp_path: Path) -> None:
    server = LocalServer(environ={"STARLING_WEIGHTS": str(tmp_path)})
    server.spawn()
    try:
        health = wait_for(lambda: (h := server.health()).get("status") not in (None, "STARTING") and h)
        assert health["status"] == "SETUP_FAILED"
        assert f"STARLING_WEIGHTS names {tmp_path}, which lacks config.json" in str(health["setup"])
        assert "Traceback (most recent call last)" in server.log
        assert re.search(r"predict\.py\W+, line \d+, in setup", server.log)
        assert "scripts/demo" in server.log
    finally:
        server.stop()


def test_the_local_server_says_why_it_did_not_start(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"(?s)SETUP_FAILED.*which lacks config\.json"):
        LocalServer(environ={"STARLING_WEIGHTS": str(tmp_path)}).start(timeout_s=HANG_S)


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the servers' logs, and of nothing else."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_server_that_is_late_is_ended_and_its_log_kept(logs: Path) -> None:
    server = LocalServer(environ={"STARLING_WEIGHTS": str(logs)})
    with pytest.raises(ServerError, match="is not ready after 0 s"):
        server.start(timeout_s=0)
    assert server.process is not None and server.process.poll() is not None
    assert not list(logs.iterdir()) and isinstance(server.log, str)


INTERRUPTS_ITS_PARENT_WHEN_STOPPED = """
import os, signal, time

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
print("began", flush=True)
signal.sigwait({signal.SIGTERM})
print("SIGTERM", flush=True)
os.kill(os.getppid(), signal.SIGINT)
while True:
    time.sleep(3600)
"""


def test_ctrl_c_during_a_stop_kills_the_server_at_once(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("starling.local_server.COMMAND", ("-c", INTERRUPTS_ITS_PARENT_WHEN_STOPPED))
    server = LocalServer()
    server.spawn()
    assert server.process is not None
    try:
        wait_for(lambda: "began\n" in server.log)  # unbuffered, a line and its newline are written separately
        with pytest.raises(KeyboardInterrupt):
            server.stop(timeout_s=3600)
        assert server.process.poll() == -signal.SIGKILL
        assert server.log == "began\nSIGTERM\n" and not list(logs.iterdir())
    finally:
        server.process.kill()
        server.process.wait()


def test_ctrl_c_right_after_the_process_began_ends_it(logs: Path) -> None:
    class Interrupted(LocalServer):
        def spawn(self) -> None:
            super().spawn()
            raise KeyboardInterrupt

    server = Interrupted()
    try:
        with pytest.raises(KeyboardInterrupt):
            server.start()
        assert server.process is not None and server.process.poll() is not None
        assert not list(logs.iterdir())
    finally:
        server.stop()


def test_a_process_that_cannot_begin_leaves_no_log(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = LocalServer()
    monkeypatch.setattr("sys.executable", "/absent")
    with pytest.raises(FileNotFoundError):
        server.start()
    assert not list(logs.iterdir())


def test_waiting_for_a_server_stops_when_it_ends() -> None:
    server = LocalServer()
    with socket.socket() as other:
        other.bind(("127.0.0.1", server.port))
        with pytest.raises(ServerError, match=r"(?s)did not start \(its process ended\):\n.*in use"):
            server.start(timeout_s=HANG_S)


def test_a_private_server_listens_on_loopback_in_its_own_session(echo: Echo) -> None:
    assert echo.server.process is not None
    assert os.getsid(echo.server.process.pid) == echo.server.process.pid, "Ctrl-C here would reach it too"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((OTHER_ADDRESS, echo.server.port))


def test_in_the_foreground_it_listens_on_every_interface(tiny_folder: Path) -> None:
    port = free_port()
    environ = {**os.environ, "STARLING_WEIGHTS": str(tiny_folder), "PORT": str(port)}
    with subprocess.Popen([sys.executable, "-m", "starling.local_server"], cwd=ROOT, env=environ) as server:
        try:
            wait_for(lambda: server.poll() is not None or not refused(port))
            assert server.poll() is None
            assert psutil.Process(server.pid).environ()["COG_MAX_CONCURRENCY"] == "32"
        finally:
            server.terminate()


def refused(port: int) -> bool:
    try:
        socket.create_connection((OTHER_ADDRESS, port)).close()
    except ConnectionRefusedError:
        return True
    return False


def test_in_the_foreground_a_failure_to_begin_is_reported_in_one_line() -> None:
    environ = {**os.environ, "STARLING_WEIGHTS": "/absent"}
    command = [sys.executable, "-m", "starling.local_server"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("STARLING_WEIGHTS names '/absent', which is not a folder.")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("port", ["http", "-1", "0", "65536", "5e3"])
def test_a_port_that_cannot_exist_is_refused(port: str) -> None:
    with pytest.raises(ServerError, match=f"PORT is '{port}': it must be a whole number from 1 to 65535"):
        port_from({"PORT": port})


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ServerError, match=f"Port {port} cannot be used .* Name another one with PORT"):
            port_from({"PORT": str(port)})
    assert port_from({"PORT": str(port)}) == port


def test_the_default_port_is_5000() -> None:
    with socket.socket() as other:
        with suppress(OSError):  # already in use
            other.bind(("", 5000))
            other.listen()
        with pytest.raises(ServerError, match="Port 5000 cannot be used"):
            port_from({"PORT": ""})


def test_users_other_than_the_one_who_placed_the_schema_can_read_it(tmp_path: Path) -> None:
    (tmp_path / "openapi.json").write_text("{}")
    place_schema(tmp_path)
    placed = tmp_path / ".cog/openapi_schema.json"
    assert placed.read_text() == "{}" and placed.stat().st_mode & 0o777 == 0o644
    (tmp_path / "openapi.json").write_text('{"of": "a newer checkout"}')
    place_schema(tmp_path)
    assert placed.read_text() == '{"of": "a newer checkout"}'


def test_a_schema_that_cannot_be_placed_is_reported(tmp_path: Path) -> None:
    (tmp_path / "openapi.json").write_text("{}")
    (tmp_path / ".cog").write_text("")  # a file where the folder should be: root may write anywhere else
    with pytest.raises(ServerError, match=r"schema cannot be put into .*copy openapi\.json to"):
        place_schema(tmp_path)
