"""A step's inputs in one contiguous buffer, so that one copy brings them to the device."""

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from starling.engine.inputs import StepInputs
from starling.engine.speculation import MAX_DRAFT
from starling.model.batch import Batch
from starling.model.ops.cuda.sampling import SETTINGS

ALIGNMENT = 16  # bytes
TAIL = 2 + MAX_DRAFT  # most tokens of a sequence that its row of counts lacks: confirmed, in flight, drafts
HOST_BUFFERS = 2  # used in turn: a step's inputs are written while the previous step's may not be copied yet
Memory = TypeVar("Memory", torch.Tensor, np.ndarray)


class Upload:
    """A buffer on the device, and one of the same size on the host for each turn, pinned where there is a GPU."""

    def __init__(self, device: torch.device, size: int) -> None:
        cuda = device.type == "cuda"
        self.device = torch.zeros(size, dtype=torch.uint8, device=device)
        self.host = [torch.zeros(size, dtype=torch.uint8, pin_memory=cuda) for _ in range(HOST_BUFFERS)]
        self._done = [torch.cuda.Event() for _ in range(HOST_BUFFERS)] if cuda else []  # type: ignore[no-untyped-call]

    def wait(self, turn: int) -> None:
        """Wait until the host's buffer of `turn` may be written again."""
        if self._done:
            self._done[turn].synchronize()

    def send(self, turn: int, size: int) -> None:
        """Queue the copy of the first `size` bytes on the current stream."""
        self.device[:size].copy_(self.host[turn][:size], non_blocking=True)
        if self._done:
            self._done[turn].record()


@dataclass(frozen=True)
class Shape:
    """Sizes of a step."""

    tokens: int
    works: int
    blocks: int  # of each block table
    rows: int  # of logits


class Frame:
    """Views of an Upload for steps of one shape, named as in StepInputs and SamplingKernels.sample."""

    def __init__(self, shape: Shape, upload: Upload | None = None) -> None:
        self.shape = shape
        self._parts: dict[str, tuple[int, int, tuple[int, ...]]] = {}  # name → begin and end in bytes, shape
        self.size = 0  # bytes
        self._place("token_ids", 4, shape.tokens)
        self._place("positions", 4, shape.tokens)
        self._place("slots", 4, shape.tokens)
        self._place("query_starts", 4, shape.works + 1)
        self._place("context_lens", 4, shape.works)
        self._place("block_tables", 4, shape.works, shape.blocks)
        self._place("logit_rows", 4, shape.rows)
        self._place("tail", 4, max(1, shape.rows * TAIL))
        self._place("settings", 1, shape.rows, SETTINGS.itemsize)
        if upload is not None:
            self.device = self._views(upload.device, upload.device[: self.size].view(torch.int32))
            hosts = [host.numpy() for host in upload.host]
            self.host = [self._views(host, host[: self.size].view(np.int32)) for host in hosts]

    def write(self, turn: int, inputs: StepInputs) -> None:
        """Write all but the sampler's inputs. What the step leaves unused becomes padding that changes nothing."""
        host = self.host[turn]
        tokens, works = len(inputs.token_ids), len(inputs.context_lens)
        host["token_ids"][:tokens] = inputs.token_ids
        host["token_ids"][tokens:] = 0
        host["positions"][:tokens] = inputs.positions
        host["positions"][tokens:] = 0
        host["slots"][:tokens] = inputs.slots
        host["slots"][tokens:] = -1
        host["query_starts"][: works + 1] = inputs.query_starts
        host["query_starts"][works + 1 :] = tokens
        host["context_lens"][:works] = inputs.context_lens
        host["context_lens"][works:] = 0
        host["block_tables"][:works, : inputs.block_tables.shape[1]] = inputs.block_tables
        host["logit_rows"][: len(inputs.logit_rows)] = inputs.logit_rows
        host["logit_rows"][len(inputs.logit_rows) :] = 0

    def batch(self, prompt_tokens: torch.Tensor, sampled: torch.Tensor, decodes: bool) -> Batch:
        """The frame on the device. `prompt_tokens` is bool [at least the frame's tokens], the others as in Batch."""
        names = ("token_ids", "positions", "slots", "query_starts", "context_lens", "block_tables", "logit_rows")
        tensors = {name: self.device[name] for name in names}
        return Batch(**tensors, prompt_tokens=prompt_tokens[: self.shape.tokens], sampled=sampled, decodes=decodes)

    def _place(self, name: str, itemsize: int, *shape: int) -> None:
        length = itemsize * math.prod(shape)
        self._parts[name] = (self.size, self.size + length, shape)
        self.size += -(-length // ALIGNMENT) * ALIGNMENT

    def _views(self, memory: Memory, words: Memory) -> dict[str, Memory]:
        """Views of `memory`, uint8 [at least `size`]; `words` is the same as int32.

        A step with prompts makes a frame of its own while the device may be waiting: so only an operation or two each.
        """
        return {
            name: (memory[begin:end] if name == "settings" else words[begin // 4 : end // 4]).reshape(shape)
            for name, (begin, end, shape) in self._parts.items()
        }
