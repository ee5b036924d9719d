"""4-bit linear layers, the fp16 output projection, and the norms around them: native/linear.h and norm.cu."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from starling.errors import DeviceError
from starling.model.awq import AwqWeight, unpack
from starling.model.ops.cuda.module import Module

THREADS = 256
WARPS = THREADS // 32
ROWS = 16  # in a row tile
TILE_K = 64
CHUNK_TILES = 8
CHUNK_K = CHUNK_TILES * TILE_K
SPLITS = 4  # ranges of K that are summed separately
GROUPS = (128, 64, 32)
SCALE_BYTES = 40  # per group of a row tile: 16 fp16 scales, 16 4-bit zero points
STORE, ADD, SILU_MUL, LOGITS = range(4)  # enum Epilogue

NARROW_ROWS = ROWS * WARPS // SPLITS  # per block
NARROW_MAX_TOKENS = 8
NARROW_TILES = 8  # buffered per warp; HEAD_NARROW_TILES for fp16
HEAD_NARROW_TILES = 4
# These affect speed only, not results. Every 32 rows read all activations again, 2 * k bytes a token (from L2), beside
# 16 * k bytes of weights (from memory).
NARROW_TOKENS = 4
NORM_TOKENS = 2  # a fused norm reads 4 bytes per element instead of 2, and every block recomputes it
TALL_PACE = 1.15  # products per time, relative to a kernel that reads activations for half as many rows
PRODUCTS_PER_BYTE = 80  # of a multiprocessor, per byte of its share of bandwidth: 0.67 T/s by 8.3 GB/s on an A40
MAX_SHARED_BLOCKS = 256  # blocks (in tokens and rows) whose sums can be shared between ranges of K: 67 MB at most


@dataclass(frozen=True)
class Wide:
    """A kernel whose blocks take `tokens` tokens, and `row_tiles` row tiles per warp."""

    name: str
    tokens: int
    row_tiles: int
    panel: int  # tiles of k per stage
    stages: int  # buffered
    pace: float = 1.0

    @property
    def rows(self) -> int:
        return ROWS * WARPS * self.row_tiles

    @property
    def sums_bytes(self) -> int:
        return self.tokens * self.rows * 4

    def shared_bytes(self, group: int) -> int:
        tiles = self.stages * self.panel
        scale_slots = 1 if (self.stages - 1) * self.panel == 1 else 2
        streams = WARPS * self.row_tiles * stream_bytes(group, tiles, scale_slots)
        return self.tokens * tiles * TILE_K * 2 + streams + self.sums_bytes


def stream_bytes(group: int, tiles: int, scale_slots: int) -> int:
    """Shared memory of one row tile's stream: `tiles` tiles of weights, and the scales of `scale_slots` chunks."""
    if not group:
        return tiles * ROWS * TILE_K * 2
    return tiles * ROWS * TILE_K // 2 + scale_slots * CHUNK_K // group * SCALE_BYTES


def wide_kernels(group: int) -> tuple[Wide, ...]:
    """Those of native/linear_g`group`.cu (head.cu for 0), ascending by tokens, the one for many tokens last."""
    if not group:
        return tuple(Wide(f"wide_{tokens}", tokens, 1, 1, 2 if tokens == 64 else 3) for tokens in (8, 16, 32, 64))
    few = tuple(Wide(f"wide_{tokens}", tokens, 1, 2, 4) for tokens in (8, 16, 32))
    last = Wide("wide_64", 64, 1, 1, 4 if group == 32 else 5)
    return (*few, last, Wide("wide_64_tall", 64, 2, 1, 2, TALL_PACE)) if group == 128 else (*few, last)


