"""The small operations on a GPU: embedding, activation, and row selection."""

from collections.abc import Callable

import torch

from starling.model.ops.cuda.module import Module


class ElementwiseKernels:
    def __init__(self, load: Callable[[str], Module]) -> None:
        self._module = load("elementwise")

    def embed(self, ids: torch.Tensor, sampled: torch.Tensor | None, table: torch.Tensor) -> torch.Tensor:
        """int32 [T], fp16 [V, H], H a multiple of 4 → float32 [T, H]. An id below 0 is -(1 + row) of `sampled`."""
        assert table.shape[1] % 4 == 0, table.shape
        out = torch.empty(len(ids), table.shape[1], dtype=torch.float32, device=table.device)
        self._module.launch("embed", (len(ids), 1, 1), 256, 0, ids, sampled, table, out, table.shape[1])
        return out

    def pick(
        self, rows: torch.Tensor, attended: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows `rows`, int32 [R], of fp16 [T, W], W a multiple of 8, and of float32 [T, H], H a multiple of 4."""
        assert rows.dtype == torch.int32 and attended.dtype == torch.float16 and residual.dtype == torch.float32
        (width, hidden), count = (attended.shape[1], residual.shape[1]), len(rows)
        assert width % 8 == 0 and hidden % 4 == 0, (width, hidden)
        picked = torch.empty(count, width, dtype=torch.float16, device=attended.device)
        kept = torch.empty(count, hidden, dtype=torch.float32, device=residual.device)
        if count:
            arguments = (rows, attended, residual, picked, kept, width, hidden)
            self._module.launch("pick", (count, 1, 1), 256, 0, *arguments)
        return picked, kept

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """fp16 [T, 2 * I] → silu(first half) * second half, fp16 [T, I]; I a multiple of 8."""
        tokens, width = len(gate_up), gate_up.shape[1] // 2
        assert width % 8 == 0, width
        out = torch.empty(tokens, width, dtype=torch.float16, device=gate_up.device)
        if tokens:
            blocks = -(-tokens * width // 8 // 256)
            self._module.launch("silu_and_mul", (blocks, 1, 1), 256, 0, gate_up, out, tokens, width)
        return out
