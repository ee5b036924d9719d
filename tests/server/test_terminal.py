"""The terminal, driven as a person would: what it prints, and what Ctrl-C does."""

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import psutil
import pytest

from starling.local_server import ROOT
from starling.request import MAX_TEXT_BYTES
from starling.terminal import main, start
from tests.server.conftest import Echo
from tests.waiting import HANG_S, wait_for

CTRL_D = b"\x04"
UP = b"\x1b[A"


class Terminal:
    """`python -m starling.terminal` with the echo server and a keyboard."""

    def __init__(self, echo: Echo, *arguments: str, **environ: str) -> None:
        self._keyboard, stdin = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "starling.terminal", "--url", echo.server.url, *arguments],
            cwd=ROOT,
            env={**os.environ, **environ},
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        os.close(stdin)

    @property
    def screen(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    def type(self, line: str) -> None:
        self.press(line.encode() + b"\n")

    def press(self, keys: bytes) -> None:
        os.write(self._keyboard, keys)

    def read_until(self, text: str) -> str:
        seen = b""
        while text.encode() not in seen:
            character = self.screen.read(1)
            assert character, f"the terminal ended, having shown {seen.decode()!r}"
            seen += character
        return seen.decode()

    def interrupt(self) -> None:
        """Ctrl-C."""
        send_signal(self.process, signal.SIGINT)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        os.close(self._keyboard)


def send_signal(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    """Once it is blocked waiting: Python would sit through a signal that comes just before that."""
    wait_for(lambda: psutil.Process(process.pid).status() == psutil.STATUS_SLEEPING)
    process.send_signal(number)


def piped(
    *arguments: str, stdin: str = "", stdout: int | IO[str] = subprocess.PIPE
) -> "subprocess.CompletedProcess[str]":
    """The same without a keyboard."""
    command = [sys.executable, "-m", "starling.terminal", *arguments]
    return subprocess.run(
        command, cwd=ROOT, input=stdin, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=HANG_S, check=False
    )


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    """A test's terminals, closed when it ends."""
    terminals: list[Terminal] = []
    yield terminals
    for terminal in terminals:
        terminal.close()


def test_one_answer_is_shown_as_it_is_generated(echo: Echo, terminals: list[Terminal]) -> None:
    gate = echo.name()
    terminal = Terminal(echo, f"one gate:{gate} two")
    terminals.append(terminal)
    assert terminal.read_until("one ") == "one "
    echo.open(gate)
    rest = terminal.screen.read().decode()
    assert rest.startswith("two \n\n[2 tokens at 10.0/s, first after 0.25 s")
    assert "prompt 3 tokens, 0 of them cached · ended by stop · seed 7]" in rest
    assert terminal.process.wait(HANG_S) == 0


def test_piped_input_is_one_prompt_and_only_the_answer_goes_to_stdout(echo: Echo) -> None:
    done = piped("--url", echo.server.url, stdin="one\ntwo asked:\n")
    assert (done.returncode, done.stdout) == (0, 'one two ["one\\ntwo asked:"] \n')
    assert done.stderr.startswith("\n[3 tokens at 10.0/s")


def test_a_blank_prompt_and_one_without_quotes_are_refused(echo: Echo) -> None:
    for done in (piped("--url", echo.server.url, " "), piped("--url", echo.server.url, stdin="\n")):
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "\nThe prompt is empty. Give one, or none at all for a chat.\n"
    done = piped("--url", echo.server.url, "one", "two")
    assert done.returncode == 2
    assert "put it in quotes" in done.stderr


URL = ("--url", "http://127.0.0.1:1")
WEIGHTS = ("--weights", "/absent")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "one of the arguments --url --weights is required"),
        ((*URL, *WEIGHTS), "not allowed with argument --url"),
        ((*URL, "--engine", "engine"), "--engine goes with --weights"),
        ((*WEIGHTS, "--engine", "motor"), "invalid choice: 'motor'"),
    ],
    ids=["no server", "two servers", "an engine for a running server", "an unknown engine"],
)
def test_options_that_name_no_server_or_contradict_each_other_are_refused(
    options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*options, "hello"])
    assert said in capsys.readouterr().err


