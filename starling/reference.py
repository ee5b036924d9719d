"""The second engine: transformers' generate, loaded by accelerate. One request at a time; others wait in order.

It has the interface of `Engine`, so everything above (prompts, stops, streaming, cancelling) is the same code. On CUDA
the model is `AutoAWQForCausalLM.from_quantized`; AutoAWQ no longer has a CPU path, so there it is transformers' own
Mistral or Llama over the exact dequantized weights.

Sampling goes through transformers' own processors, in the order of `starling/engine/sampling.py`. A seed means the
same in both engines: the draw is made from the same uniform number, so equal logits give equal tokens. What still
differs: `top_k` keeps every token that ties with the k-th; `top_p` and `min_p` are computed in float32 where the engine
uses float64, so a token right at the threshold may fall on the other side; and there is no prefix cache.
"""

import atexit
import logging
import threading
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from starling.dense import DenseWeights, empty_model, loaded_model
from starling.engine.engine import Delivery, TokenStream, check_request, grammar_error
from starling.engine.runner import device_faults
from starling.engine.scheduler import Counters
from starling.engine.sequence import FinishReason, SamplingParams, TokenConstraint
from starling.engine.step_watch import StepWatch
from starling.errors import DeviceError, EngineError, EngineStoppedError, NotInstalledError, RequestError
from starling.model.config import ModelConfig
from starling.model.memory import free_bytes
from starling.reference_sampling import processors
from starling.settings import Settings

logger = logging.getLogger(__name__)

# The share of free memory that float32 weights may take; the rest is for the KV cache and the activations of a step.
WEIGHTS_SHARE = 0.8


class _Task:
    """One request, from submission to its last delivery."""

    def __init__(self, prompt: list[int], params: SamplingParams, constraint: TokenConstraint | None) -> None:
        self.prompt = prompt
        self.params = params
        self.constraint = constraint
        self.stopped = threading.Event()
        self.ended = False
        self.stream: TokenStream

    def deliver(self, delivery: Delivery) -> None:
        if not self.ended:
            self.ended = delivery.finish is not None
            self.stream.put(delivery)


class ReferenceEngine:
    """Serves token ids, one request at a time. `model` is loaded, on its device, and owned by this engine."""

    def __init__(self, model: PreTrainedModel, context_limit: int, hang_after_s: float) -> None:
        self._model = model
        self._context_limit = context_limit
        self._vocab_size: int = model.config.vocab_size
        self._hang_after_s = hang_after_s
        self._waiting: deque[_Task] = deque()
        self._running: _Task | None = None
        self._change = threading.Condition()  # guards _waiting, _running and _closed
        self._closed = False
        self._watch = StepWatch(hang_after_s)
        self._counters = Counters()
        self._thread = threading.Thread(target=self._serve, name="reference-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # as in Engine: a thread that still computes would crash the exiting process

    @classmethod
    def from_folder(cls, folder: Path, settings: Settings) -> "ReferenceEngine":
        """Load the AWQ checkpoint in `folder`. Raises StarlingError if it cannot be served."""
        config = ModelConfig.from_folder(folder)
        if settings.device == "cuda" and not torch.cuda.is_available():
            raise DeviceError("STARLING_DEVICE is cuda, but torch finds no CUDA device. Use cpu.")
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        on_cuda = settings.device != "cpu" and torch.cuda.is_available()
        model = load_autoawq(folder) if on_cuda else _load_on_cpu(folder)
        return cls(model, config.max_position_embeddings, settings.hang_after_s)

    # -- from any thread -----------------------------------------------------------------------------------------

    def check(self, prompt: list[int], max_tokens: int) -> None:
        """Raises RequestError for a request that can never run, EngineStoppedError while a step hangs."""
        check_request(prompt, max_tokens, self._context_limit, self._vocab_size)
        self._watch.refuse_if_hung()

    def submit(
        self, prompt: list[int], params: SamplingParams, constraint: TokenConstraint | None = None
    ) -> TokenStream:
        """Queue a request. Raises what `check` does, and EngineStoppedError once the engine has stopped."""
        self.check(prompt, params.max_tokens)
        task = _Task(prompt, params, constraint)
        task.stream = TokenStream(lambda: self._cancel(task))
        with self._change:
            if self._closed:
                raise EngineStoppedError("The engine has stopped and takes no requests. Restart the container.")
            self._waiting.append(task)
            self._change.notify()
        return task.stream

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """The model's own logits for the token after `tokens`, float32 [V]. Only while no request runs."""
        ids = torch.tensor([tokens], device=self._model.device)
        last: torch.Tensor = self._model(ids, use_cache=False, logits_to_keep=1).logits[0, -1]
        return last.float()

    @property
    def healthy(self) -> bool:
        """The thread is alive, and no step has been running for longer than `hang_after_s`."""
        return self._thread.is_alive() and not self._closed and not self._watch.hangs

    @property
    def counters(self) -> Counters:
        return self._counters

    @property
    def occupancy(self) -> dict[str, int]:
        """Requests running and waiting; there are no KV blocks to count."""
        return {"running": int(self._running is not None), "waiting": len(self._waiting)}

    def close(self) -> None:
        """End every request with EngineStoppedError and join the thread."""
        atexit.unregister(self.close)
        with self._change:
            self._closed = True
            if self._running is not None:
                self._running.stopped.set()
            self._change.notify()
        self._thread.join(timeout=self._hang_after_s)

    def _cancel(self, task: _Task) -> None:
        task.stopped.set()
        with self._change:
            if task in self._waiting:
                self._waiting.remove(task)
                task.deliver(Delivery([], "cancelled"))

    # -- the engine's thread -------------------------------------------------------------------------------------

    def _serve(self) -> None:
        error = EngineStoppedError("The engine was stopped while the request waited.")
        try:
            while (task := self._next()) is not None:
                self._answer(task)
        except BaseException as fault:
            logger.critical("the engine's thread died", exc_info=True)
            error = EngineStoppedError(f"The engine died: {type(fault).__name__}. Restart the container.")
        with self._change:
            self._closed = True
            for task in filter(None, (self._running, *self._waiting)):
                task.deliver(Delivery([], "error", error))
            self._waiting.clear()

    def _next(self) -> _Task | None:
        with self._change:
            self._running = None
            self._change.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            self._running = self._waiting.popleft()
            return self._running

    def _answer(self, task: _Task) -> None:
        params = task.params
        prompt = torch.tensor([task.prompt], device=self._model.device)
        settings = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False,  # the last processor has already drawn the token
            max_new_tokens=params.max_tokens,
            eos_token_id=None,  # the streamer detects the end
            pad_token_id=0,
        )
        self._watch.begin()
        try:
            with torch.inference_mode(), device_faults():
                self._model.generate(  # type: ignore[operator]
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=settings,
                    logits_processor=processors(len(task.prompt), params, task.constraint),
                    stopping_criteria=StoppingCriteriaList([_Stopped(task)]),
                    streamer=_Streamer(task, self._count),
                )
        except (EngineError, RequestError) as error:
            task.deliver(Delivery([], "error", error))
        except DeviceError:
            raise  # every later request would fail too
        except Exception as fault:
            logger.error("a request failed", exc_info=True)
            message = f"The request failed: {type(fault).__name__}. The server is still running; try again."
            task.deliver(Delivery([], "error", EngineError(message)))
        finally:
            self._watch.end()
        if self._closed:
            stopped = EngineStoppedError("The engine was stopped while the request ran.")
            task.deliver(Delivery([], "error", stopped))
        task.deliver(Delivery([], "cancelled"))

    def _count(self, prompt_tokens: int, decode_tokens: int) -> None:
        """A step has ended, and the next one begins."""
        self._counters.steps += decode_tokens
        self._counters.prefill_tokens += prompt_tokens
        self._counters.decode_tokens += decode_tokens
        self._watch.begin()


