"""Text in, text out: the one way to the model, for Cog, the command line and Python alike."""

import logging
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from starling.chat import END_OF_TURN, Chat, ReplyStart
from starling.engine.cache import BlockCache
from starling.engine.engine import Delivery, Engine, TokenStream
from starling.engine.runner import Runner
from starling.engine.scheduler import Limits, Scheduler
from starling.engine.sequence import SamplingParams
from starling.errors import DeviceError, GenerationCancelled
from starling.grammar import Grammars
from starling.model.kv_cache import KVCache
from starling.model.memory import free_bytes
from starling.model.mistral import Mistral
from starling.model.ops import Ops, choose_ops
from starling.request import MAX_SEED, Request
from starling.settings import Settings
from starling.stops import StopMatcher
from starling.tokenizer import IncrementalDecoder, Tokenizer

logger = logging.getLogger(__name__)

# Chunks after the first are sent this far apart at least: a reader sees no difference, a server does.
COALESCE_S = 0.04
# Of the memory that is free once the weights are loaded, the KV cache takes at most this share.
KV_SHARE = 0.5


@dataclass(frozen=True)
class GenerationResult:
    """What one request came to."""

    text: str
    finish_reason: Literal["stop", "length", "stop_sequence"]
    input_token_count: int
    output_token_count: int  # without the token that ends the turn
    cached_token_count: int  # prompt tokens that were still in the cache
    time_to_first_token: float  # seconds from submission
    tokens_per_second: float  # from the first token to the last; of a single token, from submission
    seed: int


class Generation(Iterator[str]):
    """One answer in the making: chunks of text, the first at once and later ones about 40 ms apart.

    Iterating raises GenerationCancelled after `cancel`, EngineError when the engine failed. `result` is set once
    iteration has ended by itself.
    """

    def __init__(
        self, stream: TokenStream, decoder: IncrementalDecoder, request: Request, input_token_count: int, seed: int
    ) -> None:
        self.result: GenerationResult | None = None
        self._stream = stream
        self._decoder = decoder
        self._reply = ReplyStart()
        self._stops = StopMatcher(request.stop_sequences)
        self._min_tokens = request.min_tokens
        self._input_token_count = input_token_count
        self._seed = seed
        self._submitted_s = time.monotonic()
        self._first_s: float | None = None
        self._last_s = self._submitted_s
        self._tokens = 0
        self._cached_tokens = 0
        self._text: list[str] = []
        self._chunks = self._coalesce()

    def __next__(self) -> str:
        return next(self._chunks)

    def cancel(self) -> None:
        """Stop the generation; from any thread."""
        self._stream.cancel()

    def close(self) -> None:
        """Stop the generation if it still runs; the iterator ends."""
        self._stream.cancel()

    def _coalesce(self) -> Iterator[str]:
        buffer, sent_s = "", -COALESCE_S
        finish: str | None = None
        try:
            while finish is None:
                delivery = self._stream.get(max(0.0, sent_s + COALESCE_S - time.monotonic()) if buffer else None)
                if delivery is not None:
                    text, finish = self._take(delivery)
                    buffer += text
                if finish is None and buffer and time.monotonic() - sent_s >= COALESCE_S:
                    self._text.append(buffer)
                    yield buffer
                    buffer, sent_s = "", time.monotonic()
        finally:
            self._stream.cancel()
        if buffer:
            self._text.append(buffer)
            yield buffer
        self.result = self._summary(finish)

    def _take(self, delivery: Delivery) -> tuple[str, str | None]:
        """The text that a delivery adds, and why the answer ends with it, if it does."""
        if delivery.error is not None:
            raise delivery.error
        if delivery.finish == "cancelled":
            raise GenerationCancelled("The generation was cancelled.")
        self._cached_tokens = delivery.cached_tokens
        tokens = delivery.tokens[:-1] if delivery.finish == "stop" else delivery.tokens
        self._last_s = time.monotonic()
        if self._first_s is None:
            self._first_s = self._last_s
        text = ""
        for token in tokens:
            self._tokens += 1
            text += self._show(self._decoder.feed(token))
            if self._stops.matched is not None:
                return text, "stop_sequence"
        if delivery.finish is not None:
            text += self._show(self._decoder.flush())
            if self._stops.matched is not None:
                return text, "stop_sequence"
            text += self._stops.flush()
        return text, delivery.finish

    def _show(self, text: str) -> str:
        text = self._reply.feed(text)
        # A stop counts only once min_tokens have been made; what came before it is plain text.
        return self._stops.feed(text) if self._tokens > self._min_tokens else text

    def _summary(self, finish: str) -> GenerationResult:
        first_s = self._first_s or self._last_s
        since, made = (first_s, self._tokens - 1) if self._tokens > 1 else (self._submitted_s, self._tokens)
        return GenerationResult(
            text="".join(self._text),
            finish_reason=finish,  # type: ignore[arg-type]
            input_token_count=self._input_token_count,
            output_token_count=self._tokens,
            cached_token_count=self._cached_tokens,
            time_to_first_token=first_s - self._submitted_s,
            tokens_per_second=made / max(self._last_s - since, 1e-9),
            seed=self._seed,
        )


