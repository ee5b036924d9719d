"""A planned step on the device: one forward pass, one token per sampled row."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from starling.engine.cache import BlockCache
from starling.engine.inputs import StepInputs, split
from starling.engine.sampling import RowRules, rules
from starling.engine.scheduler import NO_TOKEN, Work
from starling.errors import DeviceError
from starling.model.batch import Batch
from starling.model.kv_cache import KVCache
from starling.model.mistral import Mistral


class Step(Protocol):
    """A step that has been started."""

    def result(self) -> list[list[int]]:
        """Wait for it. Tokens per work: none for a chunk inside a prompt, else one for the last row and one after each
        draft; NO_TOKEN where the logits are not finite. Called once, and in the order in which steps were started.
        """
        ...


class StepRunner(Protocol):
    """Computes steps in the order in which they are started. Tests and benchmarks use stand-ins.

    `start` and `result` raise DeviceError when the device is lost for good; any other exception ends the requests of
    this step only.
    """

    @property
    def overlaps(self) -> bool:
        """`start` returns while the device still computes: start the next step before asking for this one's result."""
        ...

    @property
    def device_counts(self) -> bool:
        """The device itself counts the tokens of each sequence, so penalties need not wait for those in flight."""
        ...

    def start(self, plan: list[Work]) -> Step:
        """Read all that the step needs of the plan, its sequences and the block tables before returning. Where
        Work.source says so, a token is one that the previously started step samples."""
        ...


@dataclass(frozen=True)
class Done:
    """A step that was computed when it was started."""

    tokens: list[list[int]]

    def result(self) -> list[list[int]]:
        return self.tokens


class Runner:
    """Runs steps on a model, operation by operation."""

    overlaps = False
    device_counts = False

    def __init__(self, model: Mistral, cache: KVCache, books: BlockCache) -> None:
        assert cache.blocks == books.blocks and cache.block_size == books.block_size
        self._model = model
        self._cache = cache
        self._books = books
        self._sampled: torch.Tensor | None = None  # int64 [rows], by the previous step

    def start(self, plan: list[Work]) -> Step:
        sampled = self.compute(StepInputs.of(plan, self._books), rules(plan))
        return Done(split(plan, sampled.tolist()))

    @torch.inference_mode()
    def compute(self, inputs: StepInputs, row_rules: list[RowRules]) -> torch.Tensor:
        """Token ids, int64 [rows]; NO_TOKEN where the logit of a row's id is not finite, as among NaNs."""
        with device_faults():
            logits = self._model.forward(to_batch(inputs, self._model.ops.device, self._sampled), self._cache)
            for rule in row_rules:
                rule.apply(logits)
            settings = (inputs.temperature, inputs.top_k, inputs.top_p, inputs.min_p, inputs.uniform)
            sampled = self._model.ops.sample(logits, *map(torch.from_numpy, settings))
            self._sampled = sampled
            return sampled.where(logits.gather(1, sampled[:, None])[:, 0].isfinite(), NO_TOKEN)


OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation: what torch reports when a graph or pinned memory finds no room


@contextmanager
def device_faults() -> Iterator[None]:
    """Raises DeviceError when torch reports that the device is lost; not when it is out of memory but still works."""
    try:
        yield
    except torch.AcceleratorError as error:
        if getattr(error, "error_code", None) == OUT_OF_MEMORY:
            raise
        raise DeviceError(f"The device is lost: {error}. Restart the container.") from error


def to_batch(inputs: StepInputs, device: torch.device, sampled: torch.Tensor | None = None) -> Batch:
    """The inputs on `device`. `sampled`, as in Batch, is needed where tokens come from the previous step."""

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(device)

    return Batch(
        token_ids=tensor(inputs.token_ids),
        positions=tensor(inputs.positions),
        slots=tensor(inputs.slots),
        query_starts=tensor(inputs.query_starts),
        context_lens=tensor(inputs.context_lens),
        block_tables=tensor(inputs.block_tables),
        prompt_tokens=tensor(inputs.prompt_tokens),
        logit_rows=tensor(inputs.logit_rows),
        sampled=sampled,
    )