def load_autoawq(folder: Path) -> PreTrainedModel:
    """AutoAWQ's model on the first GPU, not fused: its fused layers need kernels that no current torch can load."""
    try:
        with warnings.catch_warnings(record=True):  # it warns of its own deprecation on import
            from awq import AutoAWQForCausalLM
    except ImportError as error:
        raise NotInstalledError(error, before="AutoAWQ's ") from error
    wrapper = AutoAWQForCausalLM.from_quantized(
        str(folder), fuse_layers=False, trust_remote_code=False, device_map={"": 0}
    )
    model: PreTrainedModel = wrapper.model
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    return model


def _load_on_cpu(folder: Path) -> PreTrainedModel:
    weights = DenseWeights(folder)
    needed = 4 * empty_model(weights).num_parameters()
    free = free_bytes(torch.device("cpu"))
    if needed > WEIGHTS_SHARE * free:
        # bfloat16 halves the memory; the weights are then rounded and no longer exact.
        logger.warning("float32 weights take %.1f GB of %.1f GB free: rounding to bfloat16", needed / 1e9, free / 1e9)
        weights = DenseWeights(folder, torch.bfloat16)
    return loaded_model(weights)


class _Streamer(BaseStreamer):
    """Delivers tokens as generate produces them, and decides on the end as the engine does."""

    def __init__(self, task: _Task, count: Callable[[int, int], None]) -> None:
        self._task = task
        self._count = count
        self._generated = -1  # the first put is the prompt

    def put(self, value: torch.Tensor) -> None:
        self._generated += 1
        if self._generated == 0:
            self._count(value.numel(), 0)
            return
        self._count(0, 1)
        task, token = self._task, int(value.item())
        params, constraint = task.params, task.constraint
        finish: FinishReason | None = None
        if token in params.stop_ids:
            finish = "stop"
        elif self._generated >= params.max_tokens:
            finish = "length"
        if constraint is not None:
            if finish is None:
                constraint.advance(token)
            if constraint.fault is not None:
                raise grammar_error(constraint.fault)
        task.deliver(Delivery([token], finish))

    def end(self) -> None:
        pass


class _Stopped(StoppingCriteria):
    """Stops generate once the request is finished or cancelled, or the engine closes."""

    def __init__(self, task: _Task) -> None:
        self._task = task

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        ends = self._task.ended or self._task.stopped.is_set()
        return torch.full((input_ids.shape[0],), ends, device=input_ids.device)
