"""Steps on a GPU: one copy brings a step's inputs, decodes replay a captured graph, results come one step behind.

Everything is queued on one stream, in the order of the steps. A step of decodes alone, with drafts or without, is
padded to the next of SIZES and replayed as one graph, from the embedding to the drawn ids; a step with prompts is
queued kernel by kernel. So is the first step of each size, which is then captured; if the capture fails, later steps of
that size are queued that way too.
"""

import logging
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass

import numpy as np
import torch

from starling.engine.cache import BlockCache
from starling.engine.frame import HOST_BUFFERS, Frame, Shape, Upload
from starling.engine.inputs import StepInputs, split
from starling.engine.runner import Step, device_faults
from starling.engine.scheduler import NO_TOKEN, Limits, Work
from starling.engine.shaping import Shaping
from starling.model.batch import Batch
from starling.model.kv_cache import KVCache
from starling.model.mistral import Mistral
from starling.model.ops.cuda import CudaOps

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # tokens in a captured step: decodes and their drafts
# Graphs whose capture could not be ended. torch's allocator of pinned memory goes on asking each of them, by its
# address, which memory is its own: none may ever be freed.
_UNFINISHED_CAPTURES: list[torch.cuda.CUDAGraph] = []


@dataclass(frozen=True)
class InFlight:
    """A step that the device is computing or has computed."""

    plan: list[Work]
    rows: int
    results: torch.Tensor  # int32 [2, at least `rows`], on the host once `arrived`: ids; 1 where none could be drawn
    arrived: torch.cuda.Event | None

    def result(self) -> list[list[int]]:
        if self.arrived is not None:
            with device_faults():
                self.arrived.synchronize()
        ids, faults = self.results[:, : self.rows].tolist()
        return split(self.plan, [NO_TOKEN if fault else id for id, fault in zip(ids, faults, strict=True)])


@dataclass
class Decodes:
    """A step of `frame.shape.tokens` decodes and drafts, each of which has logits, and its graph once captured."""

    frame: Frame
    batch: Batch
    graph: torch.cuda.CUDAGraph | None = None
    capture_failed: bool = False  # and is not tried again


