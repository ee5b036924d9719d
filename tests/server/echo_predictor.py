"""predict.Predictor over a service that echoes the prompt, word by word, at the test's pace.

What happens is written to $ECHO_FOLDER/journal. Words with an effect:
    gate:NAME   waits until the file NAME is in $ECHO_FOLDER
    fail:KIND   raises: request, engine or surprise
    turns:      says how many messages precede the prompt, and the mode
    heat:       says the temperature
    regex:      says the regular expression
    asked:      says the earlier turns and the prompt, as a list
    room:N      raises if more than N messages precede the prompt
"""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import predict
from starling.errors import EngineError, GenerationCancelled, NoRoomError, RequestError
from starling.request import Message, Request
from starling.settings import Settings

FAILURES: dict[str, Exception] = {
    "request": RequestError("max_tokens is 9, and the word cancelled stands here. Lower it"),
    "engine": EngineError("the engine is out of luck"),
    "surprise": KeyError("a surprise"),
}


def turn(message: Message) -> str:
    return f"{message.role}: {message.content}"


class EchoGeneration:
    def __init__(self, folder: Path, request: Request) -> None:
        self.result: SimpleNamespace | None = None
        self._folder = folder
        self._request = request
        self._words = request.prompt.split()
        self._cancelled = threading.Event()
        self._said = 0
        self._chunks = self._speak()
        self._note("start")

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._chunks)

    def cancel(self) -> None:
        self._cancelled.set()

    def close(self) -> None:
        self.cancel()
        self._note("close")

    def _note(self, event: str) -> None:
        with (self._folder / "journal").open("a") as journal:
            journal.write(f"{event} {self._words[0]} {self._said}\n")

    def _speak(self) -> Iterator[str]:
        for word in self._words:
            kind, _, name = word.partition(":")
            if kind == "gate":
                while not (self._folder / name).exists():
                    if self._cancelled.wait(0.002):
                        self._note("cancelled")
                        raise GenerationCancelled("cancelled")
            elif kind == "fail":
                raise FAILURES[name]
            elif kind == "room":
                if len(self._request.messages) > int(name):
                    raise NoRoomError("it is too long")
            else:
                self._said += 1
                self._note("said")
                acts = {
                    "turns": f"{len(self._request.messages)} {self._request.mode}",
                    "heat": f"{self._request.temperature}",
                    "regex": f"{self._request.regex}",
                    "asked": json.dumps([*map(turn, self._request.messages), self._request.prompt]),
                }
                yield acts.get(kind, word) + " "
        self.result = SimpleNamespace(
            finish_reason="stop",
            input_token_count=len(self._words),
            output_token_count=self._said,
            cached_token_count=0,
            time_to_first_token=0.25,
            tokens_per_second=10.0,
            seed=7 if self._request.seed is None else self._request.seed,
        )


class EchoService:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def generate(self, request: Request) -> EchoGeneration:
        return EchoGeneration(self._folder, request)

    @property
    def healthy(self) -> bool:
        return not (self._folder / "sick").exists()


class Predictor(predict.Predictor):
    def load_service(self, settings: Settings) -> EchoService:  # type: ignore[override]
        return EchoService(Path(os.environ["ECHO_FOLDER"]))
