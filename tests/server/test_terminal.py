"""The terminal, driven as a person does: what it prints, and what Ctrl-C does."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import psutil
import pytest

from starling.local_server import ROOT
from starling.terminal import main
from tests.server.conftest import Echo
from tests.waiting import HANG_S, wait_for


class Terminal:
    """`python -m starling.terminal` beside the echo server."""

    def __init__(self, echo: Echo, *arguments: str, **environ: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "starling.terminal", "--url", echo.server.url, *arguments],
            cwd=ROOT,
            env={**os.environ, **environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    @property
    def screen(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    def type(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def read_until(self, text: str) -> str:
        seen = b""
        while text.encode() not in seen:
            character = self.screen.read(1)
            assert character, f"the terminal ended, having shown {seen.decode()!r}"
            seen += character
        return seen.decode()

    def interrupt(self) -> None:
        """Ctrl-C, once the terminal waits: Python would sit out one that comes just before it begins to."""
        wait_for(lambda: psutil.Process(self.process.pid).status() == psutil.STATUS_SLEEPING)
        self.process.send_signal(signal.SIGINT)


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    """Terminals of a test, ended with it."""
    terminals: list[Terminal] = []
    yield terminals
    for terminal in terminals:
        terminal.process.kill()
        terminal.process.communicate()


def test_one_answer_is_shown_as_it_is_made(echo: Echo, terminals: list[Terminal]) -> None:
    gate = echo.name()
    terminal = Terminal(echo, f"one gate:{gate} two")
    terminals.append(terminal)
    assert terminal.read_until("one ") == "one "
    echo.open(gate)
    rest = terminal.screen.read().decode()
    assert rest.startswith("two \n\n[2 tokens at 10.0/s, first after 0.25 s")
    assert "seed 7]" in rest
    assert terminal.process.wait(HANG_S) == 0


def test_a_refused_request_is_told(echo: Echo, terminals: list[Terminal]) -> None:
    terminal = Terminal(echo, "")
    terminals.append(terminal)
    assert "neither prompt nor messages is given" in terminal.screen.read().decode()
    assert terminal.process.wait(HANG_S) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("--url", "http://127.0.0.1:1"),
            "The connection to http://127.0.0.1:1 failed: [Errno 111] Connection refused",
        ),
        (("--url", "localhost:5000"), "Request URL has an unsupported protocol"),
        (("--url", "http://localhost:port"), "'http://localhost:port' is no address (Invalid port: 'port')"),
        (("--url", "http://127.0.0.1:1", "--temperature", "nan"), "numbers finite"),
        (("--weights", "/absent"), "STARLING_WEIGHTS names '/absent', which is no folder."),
    ],
    ids=["nobody listens", "no http://", "no port", "no number", "no weights"],
)
def test_what_cannot_begin_is_told_in_one_line(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "hello"]) == 1
    screen = capsys.readouterr().err
    assert said in screen
    assert len(screen.strip().splitlines()) == 1


def test_an_answer_that_someone_else_cancels_is_shown_as_far_as_it_came(echo: Echo, terminals: list[Terminal]) -> None:
    earlier = predictions(echo)
    terminal = Terminal(echo, "one gate:never")
    terminals.append(terminal)
    terminal.read_until("one ")
    wait_for(lambda: any(echo.client.cancel(other) for other in predictions(echo) - earlier))
    assert terminal.screen.read().decode() == "\n\n[stopped]\n"
    assert terminal.process.wait(HANG_S) == 0


def predictions(echo: Echo) -> set[str]:
    """The ids in the server's log."""
    return set(re.findall(r"\bpred_\w+", echo.server.log))


def test_what_the_terminal_has_no_characters_for_ends_nothing(echo: Echo, terminals: list[Terminal]) -> None:
    terminal = Terminal(echo, PYTHONIOENCODING="ascii:strict")
    terminals.append(terminal)
    terminal.read_until("You: ")
    terminal.type("a café")  # two bytes that are no ASCII
    assert "a caf?? \n\n[2 tokens" in terminal.read_until("You: ")


def test_a_server_that_dies_ends_the_answer(own_echo: Echo, terminals: list[Terminal]) -> None:
    terminal = Terminal(own_echo, "one gate:never")
    terminals.append(terminal)
    terminal.read_until("one ")
    assert own_echo.server.process is not None
    own_echo.server.process.kill()
    assert f"The connection to {own_echo.server.url} failed" in terminal.screen.read().decode()
    assert terminal.process.wait(HANG_S) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_its_own_server_ends_with_it(tiny_folder: Path, number: signal.Signals) -> None:
    terminal = subprocess.Popen(
        [sys.executable, "-m", "starling.terminal", "--weights", tiny_folder],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    server: list[psutil.Process] = []
    try:
        assert terminal.stdout is not None
        assert terminal.stdout.readline(), "it did not start"  # the hint, once the server is ready
        server = psutil.Process(terminal.pid).children(recursive=True)
        terminal.send_signal(number)
        assert terminal.wait(HANG_S) == 128 + number
        assert server and not any(process.is_running() for process in server)
    finally:
        for process in [terminal, *server]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        terminal.communicate()


def test_a_chat_and_both_uses_of_ctrl_c(echo: Echo, terminals: list[Terminal]) -> None:
    terminal = Terminal(echo)
    terminals.append(terminal)
    terminal.read_until("You: ")
    terminal.type("hello there")
    assert "hello there \n\n[2 tokens" in terminal.read_until("You: ")

    name = echo.name()
    terminal.type(f"{name} gate:never")
    terminal.read_until(f"{name} ")
    terminal.interrupt()
    assert "[stopped]" in terminal.read_until("You: ")
    wait_for(lambda: ("cancelled", 1) in echo.journal(name))

    terminal.type("a fail:engine")
    assert "out of luck" in terminal.read_until("You: ")

    terminal.interrupt()
    assert terminal.process.wait(HANG_S) == 0


def test_earlier_turns_are_sent_along(echo: Echo, terminals: list[Terminal]) -> None:
    """The echo counts the turns that come before the prompt."""
    terminal = Terminal(echo, "--code")
    terminals.append(terminal)
    for turns in ("0", "2", "4"):
        terminal.read_until("You: ")
        terminal.type("turns:")
        assert f"Starling: {turns} code " in terminal.read_until("]")