class GraphRunner:
    """Runs steps on a model whose operations are CudaOps."""

    overlaps = True
    device_counts = True

    def __init__(self, model: Mistral, cache: KVCache, books: BlockCache, limits: Limits) -> None:
        ops = model.ops
        assert isinstance(ops, CudaOps)
        assert cache.blocks == books.blocks and cache.block_size == books.block_size
        self._model, self._cache, self._books = model, cache, books
        largest = max(limits.max_running, limits.speculative_rows)
        self._sizes = [size for size in SIZES if size < 2 * largest]
        assert self._sizes[-1] >= largest
        works, blocks = self._sizes[-1], books.tables.shape[1]
        rows = max(works, limits.max_running + limits.speculative_rows)
        tokens = limits.prefill_tokens + rows
        self._inputs = Upload(ops.device, Frame(Shape(tokens, works, blocks, rows)).size)
        mask_bytes = -(-model.config.vocab_size // 32) * 4
        self._mask_upload = Upload(ops.device, rows * mask_bytes)
        self._masks = self._mask_upload.device.view(torch.int32).view(rows, -1)
        self._mask_bytes = mask_bytes
        self._sampling = ops.sampling(rows, model.config.vocab_size, limits.max_running)
        self._shaping = Shaping(self._recount)
        self._prompt_tokens = torch.zeros(tokens, dtype=torch.bool, device=ops.device)  # none: all are computed alike
        self._decodes: dict[int, Decodes] = {}
        self._turn = 0
        self._cuda = ops.device.type == "cuda"  # False in tests that run the kernels on an emulated device
        self._results = [torch.empty(2, rows, dtype=torch.int32, pin_memory=self._cuda) for _ in range(HOST_BUFFERS)]
        self._arrived = [torch.cuda.Event() for _ in range(HOST_BUFFERS)] if self._cuda else []  # type: ignore[no-untyped-call]
        if self._cuda:
            self._stream = torch.cuda.Stream(ops.device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(ops.device))  # it has loaded the weights
            self._pool = torch.cuda.graph_pool_handle()

    @torch.inference_mode()
    def start(self, plan: list[Work]) -> Step:
        inputs = StepInputs.of(plan, self._books)
        self._turn = (self._turn + 1) % HOST_BUFFERS
        with device_faults(), self._on_stream():
            decodes = self._decodes_for(inputs)
            frame = decodes.frame if decodes else self._frame_for(inputs)
            self._send(frame, plan, inputs)
            if decodes and decodes.graph:
                decodes.graph.replay()
            else:
                self._compute(frame, decodes.batch if decodes else self._batch(frame, decodes=False))
                if decodes and not decodes.capture_failed:
                    self._try_to_capture(decodes)
            return self._receive(plan, len(inputs.logit_rows))

    @torch.inference_mode()
    def replay(self, tokens: int) -> None:
        """Queue the latest step of `tokens` decodes again, on the current stream, for benchmarks that time it alone."""
        decodes = self._decodes[self._padded(tokens)]
        if decodes.graph:
            decodes.graph.replay()
        else:
            self._compute(decodes.frame, decodes.batch)

    # -- inside --------------------------------------------------------------------------------------------------

    def _decodes_for(self, inputs: StepInputs) -> Decodes | None:
        """The padded step, if every token has logits: all but the first of a work are drafts. None for any other.

        Nor for one larger than any graph: decodes and their drafts fit, but new requests whose prompts are cached but
        for the last token may come on top.
        """
        tokens = len(inputs.token_ids)
        if tokens != len(inputs.logit_rows) or tokens > self._sizes[-1]:
            return None
        size = self._padded(tokens)
        if size not in self._decodes:
            frame = Frame(Shape(size, size, self._books.tables.shape[1], size), self._inputs)
            self._decodes[size] = Decodes(frame, self._batch(frame, decodes=True))
        return self._decodes[size]

    def _padded(self, tokens: int) -> int:
        return next(size for size in self._sizes if size >= tokens)

    def _frame_for(self, inputs: StepInputs) -> Frame:
        works, blocks = inputs.block_tables.shape
        return Frame(Shape(len(inputs.token_ids), works, blocks, len(inputs.logit_rows)), self._inputs)

    def _send(self, frame: Frame, plan: list[Work], inputs: StepInputs) -> None:
        self._inputs.wait(self._turn)
        self._mask_upload.wait(self._turn)
        host = frame.host[self._turn]
        masks = self._mask_upload.host[self._turn].view(torch.int32).view(self._masks.shape).numpy().view(np.uint32)
        frame.write(self._turn, inputs)
        used = self._shaping.write(plan, inputs, host["settings"], host["tail"], masks)
        self._inputs.send(self._turn, frame.size)
        if used:
            self._mask_upload.send(self._turn, used * self._mask_bytes)

    def _batch(self, frame: Frame, decodes: bool) -> Batch:
        return frame.batch(self._prompt_tokens, self._sampling.results[0], decodes)

    def _compute(self, frame: Frame, batch: Batch) -> None:
        """The part of a step that a graph holds: everything between copying the inputs in and the results out."""
        logits = self._model.forward(batch, self._cache)
        if frame.shape.rows:
            device = frame.device
            self._sampling.sample(logits, device["settings"], device["tail"], self._masks)

    def _try_to_capture(self, decodes: Decodes) -> None:
        """The step itself is already queued, so its requests need not fail for want of memory for a graph, say.

        If the device is lost, the next operation reports it.
        """
        try:
            decodes.graph = self._capture(decodes) if self._cuda else None
        except Exception:
            decodes.capture_failed = True
            tokens = decodes.frame.shape.tokens
            logger.exception("steps of %d decodes could not be captured: they run kernel by kernel, slower", tokens)

    def _capture(self, decodes: Decodes) -> torch.cuda.CUDAGraph:
        # Not torch.cuda.graph, which first waits for the device and collects garbage: running answers would stall.
        # All sizes share a pool and replay in any order: nothing in it outlives a step, and steps run one by one.
        graph = torch.cuda.CUDAGraph()
        try:
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            self._compute(decodes.frame, decodes.batch)
            graph.capture_end()
        except BaseException:
            # Otherwise what is queued from now on would be recorded and never computed. Where a call has broken the
            # capture, ending it fails too, and would hide that call's own error.
            with suppress(RuntimeError):
                graph.capture_end()
            try:
                graph.pool()  # fails unless the capture has ended
            except RuntimeError:
                _UNFINISHED_CAPTURES.append(graph)
                # As capture_end would have. During a capture the allocator frees nothing that another stream has used.
                with suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
            self._pool = torch.cuda.graph_pool_handle()  # torch refuses a pool whose last graph is gone
            raise
        return graph

    def _receive(self, plan: list[Work], rows: int) -> InFlight:
        results = self._results[self._turn]
        results.copy_(self._sampling.results, non_blocking=True)
        if not self._cuda:
            return InFlight(plan, rows, results, None)
        arrived = self._arrived[self._turn]
        arrived.record()
        return InFlight(plan, rows, results, arrived)

    def _recount(self, row: int, tokens: list[int], prompt_length: int) -> None:
        # From pinned memory, or the copy would wait for the step in flight. torch keeps it until the copy is done.
        ids = torch.tensor(tokens, dtype=torch.int32, pin_memory=self._cuda)
        self._sampling.count(row, ids.to(self._sampling.results.device, non_blocking=True), prompt_length)

    def _on_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._cuda else nullcontext()