def test_a_closed_or_full_output_ends_it_without_a_traceback(echo: Echo) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed, Path("/dev/full").open("w") as full:
        done = piped("--url", echo.server.url, "one two", stdout=closed)
        assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
        done = piped("--url", echo.server.url, "one two", stdout=full)
        assert (done.returncode, done.stderr) == (1, "\n[Errno 28] No space left on device\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("--url", "http://127.0.0.1:1"),
            "The connection to http://127.0.0.1:1 failed: [Errno 111] Connection refused. Is a server running there?",
        ),
        (
            ("--url", "localhost:5000"),
            "'localhost:5000' is not a valid URL (it does not begin with http:// or https://)",
        ),
        (("--url", "http://localhost:port"), "'http://localhost:port' is not a valid URL (Invalid port: 'port')"),
        (("--weights", "/absent"), "--weights names '/absent', which is not a folder."),
        (("--weights", "/absent", "--temperature", "nan"), "temperature is nan: Input should be a finite number"),
        (("--weights", "/absent", "--temperature", "9"), "temperature is 9.0: Input should be less than or equal to 5"),
        (("--weights", "/absent", "-i", "seed=-1"), "seed is -1: Input should be greater than or equal to 0"),
        (("--weights", "/absent", "-i", "seed=one"), "seed: Input should be a valid integer"),
        (("--weights", "/absent", "-i", "heat=9"), "heat: There is no such input. Leave it out"),
    ],
    ids=[
        "nobody listens",
        "no http://",
        "no port",
        "no weights",
        "no number",
        "too hot",
        "a seed below 0",
        "a seed in words",
        "an unknown input",
    ],
)
def test_a_failure_to_begin_is_reported_in_one_line(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "hello"]) == 1
    screen = capsys.readouterr().err
    assert said in screen
    assert len(screen.strip().splitlines()) == 1


def test_a_prompt_that_no_server_would_accept_starts_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WEIGHTS, "a" * (MAX_TEXT_BYTES + 1)]) == 1
    assert f"at most {MAX_TEXT_BYTES} are accepted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("WEIGHTS", "/elsewhere", "STARLING_WEIGHTS names {}, which lacks config.json"),
        ("THREADS", "0", "_THREADS is '0'"),
    ],
)
def test_weights_or_settings_that_cannot_be_served_start_no_server(
    name: str,
    value: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """--weights goes before STARLING_WEIGHTS."""
    monkeypatch.setenv(f"STARLING_{name}", value)
    assert main(["--weights", str(tmp_path), "hello"]) == 1
    screen = capsys.readouterr().err
    assert said.format(tmp_path) in screen
    assert len(screen.strip().splitlines()) == 1


class SlowServer:
    """A stand-in for LocalServer."""

    def start(self, waiting: Callable[[float], None]) -> None:
        waiting(0.04)
        waiting(12.34)


@pytest.mark.parametrize(
    ("interactive", "begins"),
    [
        (True, "\rStarting the server: 0.0 s\rStarting the server: 12.3 s\r\x1b[KServer ready in "),
        (False, "Server ready in "),
    ],
    ids=["to a terminal", "to a file"],
)
def test_only_a_terminal_is_shown_the_seconds_that_a_server_takes_to_start(
    interactive: bool, begins: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: interactive)
    start(SlowServer())  # type: ignore[arg-type]
    output, told = capsys.readouterr()
    assert output == "" and told.startswith(begins)


def test_an_answer_that_someone_else_cancels_is_shown_so_far(echo: Echo, terminals: list[Terminal]) -> None:
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


def test_characters_that_the_terminal_cannot_show_do_not_end_the_chat(echo: Echo, terminals: list[Terminal]) -> None:
    terminal = Terminal(echo, PYTHONIOENCODING="ascii:strict")
    terminals.append(terminal)
    terminal.read_until("You: ")
    terminal.type("a café")  # é is two bytes, neither of them ASCII
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
def test_its_own_server_follows_its_options_and_ends_with_it(tiny_folder: Path, number: signal.Signals) -> None:
    keyboard, stdin = pty.openpty()
    terminal = subprocess.Popen(
        [sys.executable, "-m", "starling.terminal", "--weights", tiny_folder.name, "--engine", "engine"],
        cwd=tiny_folder.parent,  # to which its path is relative
        env={**os.environ, "PYTHONPATH": str(ROOT), "STARLING_ENGINE": "reference"},
        stdin=stdin,
        stdout=subprocess.PIPE,
    )
    server: list[psutil.Process] = []
    try:
        assert terminal.stdout is not None
        assert terminal.stdout.readline(), "it did not start"  # the hint, once the server is ready
        server = psutil.Process(terminal.pid).children(recursive=True)
        assert server[0].environ()["STARLING_ENGINE"] == "engine"
        send_signal(terminal, number)
        assert terminal.wait(HANG_S) == 128 + number
        assert server and not any(process.is_running() for process in server)
    finally:
        for process in [terminal, *server]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        terminal.communicate()
        os.close(keyboard)
        os.close(stdin)


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

    silent = f"gate:{echo.name()}"
    terminal.type(silent)
    terminal.read_until("Starling: ")  # before there is an answer
    wait_for(lambda: ("start", 0) in echo.journal(silent))
    terminal.interrupt()
    assert "[stopped]" in terminal.read_until("You: ")

    terminal.type("a fail:engine")
    assert "out of luck" in terminal.read_until("You: ")

    terminal.type("turns:")
    assert "Starling: 4 chat " in terminal.read_until("You: "), "turns without an answer are not kept"

    terminal.interrupt()
    assert terminal.process.wait(HANG_S) == 0


class WithStubbornServer:
    """A terminal that starts the stubborn server as its own. Whatever they leave behind is in `folder`."""

    # Stopping the server waits for it for up to an hour.
    CODE = """
import os, runpy, signal, subprocess
from starling import local_server
local_server.COMMAND = ("tests/server/stubborn_server.py",)
local_server.LocalServer.stop.__defaults__ = (3600,)
"""
    # Ctrl-C when the process exists, but Popen has not returned yet.
    INTERRUPT_ITS_START = """
class Popen(subprocess.Popen):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        os.kill(os.getpid(), signal.SIGINT)
subprocess.Popen = Popen
"""
    RUN = "runpy.run_module('starling.terminal', run_name='__main__')"

    def __init__(self, folder: Path, weights: Path, status: str, more: str = "") -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.CODE + more + self.RUN, "--weights", str(weights), "hello"],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(folder), "STUBBORN_STATUS": status},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def send_once_logged(self, line: str, number: int) -> None:
        """Send a signal once the server's log has the line; none if the terminal ends before."""
        wait_for(lambda: self.process.poll() is not None or line in self.log())
        self.process.send_signal(number)

    def log(self) -> str:
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            return "".join(path.read_text() for path in self.folder.iterdir())
        return ""

    def left_behind(self) -> list[object]:
        processes = psutil.process_iter(["environ"])
        left = [process for process in processes if (process.info["environ"] or {}).get("TMPDIR") == str(self.folder)]
        return [*left, *self.folder.iterdir()]

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        for process in self.left_behind():
            if isinstance(process, psutil.Process):
                process.kill()