class Service:
    """A loaded model behind an engine. Safe to use from many threads."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, bos: int, stop_ids: frozenset[int]) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        end_of_turn = tokenizer.token_id(END_OF_TURN)
        self._stop_ids = stop_ids | {end_of_turn}
        self._chat = Chat(tokenizer, bos, end_of_turn)
        self._grammars = Grammars(tokenizer, self._stop_ids)

    @classmethod
    def from_folder(cls, folder: Path, settings: Settings | None = None) -> "Service":
        """Load the AWQ checkpoint in `folder`. Raises StarlingError when it cannot be served."""
        settings = settings or Settings()
        ops = choose_ops(settings.device)
        model = Mistral.load(folder, ops)
        config = model.config
        tokenizer = Tokenizer.from_folder(folder, config.vocab_size)
        limits = Limits(
            max_running=settings.max_concurrency,
            prefill_tokens=settings.prefill_tokens,
            speculative_rows=settings.speculative_rows,
        )
        cache = model.allocate_cache(_plan_blocks(model, ops, settings, limits), settings.block_size)
        books = BlockCache(
            cache.blocks,
            cache.block_size,
            rows=limits.max_running,
            max_positions=config.max_position_embeddings,
            window=config.sliding_window,
        )
        engine = Engine(
            Scheduler(books, limits),
            Runner(model, cache, books),
            context_limit=config.max_position_embeddings,
            vocab_size=config.vocab_size,
            hang_after_s=settings.hang_after_s,
        )
        return cls(engine, tokenizer, config.bos_token_id, frozenset(config.eos_token_ids))

    def generate(self, request: Request) -> Generation:
        """Start an answer. Raises RequestError at once for what cannot run, EngineStoppedError when nothing can."""
        prompt = self._chat.prompt_ids(request)
        seed = secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed
        params = SamplingParams(
            max_tokens=request.max_tokens,
            stop_ids=self._stop_ids,
            seed=seed,
            min_tokens=request.min_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            min_p=request.min_p,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            repetition_penalty=request.repetition_penalty,
        )
        stream = self._engine.submit(prompt, params, self._grammars.constraint(request))
        return Generation(stream, IncrementalDecoder(self._tokenizer), request, len(prompt), seed)

    def answer(self, request: Request) -> GenerationResult:
        """The whole answer at once."""
        generation = self.generate(request)
        for _ in generation:
            pass
        assert generation.result is not None
        return generation.result

    @property
    def healthy(self) -> bool:
        return self._engine.healthy

    def close(self) -> None:
        self._engine.close()


def _plan_blocks(model: Mistral, ops: Ops, settings: Settings, limits: Limits) -> int:
    """KV blocks to allocate: what every running sequence can use at most, or what memory allows if that is less."""
    config, size = model.config, settings.block_size
    per_block = KVCache.bytes_per_block(config, size, ops.kv_dtype)
    positions = config.max_position_embeddings
    most = limits.max_running * (-(-positions // size) + 1)
    budget = settings.kv_cache_bytes or int(free_bytes(ops.device) * KV_SHARE)
    blocks = min(most, budget // per_block)
    if blocks < 1:
        raise DeviceError(
            f"The KV cache may take {budget} bytes, and one block of {size} positions needs {per_block}. "
            "Free some memory, or raise STARLING_KV_CACHE_BYTES."
        )
    logger.info("KV cache: %d blocks of %d positions, %.2f GB", blocks, size, blocks * per_block / 1e9)
    return blocks
