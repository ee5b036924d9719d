"""What a caller and an operator see when the real service breaks. Each fault is real."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from starling.client import Answer, AnswerError, Client
from starling.local_server import LocalServer
from tests.server.conftest import CONTEXT, events
from tests.waiting import HANG_S, wait_for

LONG = CONTEXT - 100  # tokens
HANG_AFTER_S = 2.0  # far above a step of the tiny model, which takes a millisecond


class Breakable:
    """A server on the real service, and the files that break it."""

    def __init__(self, weights: Path, folder: Path) -> None:
        self.folder = folder
        self.server = LocalServer(
            environ={
                "BREAK_FOLDER": str(folder),
                "STARLING_WEIGHTS": str(weights),
                "STARLING_DEVICE": "cpu",
                "STARLING_HANG_AFTER_S": str(HANG_AFTER_S),
                "COG_MAX_CONCURRENCY": "4",
            },
            predictor="tests/server/breakable_predictor.py:Predictor",
        )
        self.server.start(timeout_s=HANG_S)
        self.client = Client(self.server.url, HANG_S)

    @property
    def status(self) -> Any:
        return self.server.health().get("status")

    def break_it(self, fault: str) -> None:
        (self.folder / fault).touch()

    def mend(self, fault: str) -> None:
        (self.folder / fault).unlink(missing_ok=True)

    def ask(self, **inputs: Any) -> str:
        with self.client.stream(**{"prompt": "a", "max_tokens": 5, **inputs}) as answer:
            return "".join(answer)

    def ask_long(self, begun: Callable[[Answer], object]) -> str:
        """An answer that would take a while; `begun` is called after its first chunk."""
        with self.client.stream(prompt="a", min_tokens=LONG, max_tokens=LONG) as answer:
            chunks = iter(answer)
            first = next(chunks)
            begun(answer)
            return first + "".join(chunks)

    def close(self) -> None:
        for file in self.folder.iterdir():
            file.unlink()
        self.client.close()
        self.server.stop()


@pytest.fixture
def broken(tiny_folder: Path, tmp_path: Path) -> Iterator[Breakable]:
    breakable = Breakable(tiny_folder, tmp_path)
    assert breakable.status == "READY"
    yield breakable
    breakable.close()


@pytest.mark.parametrize(
    ("fault", "said"),
    [("kill-engine", "The engine died: SystemExit"), ("lose-device", "The engine died: DeviceError")],
)
def test_a_dead_engine_ends_its_streams_and_fails_the_health_check(broken: Breakable, fault: str, said: str) -> None:
    with pytest.raises(AnswerError, match=f"{said}. Restart the container"):
        broken.ask_long(lambda answer: broken.break_it(fault))
    wait_for(lambda: broken.status == "UNHEALTHY")
    broken.mend(fault)
    assert broken.status == "UNHEALTHY"  # it does not come back by itself
    with pytest.raises(AnswerError, match=r"takes no requests\. Restart the container"):
        broken.ask()
    wait_for(lambda: "the engine's thread died" in broken.server.log)
    wait_for(lambda: "Traceback (most recent call last)" in broken.server.log)


def test_a_hung_step_fails_the_health_check_for_as_long_as_it_hangs(broken: Breakable, background: Any) -> None:
    stream = background(broken.ask_long, lambda answer: broken.break_it("hang"))
    wait_for(lambda: broken.status == "UNHEALTHY")
    with pytest.raises(AnswerError, match="hangs in a step and takes no requests"):
        broken.ask()
    assert not stream.done()
    broken.mend("hang")
    wait_for(lambda: broken.status == "READY")
    stream.result()  # nothing was lost
    assert broken.ask() is not None


def test_a_failed_step_ends_its_requests_and_nothing_else(broken: Breakable) -> None:
    broken.break_it("fail-step")
    with pytest.raises(AnswerError, match=r"step failed: RuntimeError\. The server is still running") as error:
        broken.ask()
    assert "a secret" not in str(error.value)
    wait_for(lambda: "a secret of the step" in broken.server.log)  # with its traceback, for the operator
    assert broken.status == "READY"
    assert broken.ask() is not None


def test_a_dead_event_loop_fails_the_health_check(broken: Breakable) -> None:
    broken.break_it("kill-loop")
    wait_for(lambda: broken.status == "UNHEALTHY")
    broken.mend("kill-loop")
    assert broken.status == "UNHEALTHY"


def test_a_killed_worker_fails_its_streams_and_is_not_replaced(broken: Breakable) -> None:
    assert broken.server.process is not None
    [worker] = psutil.Process(broken.server.process.pid).children()
    with pytest.raises(AnswerError):
        broken.ask_long(lambda answer: worker.kill())
    wait_for(lambda: broken.status == "UNHEALTHY")
    with pytest.raises(AnswerError):
        broken.ask()


def requests(log: str) -> list[dict[str, Any]]:
    return [line for line in events(log) if line["event"] == "request"]


def test_a_start_is_logged_once_with_what_runs(broken: Breakable, tiny_folder: Path) -> None:
    broken.ask(prompt="Rumpelstilzchen", seed=4294967295)
    wait_for(lambda: len(requests(broken.server.log)) == 2)  # the warm-up's, and ours
    lines = events(broken.server.log)
    [start] = [line for line in lines if line["event"] == "start"]
    assert {"starling", "python", "cog", "coglet", "torch"} <= set(start["versions"])
    assert start["weights"] == str(tiny_folder)
    assert start["settings"]["STARLING_HANG_AFTER_S"] == HANG_AFTER_S
    assert re.fullmatch(r"\w+ kernels with \d+ threads on cpu", start["operations"])
    laps = ["imports", "weights", "tokenizer", "operations", "model", "kv_cache", "runner", "grammars", "warm_up"]
    assert list(start["seconds"]) == laps
    assert all(seconds >= 0 for seconds in start["seconds"].values())
    _, ours = requests(broken.server.log)
    assert ours["seed"] == 4294967295
    assert "Rumpelstilzchen" not in broken.server.log