@pytest.fixture
def stubborn(tmp_path: Path, tiny_folder: Path) -> Iterator[Callable[..., WithStubbornServer]]:
    begun: list[WithStubbornServer] = []

    def begin(status: str, more: str = "") -> WithStubbornServer:
        begun.append(WithStubbornServer(tmp_path, tiny_folder, status, more))
        return begun[-1]

    yield begin
    for terminal in begun:
        terminal.close()


SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
Stubborn = Callable[..., WithStubbornServer]


@SIGNALS
def test_a_second_ctrl_c_kills_a_server_that_was_starting(stubborn: Stubborn, number: signal.Signals) -> None:
    terminal = stubborn("STARTING")
    terminal.send_once_logged("GET /health-check", number)
    terminal.send_once_logged("SIGTERM", number)
    assert terminal.process.communicate(timeout=HANG_S) == ("", "")
    assert terminal.process.returncode == 128 + number
    assert not terminal.left_behind()


@SIGNALS
def test_ctrl_c_after_the_answer_kills_a_server_that_is_stopping(stubborn: Stubborn, number: signal.Signals) -> None:
    terminal = stubborn("READY")
    terminal.send_once_logged("SIGTERM", number)
    output, told = terminal.process.communicate(timeout=HANG_S)
    assert output == "hello\n" and "Traceback" not in told
    assert terminal.process.returncode == 128 + number
    assert not terminal.left_behind()


def test_ctrl_c_while_a_failed_server_is_stopping_decides_the_exit_code(stubborn: Stubborn) -> None:
    terminal = stubborn("SETUP_FAILED")
    terminal.send_once_logged("SIGTERM", signal.SIGINT)
    assert terminal.process.communicate(timeout=HANG_S) == ("", "")
    assert terminal.process.returncode == 128 + signal.SIGINT
    assert not terminal.left_behind()


def test_ctrl_c_while_its_server_is_being_spawned_waits_until_it_is(stubborn: Stubborn) -> None:
    terminal = stubborn("STARTING", WithStubbornServer.INTERRUPT_ITS_START)
    terminal.send_once_logged("SIGTERM", signal.SIGINT)
    assert terminal.process.communicate(timeout=HANG_S) == ("", "")
    assert terminal.process.returncode == 128 + signal.SIGINT
    assert not terminal.left_behind()


