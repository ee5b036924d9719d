"""The Cog predictor: inputs become a request, and its text streams back.

Cog reads the signature of `predict` from this source without running it. So `Input` is called by its bare name, bounds
and defaults are literals, and each description is a single literal without a backslash. starling/request.py decides the
bounds and defaults; a test holds the two equal.
"""

import os
import time
import traceback
from typing import TYPE_CHECKING

from cog import BasePredictor, ConcatenateIterator, Input, concurrent, streaming

from starling.coglet import current_signal, discard_folders, drain, install_cancellation
from starling.garbage import frozen_heap
from starling.logs import configure as configure_logs
from starling.request import Request
from starling.settings import Settings

if TYPE_CHECKING:
    from starling.generation import Generation
    from starling.service import Service

LOG_GRACE_S = 0.5  # when setup fails, coglet ends the worker at once, and loses any log output it has not read by then
METRICS = (
    "input_token_count", "output_token_count", "cached_token_count", "time_to_first_token", "tokens_per_second",
    "finish_reason", "seed",
)  # fmt: skip


class Predictor(BasePredictor):
    def setup(self) -> None:  # type: ignore[override]
        """Load the model. Cog keeps only one line of an exception raised here, so print the whole traceback."""
        try:
            configure_logs()
            install_cancellation()
            with frozen_heap():
                self.service = self.load_service(Settings.from_env(os.environ))
        except BaseException:
            traceback.print_exc()
            time.sleep(LOG_GRACE_S)
            raise

    def load_service(self, settings: Settings) -> "Service":
        from starling.service import Service  # here, so that a failed import also gets its traceback printed

        return Service.load(settings)

    async def healthcheck(self) -> bool:
        """True while the engine makes progress. Async, so that a dead event loop fails it too."""
        return self.service.healthy

    @streaming
    @concurrent(max=32)
    async def predict(
        self,
        prompt: str = Input(default="", description="What to ask. May be blank if messages end with a user turn."),
        system_prompt: str = Input(default="", description="Instructions placed before the conversation."),
        messages: list[dict[str, str]] = Input(
            default=[], description="Earlier turns, oldest first, each with role (system, user, assistant) and content."
        ),
        mode: str = Input(
            default="chat", choices=["chat", "code"], description="chat for general use, code for programming tasks."
        ),
        max_tokens: int = Input(default=512, ge=1, le=8192, description="Maximum number of tokens in the answer."),
        min_tokens: int = Input(
            default=0, ge=0, le=8192, description="Minimum tokens in the answer. A schema or regex can end it sooner."
        ),
        temperature: float = Input(
            default=0.7, ge=0, le=5, description="Higher is more varied. 0 is greedy: always the likeliest token."
        ),
        top_p: float = Input(
            default=0.95, ge=0, le=1, description="Keep the likeliest tokens adding up to this probability. 1 is off."
        ),
        top_k: int = Input(default=0, ge=-1, description="Keep this many of the likeliest tokens. 0 and -1 are off."),
        min_p: float = Input(
            default=0.0, ge=0, le=1, description="Drop tokens below this fraction of the top probability. 0 is off."
        ),
        presence_penalty: float = Input(
            default=0.0, ge=-2, le=2, description="Above 0, tokens already in the answer become less likely. 0 is off."
        ),
        frequency_penalty: float = Input(
            default=0.0, ge=-2, le=2, description="Like presence_penalty, but grows with each occurrence. 0 is off."
        ),
        repetition_penalty: float = Input(
            default=1.0, ge=0.1, le=10, description="Above 1, tokens in prompt or answer become less likely. 1 is off."
        ),
        stop_sequences: str = Input(
            default="",
            description='Texts that end the answer: comma-separated (spaces count) or a JSON list like ["one", "two"].',
        ),
        seed: int | None = Input(
            default=None,
            ge=0,
            le=4294967295,
            description="The same seed repeats an answer. If blank, a random one is used and reported in the metrics.",
        ),
        prompt_template: str | None = Input(
            default=None,
            description="Raw text used instead of the chat format. Must contain {prompt}; may contain {system_prompt}.",
        ),
        max_new_tokens: int | None = Input(
            default=None, ge=1, le=8192, deprecated=True, description="The old name of max_tokens."
        ),
        json_schema: str | None = Input(default=None, description="A JSON Schema that the answer must follow."),
        regex: str | None = Input(default=None, description="A regular expression that the whole answer must match."),
    ) -> ConcatenateIterator[str]:
        """Answer a prompt. A coroutine that returns a generator: the only form that coglet streams concurrently."""
        inputs = {name: value for name, value in locals().items() if name != "self"}
        discard_folders()
        # Read here: on the thread that drains the generator, `self.scope` belongs to whichever prediction began last.
        scope = self.scope

        def record(generation: "Generation") -> None:
            for name in METRICS:
                scope.record_metric(name, getattr(generation.result, name))

        return drain(lambda: self.service.generate(Request.parse(**inputs)), record, current_signal())  # type: ignore[return-value]
