"""Logits → token ids on the device: penalties, masks, and the draw, without a round trip to the host.

A penalised sequence's tokens are counted in a row of a table on the device. The table may lag behind: a step lists the
tokens that the row lacks (the tail: those that the host has confirmed since, the last of which may still be in flight,
then the drafts before the position to sample), and says how many of them to add to the table now. So no drawn token is
counted before the host lists it as kept, and nothing ever has to be undone.
"""

from collections.abc import Callable

import numpy as np
import torch

from starling.errors import DeviceError
from starling.model.ops.cuda.module import Module

MAX_VOCABULARY = 1 << 16  # ids take 16 bits of a rank, and the sum of that many weights 64
CHUNK, BINS = 1024, 2048
SHAPE_THREADS, DRAW_THREADS, DRAW_SHARED_BYTES = 256, 1024, 29216

# How one row of logits is sampled; `Settings` in sampling.cu. All zeros: greedy and unshaped, which suits padding.
SETTINGS = np.dtype(
    [
        ("uniform", np.uint64),  # * 2^64
        ("top_p", np.uint64),  # * 2^64; all ones: off
        ("span", np.float64),  # temperature * log(min_p)
        ("inverse", np.float32),  # 1 / temperature; 0: greedy
        ("repetition", np.float32),  # the penalties, read where `table` is not 0
        ("frequency", np.float32),
        ("presence", np.float32),
        ("top_k", np.int32),  # 0: off
        ("table", np.int32),  # 1 + row of the table of counts; 0: not penalised
        ("tail", np.int32),  # where this row's tail begins in `tail`
        ("seen", np.int32),  # how many tokens of the tail precede the one to draw
        ("commits", np.int32),  # leading tokens of the tail to add to the table; 0 in all but one row of a sequence
        ("mask", np.int32),  # 1 + row of the masks; 0: none
    ]
)


def settings_of(
    temperature: np.ndarray, top_k: np.ndarray, top_p: np.ndarray, min_p: np.ndarray, uniform: np.ndarray
) -> np.ndarray:
    """SETTINGS [rows] for the arguments of Ops.sample, each [rows]. Nothing is shaped unless more is filled in."""
    settings = np.zeros(len(temperature), dtype=SETTINGS)
    drawn = temperature > 0
    settings["uniform"] = np.ldexp(uniform, 64).astype(np.uint64)
    off = top_p >= 1
    settings["top_p"] = np.where(off, ~np.uint64(0), np.ldexp(np.where(off, 0, top_p), 64).astype(np.uint64))
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        settings["span"] = np.where(drawn, temperature, 1) * np.log(min_p)
        inverse = np.minimum(1 / temperature, np.finfo(np.float32).max)
    settings["inverse"] = np.where(drawn, inverse, 0)
    settings["top_k"] = np.minimum(top_k, MAX_VOCABULARY)
    return settings


class SamplingKernels:
    """Samples at most `rows` rows of `vocabulary` logits a step; keeps token counts for `sequences` sequences.

    Raises DeviceError if the vocabulary is larger than the kernels support.
    """

    def __init__(
        self, load: Callable[[str], Module], device: torch.device, rows: int, vocabulary: int, sequences: int
    ) -> None:
        if vocabulary > MAX_VOCABULARY:
            raise DeviceError(
                f"The vocabulary has {vocabulary} tokens: the CUDA kernels support at most {MAX_VOCABULARY}."
            )
        self._module = load("sampling")
        self._vocabulary = vocabulary
        self._chunks = -(-vocabulary // CHUNK)
        self._table = torch.zeros(sequences, vocabulary, dtype=torch.int32, device=device)
        self._largest = torch.zeros(rows, self._chunks, dtype=torch.int64, device=device)
        self._sums = torch.zeros(rows, self._chunks, dtype=torch.int64, device=device)
        self._counts = torch.zeros(rows, BINS, dtype=torch.int32, device=device)
        self._weights = torch.zeros(rows, BINS, dtype=torch.int64, device=device)
        # int32 [2, rows]: the ids that the latest step drew, and whether a row had no token to draw.
        self.results = torch.zeros(2, rows, dtype=torch.int32, device=device)

    def count(self, row: int, tokens: torch.Tensor, prompt_length: int) -> None:
        """Rebuild row `row` of the table from int32 `tokens`, the first `prompt_length` of which are the prompt's.

        For a penalised sequence that starts or resumes; its row need not be cleared by the previous owner.
        """
        assert tokens.dtype == torch.int32 and 0 <= row < len(self._table)
        self._module.launch(
            "count", (1, 1, 1), 1024, 0, self._table, row, tokens, tokens.numel(), prompt_length, self._vocabulary
        )

    def sample(
        self,
        logits: torch.Tensor,
        settings: torch.Tensor,
        tail: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """float32 logits [rows, V] → int32 ids [rows], a view of `results` (always valid ids, whatever the logits).

        `settings` is uint8 [rows, 64], the bytes of SETTINGS; logits of rows that it shapes change in place. `tail` is
        int32 [any]: tokens that the table lacks; an id below 0 is -(1 + row) of the previous `results`. `masks` is
        int32 [any, ceil(V / 32)]: bit t % 32 of word t / 32 says that t may be drawn. If a row holds a NaN or +inf, or
        only -inf, its id is 0 and its fault 1.
        """
        rows, vocabulary = logits.shape
        assert vocabulary == self._vocabulary and rows <= self.results.shape[1]
        assert logits.dtype == torch.float32 and settings.shape == (rows, SETTINGS.itemsize)
        assert settings.dtype == torch.uint8
        assert all(ids is None or ids.dtype == torch.int32 for ids in (tail, masks))
        assert masks is None or masks.shape[1] == -(-vocabulary // 32)
        resolved = None if tail is None else torch.empty_like(tail)
        grid, warps_bytes = (self._chunks, rows, 1), 8 * SHAPE_THREADS // 32
        self._module.launch(
            "shape", grid, SHAPE_THREADS, warps_bytes, logits, settings, self._table, tail, resolved, self.results,
            masks, self._largest, self._counts, self._weights, vocabulary,
        )  # fmt: skip
        self._module.launch(
            "weigh", grid, SHAPE_THREADS, warps_bytes, logits, settings, self._largest, self._sums, self._counts,
            self._weights, vocabulary,
        )  # fmt: skip
        self._module.launch(
            "draw", (rows, 1, 1), DRAW_THREADS, DRAW_SHARED_BYTES, logits, settings, self._largest, self._sums,
            self._counts, self._weights, self._chunks, self._table, resolved, self.results, self.results.shape[1],
            vocabulary,
        )  # fmt: skip
        return self.results[0, :rows]