def test_earlier_turns_are_sent_along(echo: Echo, terminals: list[Terminal]) -> None:
    """The echo counts the turns that come before the prompt."""
    terminal = Terminal(echo, "--code")
    terminals.append(terminal)
    for turns in ("0", "2", "4"):
        terminal.read_until("You: ")
        terminal.type("turns:")
        assert f"Starling: {turns} code " in terminal.read_until("]")


def test_a_chat_sends_who_said_what(echo: Echo, terminals: list[Terminal]) -> None:
    terminal = Terminal(echo)
    terminals.append(terminal)
    for prompt in ("hello", "how are you?", "asked:"):
        terminal.read_until("You: ")
        terminal.type(prompt)
    turns = '"user: hello", "assistant: hello ", "user: how are you?", "assistant: how are you? "'
    assert f'Starling: [{turns}, "asked:"]' in terminal.read_until("You: ")


def test_an_earlier_line_can_be_recalled(echo: Echo) -> None:
    """Only where input and output are both a terminal."""
    pytest.importorskip("readline")
    screen, terminal = pty.openpty()
    command = [sys.executable, "-m", "starling.terminal", "--url", echo.server.url]
    with subprocess.Popen(command, cwd=ROOT, stdin=terminal, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        try:
            seen = b""
            for keys in (b"one\n", UP + b"\n", CTRL_D):
                while b"You: " not in seen:
                    seen += os.read(screen, 4096)
                shown, seen = seen, b""
                os.write(screen, keys)
            assert b"Starling: one " in shown
        finally:
            process.kill()
    os.close(screen)


def test_any_input_can_be_named(echo: Echo, terminals: list[Terminal]) -> None:
    given = ("-i", "temperature=0.25", "--input", "mode=code", "-i", "regex=1=1", "-i", "top_k=5", "-i", "seed=5")
    given += ("-i", "max_new_tokens=5")  # the old name of max_tokens
    done = piped("--url", echo.server.url, *given, "heat: turns: regex:")
    assert (done.returncode, done.stdout) == (0, "0.25 0 code 1=1 \n")
    terminal = Terminal(echo, "--temperature", "1", *given)
    terminals.append(terminal)
    for turns in ("0", "2"):
        terminal.read_until("You: ")
        terminal.type("heat: turns:")
        assert f"Starling: 0.25 {turns} code " in terminal.read_until("]")


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ("regex", "write NAME=VALUE"),
        ("prompt=a", "you type"),
        ("messages=[]", "over HTTP"),
        ("max_new_tokens= ", "max_new_tokens is blank: give a number, or leave it out"),
    ],
)
def test_an_input_named_wrongly_is_refused(given: str, remedy: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*URL, "-i", given, "hello"])
    assert capsys.readouterr().err.rstrip().endswith(remedy)


def test_a_chat_s_options_blank_lines_and_the_end_of_its_input(echo: Echo, terminals: list[Terminal]) -> None:
    terminal = Terminal(echo, "--temperature", "0")
    terminals.append(terminal)
    terminal.read_until("You: ")
    terminal.type(" ")
    assert terminal.read_until("You: ") == "\nYou: "
    terminal.type("heat:")
    assert "Starling: 0.0 \n" in terminal.read_until("You: ")
    terminal.press(CTRL_D)
    assert terminal.screen.read() == b"\n"
    assert terminal.process.wait(HANG_S) == 0


def test_a_chat_too_long_for_the_context_goes_on_without_its_older_half(echo: Echo, terminals: list[Terminal]) -> None:
    terminal = Terminal(echo)
    terminals.append(terminal)
    for turns in range(6):
        terminal.read_until("You: ")
        terminal.type("turns:")
        assert f"Starling: {2 * turns} chat " in terminal.read_until("]")
    terminal.read_until("You: ")
    terminal.type("room:4 turns: asked:")
    said = terminal.read_until("You: ")
    assert said.count("its older part is left out") == 1 and "\nStarling: 4 chat " in said, "though left out twice"
    assert '["user: turns:", "assistant: 8 chat ", "user: turns:", "assistant: 10 chat ", "room:4' in said
    terminal.type("room:-1 turns:")
    assert "\n[it is too long]" in terminal.read_until("You: ")
    terminal.type("turns:")
    assert "Starling: 6 chat " in terminal.read_until("]"), "a prompt that never fits costs no earlier turns"
