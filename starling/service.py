"""Text in, text out: the only way to the model, for Cog, the command line and Python alike."""

import json
import logging
import secrets
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from starling.chat import END_OF_TURN, Chat
from starling.engine.cache import BlockCache
from starling.engine.engine import Engine, TokenStream
from starling.engine.runner import Runner, StepRunner
from starling.engine.scheduler import Counters, Limits, Scheduler
from starling.engine.sequence import SamplingParams, TokenConstraint
from starling.errors import CheckpointError, DeviceError, NotInstalledError
from starling.generation import Generation, GenerationResult
from starling.grammar import Grammars
from starling.model.config import ModelConfig
from starling.model.kv_cache import KVCache
from starling.model.memory import activation_bytes, finish_loading, kv_cache_budget, kv_cache_room
from starling.model.mistral import Mistral
from starling.model.ops import Ops, choose_ops
from starling.request import MAX_SEED, Request
from starling.settings import Settings
from starling.startup import Startup
from starling.tokenizer import IncrementalDecoder, Tokenizer
from starling.weights import locate_weights

logger = logging.getLogger(__name__)

# A real prediction before the first caller's, to touch every page and every kernel once.
WARM_UP = Request(prompt="Hello", max_tokens=2, temperature=0)


class TokenEngine(Protocol):
    """What the service needs from an engine: from `Engine`, or from the reference that it is compared with."""

    def check(self, prompt: list[int], max_tokens: int) -> None: ...

    def submit(
        self, prompt: list[int], params: SamplingParams, constraint: TokenConstraint | None = None
    ) -> TokenStream: ...

    @property
    def healthy(self) -> bool: ...

    @property
    def occupancy(self) -> dict[str, int]: ...

    @property
    def counters(self) -> Counters: ...

    def close(self) -> None: ...


class Service:
    """A loaded model behind an engine. Safe to use from many threads."""

    def __init__(self, engine: TokenEngine, tokenizer: Tokenizer, bos: int, stop_ids: frozenset[int]) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        end_of_turn = _end_of_turn(tokenizer)
        self._stop_ids = stop_ids | {end_of_turn}
        self._chat = Chat(tokenizer, bos, end_of_turn)
        self._grammars = Grammars(tokenizer, self._stop_ids)

    @classmethod
    def load(cls, settings: Settings) -> "Service":
        """Find the weights, downloading them if allowed, and load them. Raises StarlingError."""
        startup = Startup()
        with startup.lap("weights"):
            located = locate_weights(settings)
        service = cls.from_folder(located.folder, settings, startup)
        with startup.lap("warm_up"):
            service.answer(WARM_UP)
        startup.report(located, settings, service.occupancy)
        return service

    @classmethod
    def from_folder(cls, folder: Path, settings: Settings | None = None, startup: Startup | None = None) -> "Service":
        """Load the AWQ checkpoint in `folder`. Raises StarlingError if it cannot be served."""
        settings, startup = settings or Settings(), startup or Startup()
        config = ModelConfig.from_folder(folder)
        with startup.lap("tokenizer"):
            tokenizer = Tokenizer.from_folder(folder, config.vocab_size)
            _end_of_turn(tokenizer)  # fail before gigabytes are read for nothing
        engine = load_engine(folder, settings, startup)
        with startup.lap("grammars"):
            return cls(engine, tokenizer, config.bos_token_id, frozenset(config.eos_token_ids))

    def generate(self, request: Request) -> Generation:
        """Start an answer. Raises RequestError at once if it cannot run, EngineStoppedError if nothing can."""
        prompt = self._chat.prompt_ids(request)
        self._engine.check(prompt, request.max_tokens)  # before a grammar is compiled, which may take seconds
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
        try:
            return Generation(stream, IncrementalDecoder(self._tokenizer), request, len(prompt), seed, self._journal)
        except BaseException:  # Cog may cancel by raising at any line, and nobody else holds the stream yet
            stream.cancel()
            raise

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

    @property
    def occupancy(self) -> dict[str, int]:
        """How busy the engine is: running and waiting sequences, total and available KV blocks."""
        return self._engine.occupancy

    @property
    def counters(self) -> Counters:
        """A copy of the engine's totals since start."""
        return replace(self._engine.counters)

    def _journal(self, generation: Generation, outcome: str) -> None:
        """Log one line of JSON per finished request, for operators. It never quotes the request or the answer."""
        summary = generation.summary()
        request = generation.request
        line = {
            "event": "request",
            "outcome": outcome,
            "input_tokens": summary.input_token_count,
            "output_tokens": summary.output_token_count,
            "cached_tokens": summary.cached_token_count,
            "first_token_s": round(summary.time_to_first_token, 4),
            "tokens_per_s": round(summary.tokens_per_second, 2),
            "total_s": round(generation.age_s, 4),
            "mode": request.mode,
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "seed": summary.seed,  # also in the answer's metrics, so that the two can be matched
            "constrained": request.json_schema is not None or request.regex is not None,
            **self.occupancy,
        }
        logger.info("%s", json.dumps(line))

    def close(self) -> None:
        self._engine.close()