class PackedLinear(dict[str, torch.Tensor]):
    """A packed weight, and its shape as plain numbers, so that no launch reads a tensor.

    Keys: `weight` and, for 4 bits, `scales`, which also holds the zero points (layouts: native/linear.h). `shape`,
    int64 [4] on the CPU: output features, input features, group size (0: fp16), whether rows are paired.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        super().__init__({name: tensor.to("cpu" if name == "shape" else device) for name, tensor in tensors.items()})
        self.rows: int
        self.columns: int
        self.group: int
        self.paired: bool
        self.rows, self.columns, self.group, paired = self["shape"].tolist()
        self.paired = bool(paired)
        self.source = f"linear_g{self.group}" if self.group else "head"
        self.wide = wide_kernels(self.group)


class LinearKernels:
    """Activations are fp16 [T, K], the residual stream float32 [T, H], logits float32; T may be 0.

    A token's results depend, bit for bit, neither on the other tokens nor on which kernel their number selects.
    """

    def __init__(self, load: Callable[[str], Module], device: torch.device) -> None:
        self._load = load
        self._modules: dict[str, Module] = {}
        self.device = device
        on_gpu = device.type == "cuda"
        self._processors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 84
        self._counters = torch.zeros(MAX_SHARED_BLOCKS, dtype=torch.int32, device=device)
        self._chosen: dict[tuple[int, ...], tuple[Wide, int]] = {}

    def linear(self, x: torch.Tensor, weight: PackedLinear) -> torch.Tensor:
        """fp16 [T, K] → fp16 [T, N]. A paired weight's rows come in their original order."""
        return self._multiply(x, weight, STORE, self._empty(x, weight.rows, torch.float16))

    def linear_silu_mul(self, x: torch.Tensor, weight: PackedLinear) -> torch.Tensor:
        """fp16 [T, K] → silu(gate) * up, fp16 [T, N / 2], for a paired weight; gate and up are float32 until then."""
        assert weight.paired
        return self._multiply(x, weight, SILU_MUL, self._empty(x, weight.rows // 2, torch.float16))

    def add_linear(self, x: torch.Tensor, weight: PackedLinear, residual: torch.Tensor) -> torch.Tensor:
        """`residual` float32 [T, N] += fp16 [T, K] x weight, in float32 throughout; returns `residual`."""
        assert residual.dtype == torch.float32 and residual.shape == (x.shape[0], weight.rows)
        return self._multiply(x, weight, ADD, residual)

    def head(self, x: torch.Tensor, weight: PackedLinear) -> torch.Tensor:
        """fp16 [T, H] → float32 logits [T, V]."""
        return self._multiply(x, weight, LOGITS, self._empty(x, weight.rows, torch.float32))

    def norm_linear(self, residual: torch.Tensor, norm: torch.Tensor, eps: float, weight: PackedLinear) -> torch.Tensor:
        """linear(rms_norm(residual, norm, eps), weight), bit for bit."""
        out = self._empty(residual, weight.rows, torch.float16)
        return self._norm_multiply(residual, norm, eps, weight, STORE, out)

    def norm_linear_silu_mul(
        self, residual: torch.Tensor, norm: torch.Tensor, eps: float, weight: PackedLinear
    ) -> torch.Tensor:
        """linear_silu_mul(rms_norm(residual, norm, eps), weight), bit for bit."""
        assert weight.paired
        out = self._empty(residual, weight.rows // 2, torch.float16)
        return self._norm_multiply(residual, norm, eps, weight, SILU_MUL, out)

    def rms_norm(self, x: torch.Tensor, norm: torch.Tensor, eps: float) -> torch.Tensor:
        """float32 [T, H] → fp16 [T, H]: normalised in float32, rounded, multiplied by `norm` fp16 [H] in fp16."""
        assert x.dtype == torch.float32 and norm.dtype == torch.float16 and x.shape[1] % 4 == 0
        out = self._empty(x, x.shape[1], torch.float16)
        if x.shape[0]:
            grid = (x.shape[0], 1, 1)
            self._module("norm").launch("rms_norm", grid, THREADS, WARPS * 4, x, norm, out, x.shape[1], eps)
        return out

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor, eps: float) -> torch.Tensor:
        """`residual` float32 [T, H] += `x` fp16 [T, H]; returns rms_norm(residual, norm, eps)."""
        assert x.dtype == norm.dtype == torch.float16 and residual.dtype == torch.float32 and x.shape[1] % 4 == 0
        out = torch.empty_like(x)
        if x.shape[0]:
            arguments = (x, residual, norm, out, x.shape[1], eps)
            self._module("norm").launch("add_rms_norm", (x.shape[0], 1, 1), THREADS, WARPS * 4, *arguments)
        return out

    def _norm_multiply(
        self,
        residual: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        weight: PackedLinear,
        epilogue: int,
        out: torch.Tensor,
    ) -> torch.Tensor:
        tokens = residual.shape[0]
        if tokens > NORM_TOKENS or not tokens:
            return self._multiply(self.rms_norm(residual, norm, eps), weight, epilogue, out)
        assert residual.dtype == torch.float32 and norm.dtype == torch.float16
        assert residual.shape[1] == weight.columns == norm.numel()
        self._narrow("narrow_norm", tokens, weight, epilogue, out, None, (residual, norm, eps))
        return out

    def _multiply(self, x: torch.Tensor, weight: PackedLinear, epilogue: int, out: torch.Tensor) -> torch.Tensor:
        tokens = x.shape[0]
        assert x.dtype == torch.float16 and x.shape[1] == weight.columns
        if not tokens:
            return out
        if tokens <= NARROW_TOKENS:
            self._narrow("narrow", tokens, weight, epilogue, out, x, (None, None, 0.0))
            return out
        shape = (tokens, weight.rows, weight.columns, weight.group)
        if shape not in self._chosen:
            self._chosen[shape] = self._choose(tokens, weight)
        self._wide(*self._chosen[shape], weight, epilogue, out, x)
        return out

    def _choose(self, tokens: int, weight: PackedLinear) -> tuple[Wide, int]:
        """A kernel, and how many ranges its blocks split K into.

        The smallest that takes all tokens, split if there would be fewer blocks than multiprocessors; for many tokens,
        the choice that should take the least time.
        """
        for kernel in weight.wide:
            if tokens <= kernel.tokens:
                return kernel, SPLITS if self._blocks(kernel, tokens, weight) < self._processors else 1
        largest = weight.wide[-1].tokens
        ways = [(kernel, splits) for kernel in weight.wide if kernel.tokens == largest for splits in (1, SPLITS)]
        return min(ways, key=lambda way: self._work(way[0], way[1], tokens, weight))

    def _work(self, kernel: Wide, splits: int, tokens: int, weight: PackedLinear) -> float:
        """A multiprocessor's products over all its blocks, plus shared sums (written and read) in the same unit."""
        blocks = self._blocks(kernel, tokens, weight)
        waves = -(-blocks * splits // self._processors)
        products = waves * kernel.tokens * kernel.rows * (weight.columns / splits) / kernel.pace
        if splits == 1:
            return products
        shared_bytes = 2 * blocks * splits * kernel.sums_bytes / self._processors
        return products + PRODUCTS_PER_BYTE * shared_bytes if blocks <= MAX_SHARED_BLOCKS else float("inf")

    def _narrow(
        self,
        kernel: str,
        tokens: int,
        weight: PackedLinear,
        epilogue: int,
        out: torch.Tensor,
        x: torch.Tensor | None,
        norm: tuple[torch.Tensor | None, torch.Tensor | None, float],
    ) -> None:
        assert tokens <= NARROW_MAX_TOKENS
        shared_bytes = WARPS * stream_bytes(weight.group, NARROW_TILES if weight.group else HEAD_NARROW_TILES, 2)
        if x is None:
            shared_bytes += NARROW_MAX_TOKENS * WARPS * 4 + tokens * -(-weight.columns // TILE_K) * TILE_K * 2
        grid = (-(-weight.rows // NARROW_ROWS), 1, 1)
        self._launch(kernel, grid, shared_bytes, tokens, weight, epilogue, out, x, norm, None)

    def _wide(
        self, kernel: Wide, splits: int, weight: PackedLinear, epilogue: int, out: torch.Tensor, x: torch.Tensor
    ) -> None:
        tokens, partials = x.shape[0], None
        if splits > 1:
            blocks = self._blocks(kernel, tokens, weight)
            assert splits == SPLITS and blocks <= MAX_SHARED_BLOCKS
            partials = torch.empty(blocks * SPLITS * kernel.sums_bytes // 4, dtype=torch.float32, device=self.device)
        grid = (-(-tokens // kernel.tokens), -(-weight.rows // kernel.rows), splits)
        no_norm = (None, None, 0.0)
        shared_bytes = kernel.shared_bytes(weight.group)
        self._launch(kernel.name, grid, shared_bytes, tokens, weight, epilogue, out, x, no_norm, partials)

    def _launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        shared_bytes: int,
        tokens: int,
        weight: PackedLinear,
        epilogue: int,
        out: torch.Tensor,
        x: torch.Tensor | None,
        norm: tuple[torch.Tensor | None, torch.Tensor | None, float],
        partials: torch.Tensor | None,
    ) -> None:
        residual, norm_weight, eps = norm
        tile_stride, half_stride = (ROWS // 2, weight.rows // 2) if weight.paired else (ROWS, ROWS // 2)
        self._module(weight.source).launch(
            kernel, grid, THREADS, shared_bytes,
            weight["weight"], weight.get("scales"), x, residual, norm_weight, out, partials, self._counters, eps,
            tokens, weight.rows, weight.columns, tile_stride, half_stride, epilogue,
        )  # fmt: skip

    def _module(self, source: str) -> Module:
        if source not in self._modules:
            self._modules[source] = self._load(source)
        return self._modules[source]

    def _blocks(self, kernel: Wide, tokens: int, weight: PackedLinear) -> int:
        return -(-tokens // kernel.tokens) * -(-weight.rows // kernel.rows)

    def _empty(self, like: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(like.shape[0], width, dtype=dtype, device=like.device)


def pack(weight: AwqWeight, paired: bool = False) -> dict[str, torch.Tensor]:
    """A PackedLinear's tensors, on the device of `weight`. `paired`: outputs are two halves, gate | up, of equal width.

    Raises DeviceError if the kernels do not support the group size.
    """
    rows, columns, group = weight.out_features, weight.in_features, weight.group_size
    if group not in GROUPS:
        raise DeviceError(f"Group size {group}: the CUDA kernels support {', '.join(map(str, GROUPS))}.")
    assert columns % group == 0 and rows % (16 if paired else 8) == 0
    row_tiles, tiles = -(-rows // ROWS), -(-columns // TILE_K)
    chunks, chunk_groups = -(-tiles // CHUNK_TILES), CHUNK_K // group

    def halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values side by side for all rows → those of the first 8, and of the last 8, rows of every row tile."""
        split = x.view(len(x), 2, -1) if paired else x.view(len(x), row_tiles, 2, -1).transpose(1, 2)
        return split[:, 0], split[:, 1]

    # A word of the checkpoint holds 8 rows at one k; nibbles of the first and the last 8 rows share a byte.
    words = F.pad(weight.qweight, (0, 0 if paired else 2 * row_tiles - rows // 8, 0, tiles * TILE_K - columns))
    first, last = (half.reshape(tiles * TILE_K, row_tiles) for half in halves(words))
    low = (first & 0x0F0F0F0F) | ((last & 0x0F0F0F0F) << 4)  # rows 0, 4, 1, 5 by byte: COLUMN_OF_NIBBLE[::2]
    high = ((first >> 4) & 0x0F0F0F0F) | (last & -0x0F0F0F10)  # rows 2, 6, 3, 7
    del words, first, last
    # [k / 64, k / 32, k / 8, k / 4, k / 2, k][row tile, g / 2, g, g / 4] → [row tile, k / 64][g][k / 8][steps][e]
    bits = torch.stack([low, high], dim=-1).view(torch.uint8).view(tiles, 2, 4, 2, 2, 2, row_tiles, 2, 2, 2)
    packed = bits.permute(6, 0, 9, 7, 8, 2, 1, 3, 5, 4).contiguous()

    padding = (0, row_tiles * ROWS - rows, 0, chunks * chunk_groups - columns // group)

    def by_chunk(values: torch.Tensor) -> list[torch.Tensor]:
        """[groups, N] → for each half [row tiles, chunks, groups of a chunk, 8]."""
        shape = (chunks, chunk_groups, row_tiles, 8)
        return [half.reshape(shape).permute(2, 0, 1, 3) for half in halves(F.pad(values, padding))]

    zero, last_zero = by_chunk(unpack(weight.qzeros))
    zeros = (zero | (last_zero << 4)).reshape(row_tiles, chunks, -1).view(torch.uint8)
    scales = torch.stack(by_chunk(weight.scales), dim=-1).reshape(row_tiles, chunks, -1).view(torch.uint8)
    return {
        "weight": packed.view(row_tiles, tiles, -1),
        "scales": torch.cat([scales, zeros], dim=-1),
        "shape": torch.tensor([rows, columns, group, int(paired)]),
    }


def pack_head(matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    """A PackedLinear's tensors from fp16 [V, H], on the device of `matrix`."""
    rows, columns = matrix.shape
    assert columns % 32 == 0
    row_tiles, tiles = -(-rows // ROWS), -(-columns // TILE_K)
    padded = F.pad(matrix.to(torch.float16), (0, tiles * TILE_K - columns, 0, row_tiles * ROWS - rows))
    # [row tile, half, g][k / 64, k / 32, k / 8, k / 4, k / 2, k] → [row tile, k / 64][step][g][k / 8][e / 2, half, e]
    parts = padded.view(row_tiles, 2, 8, tiles, 2, 4, 2, 2, 2).permute(0, 3, 4, 6, 2, 5, 7, 1, 8)
    return {
        "weight": parts.reshape(row_tiles, tiles, 4, 32, 8),
        "shape": torch.tensor([rows, columns, 0, 0]),
    }