def _end_of_turn(tokenizer: Tokenizer) -> int:
    """The token that ends a turn. Raises CheckpointError for a model trained on another chat format."""
    try:
        return tokenizer.token_id(END_OF_TURN)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} Only models with OpenChat 3.5's chat format, such as Starling, can be served; this is not one."
        ) from error


def load_engine(folder: Path, settings: Settings, startup: Startup | None = None) -> TokenEngine:
    """The engine that `settings` select, with the AWQ checkpoint in `folder`. Raises StarlingError."""
    startup = startup or Startup()
    if settings.engine == "reference":
        with startup.lap("model"):
            return _load_reference(folder, settings)
    return _load_own(folder, settings, startup)


def _load_own(folder: Path, settings: Settings, startup: Startup) -> TokenEngine:
    with startup.lap("operations"):
        ops = choose_ops(settings.device, settings.threads, settings.cpu_precision, settings.kv_dtype)
        startup.operations = f"{ops.name} on {ops.device}"
    with startup.lap("model"):
        model = Mistral.load(folder, ops)
        finish_loading(ops.device)
    config = model.config
    limits = Limits(
        max_running=settings.max_concurrency,
        prefill_tokens=settings.prefill_tokens or ops.prefill_tokens,
        speculative_rows=settings.speculative_rows,
    )
    with startup.lap("kv_cache"):
        cache = model.allocate_cache(_plan_blocks(model, ops, settings, limits), settings.block_size)
        books = BlockCache(
            cache.blocks,
            cache.block_size,
            rows=limits.max_running,
            max_positions=config.max_position_embeddings,
            window=config.sliding_window,
        )
    with startup.lap("runner"):
        runner = _runner(model, cache, books, limits)
    return Engine(
        Scheduler(books, limits, runner.device_counts),
        runner,
        context_limit=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        hang_after_s=settings.hang_after_s,
    )


def _runner(model: Mistral, cache: KVCache, books: BlockCache, limits: Limits) -> StepRunner:
    if model.ops.device.type != "cuda":
        return Runner(model, cache, books)
    from starling.engine.graph_runner import GraphRunner

    return GraphRunner(model, cache, books, limits)


def _load_reference(folder: Path, settings: Settings) -> TokenEngine:
    try:
        from starling.reference import ReferenceEngine  # transformers takes seconds to import, and serving does without
    except ImportError as error:
        raise NotInstalledError(error, before="STARLING_ENGINE is reference, and ") from error
    return ReferenceEngine.from_folder(folder, settings)


def _plan_blocks(model: Mistral, ops: Ops, settings: Settings, limits: Limits) -> int:
    """KV blocks to allocate: as many as all running sequences can use, or fewer if memory does not allow that."""
    config, size = model.config, settings.block_size
    per_block = KVCache.bytes_per_block(config, size, ops.kv_dtype)
    positions = config.max_position_embeddings
    most = limits.max_running * (-(-positions // size) + 1)
    step_bytes = activation_bytes(config, limits.prefill_tokens + limits.max_running + limits.speculative_rows)
    budget = settings.kv_cache_bytes or kv_cache_budget(ops.device, step_bytes)
    blocks = min(most, budget // per_block)
    if blocks < 1:
        raise DeviceError(
            f"The KV cache may take {budget} bytes, but one block of {size} positions needs {per_block}. "
            "Free some memory, or raise STARLING_KV_CACHE_BYTES."
        )
    if settings.kv_cache_bytes and blocks * per_block > (room := kv_cache_room(ops.device, step_bytes)):
        raise DeviceError(
            f"STARLING_KV_CACHE_BYTES is {settings.kv_cache_bytes}. The KV cache would take {blocks * per_block} bytes "
            f"of that; memory has room for {room}. Lower it, or leave it unset."
        )
    logger.info("KV cache: %d blocks of %d positions, %.2f GB", blocks, size, blocks * per_block / 1e9)
    if (held := blocks * size) < positions:
        logger.warning("the KV cache holds %d of the %d tokens of the context: longer requests fail", held, positions)
    return blocks
