"""CpuOps: the operations of `interface.py`, on the C++ kernels in native/."""

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch

from starling.errors import DeviceError
from starling.model.awq import AwqWeight
from starling.model.batch import Batch
from starling.model.ops.cpu import library
from starling.model.ops.cpu.cores import usable_cores
from starling.model.ops.interface import DecoderLayer, Packed
from starling.model.ops.reference import resolve_sampled_ids

Precision = Literal["float32", "int16", "int8", "auto"]
PRECISIONS: dict[str, int] = {"float32": 0, "int16": 1, "int8": 2, "auto": 3}  # enum Precision of types.h
BLOCK_ROWS = 16  # output rows in one block of a packed weight
# Prompt tokens per step and thread. A step of a 7B model then takes 0.7 to 0.8 s, however many threads there are, and
# prompts are read at 95 to 104% of the speed that steps of 256 reach. A matrix unit computes more in that time.
PREFILL_TOKENS, MATRIX_PREFILL_TOKENS = 16, {"amx": 64, "neoni8mm": 32}
MAX_PREFILL_TOKENS = 256
MAX_HEAD_DIM = 256
MAX_HEADS_PER_KV_HEAD = 64


class PackedLinear(dict[str, torch.Tensor]):
    """A packed weight and the C structure that points at it.

    Keys: `weight`, and, depending on the bits, `scales` and `zeros`, laid out as in types.h; `shape`, int64 [4]:
    output features, input features, group size, bits per weight.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        rows, columns, group, bits = tensors["shape"].tolist()
        scales, zeros = tensors.get("scales"), tensors.get("zeros")
        self.rows: int = rows
        self.struct = library.Linear(
            tensors["weight"].data_ptr(),
            None if scales is None else scales.data_ptr(),
            None if zeros is None else zeros.data_ptr(),
            rows, columns, group, bits,
        )  # fmt: skip
        self.address = ctypes.addressof(self.struct)


class LayerStack:
    """All layers' C structures, and the weights and the cache that they point at."""

    def __init__(self, layers: Sequence[DecoderLayer], keys: torch.Tensor, values: torch.Tensor) -> None:
        self._layers, self._keys, self._values = layers, keys, values
        assert keys.is_contiguous() and values.is_contiguous()
        self._linears = [[_as_linear(w) for w in (layer.qkv, layer.out, layer.gate_up, layer.down)] for layer in layers]
        self.qkv_rows = self._linears[0][0].rows
        self.intermediate = self._linears[0][2].rows // 2
        self.structs = (library.Layer * len(layers))()
        for i, (layer, (qkv, out, gate_up, down)) in enumerate(zip(layers, self._linears, strict=True)):
            self.structs[i] = library.Layer(
                layer.input_norm.data_ptr(), qkv.address, out.address, layer.post_attention_norm.data_ptr(),
                gate_up.address, down.address, keys[i].data_ptr(), values[i].data_ptr(),
            )  # fmt: skip

    def holds(self, layers: Sequence[DecoderLayer], keys: torch.Tensor, values: torch.Tensor) -> bool:
        return self._layers is layers and self._keys is keys and self._values is values


class CpuOps:
    """The operations on this machine's CPU. Activations are float32; results do not depend on the batch, bit for bit.

    `precision` says how linear layers round activations, per row and group of input features:
      float32  not at all; the output projection is kept in fp16
      int16    to 15.99 bits, near exact; the output projection is kept in fp16
      int8     to 8 bits; the output projection is kept in 8 bits
      auto     prompt tokens as int8, generated ones as int16; the output projection is kept in 8 bits
    `threads`: None for the cores that this process may use. `isa`: an instruction set by name, for tests.
    Raises DeviceError if `isa` is not available, NoCompilerError if the kernels cannot be built.
    """

    def __init__(
        self,
        threads: int | None = None,
        precision: Precision = "auto",
        kv_dtype: torch.dtype = torch.float16,
        isa: str = "auto",
    ) -> None:
        assert precision in get_args(Precision) and kv_dtype in (torch.float16, torch.float32)
        assert threads is None or threads >= 1
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.kv_dtype = kv_dtype
        self.threads = threads or usable_cores()
        self.precision: Precision = precision
        self._head_bits = 16 if precision in ("float32", "int16") else 8
        self.layout: str | None = f"cpu-2-head{self._head_bits}"
        self._precision = PRECISIONS[precision]
        usable = library.usable_instruction_sets()
        if isa not in ("auto", *usable):
            raise DeviceError(
                f"Instruction set {isa!r} is not available on this machine: use one of {', '.join(usable)}."
            )
        isa, self._lib, kernels = library.load_best(usable if isa == "auto" else (isa,))
        self.name = f"{isa} kernels with {self.threads} threads"
        per_thread = MATRIX_PREFILL_TOKENS.get(isa, PREFILL_TOKENS)
        self.prefill_tokens = min(per_thread * self.threads, MAX_PREFILL_TOKENS)
        self._context: int | None = self._lib.starling_open(self.threads, kernels)
        if self._context is None:
            raise DeviceError(
                f"{self.threads} threads could not be started: this process may not have so many, or lacks the memory. "
                "Lower STARLING_THREADS, or raise the limit on processes."
            )
        self._close = weakref.finalize(self, self._lib.starling_close, self._context)
        self._close.atexit = False  # at exit a step may still be running, on a thread that Python does not wait for
        self._step_batch: Batch | None = None
        self._step_struct = library.Step()
        self._stack: LayerStack | None = None

    def pack_awq(self, weight: AwqWeight, paired: bool = False) -> Packed:
        rows, columns, group = weight.out_features, weight.in_features, weight.group_size
        blocks, groups = -(-rows // BLOCK_ROWS), columns // group
        packed = PackedLinear(
            {
                "weight": torch.empty(blocks, columns // 8, BLOCK_ROWS * 4, dtype=torch.uint8),
                "scales": torch.empty(blocks, groups, BLOCK_ROWS, dtype=torch.float16),
                "zeros": torch.empty(blocks, groups, BLOCK_ROWS // 2, dtype=torch.uint8),
                "shape": torch.tensor([rows, columns, group, 4]),
            }
        )
        qweight, qzeros, scales = weight.qweight.contiguous(), weight.qzeros.contiguous(), weight.scales.contiguous()
        self._lib.starling_pack_awq(
            self._context, qweight.data_ptr(), qzeros.data_ptr(), scales.data_ptr(), packed.address
        )
        return packed

    def pack_head(self, weight: torch.Tensor) -> Packed:
        rows, columns = weight.shape
        blocks, bits = -(-rows // BLOCK_ROWS), self._head_bits
        group = next(size for size in (128, 64, 32) if columns % size == 0)
        tensors = {"shape": torch.tensor([rows, columns, group, bits])}
        if bits == 16:
            tensors["weight"] = torch.empty(blocks, columns, BLOCK_ROWS, dtype=torch.float16)
        else:
            tensors["weight"] = torch.empty(blocks, columns // 4, BLOCK_ROWS * 4, dtype=torch.uint8)
            tensors["scales"] = torch.empty(blocks, columns // group, BLOCK_ROWS, dtype=torch.float16)
        packed = PackedLinear(tensors)
        matrix = weight.to(torch.float16).contiguous()
        self._lib.starling_pack_half(self._context, matrix.data_ptr(), packed.address)
        return packed

    def restore(self, weight: Packed) -> Packed:
        return _as_linear(weight)

    def awq_linear(self, x: torch.Tensor, weight: Packed, prompt_tokens: torch.Tensor) -> torch.Tensor:
        return self._linear(x, weight, prompt_tokens)

    def head(self, x: torch.Tensor, weight: Packed) -> torch.Tensor:
        return self._linear(x, weight, None)

    def embed(self, token_ids: torch.Tensor, table: torch.Tensor, sampled: torch.Tensor | None = None) -> torch.Tensor:
        token_ids = resolve_sampled_ids(token_ids, sampled).contiguous()
        out = torch.empty(token_ids.numel(), table.shape[1])
        self._lib.starling_embed(
            self._context, token_ids.data_ptr(), table.data_ptr(), out.data_ptr(), token_ids.numel(), table.shape[1]
        )
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._norm(None, _contiguous(x), weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual = _contiguous(residual)
        return self._norm(_contiguous(x), residual, weight, eps), residual

    def rotate_and_cache(
        self, qkv: torch.Tensor, batch: Batch, rotary: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        _, kv_heads, block_size, dim = keys.shape
        heads = qkv.shape[1] // dim - 2 * kv_heads
        qkv, q = _contiguous(qkv), torch.empty(qkv.shape[0], heads, dim)
        shape = self._shape(heads, kv_heads, dim, block_size, None)
        self._lib.starling_rotate_and_write(
            self._context, ctypes.addressof(shape), self._step(batch), qkv.data_ptr(), rotary.data_ptr(),
            keys.data_ptr(), values.data_ptr(), q.data_ptr(),
        )  # fmt: skip
        return q

    def attention(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, window: int | None
    ) -> torch.Tensor:
        tokens, heads, dim = q.shape
        shape = self._shape(heads, keys.shape[1], dim, keys.shape[2], window)
        q, out = _contiguous(q), torch.empty(tokens, heads * dim)
        self._lib.starling_attention(
            self._context, ctypes.addressof(shape), self._step(batch), q.data_ptr(), keys.data_ptr(),
            values.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        return out

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        tokens, intermediate = gate_up.shape[0], gate_up.shape[1] // 2
        gate_up, out = _contiguous(gate_up), torch.empty(tokens, intermediate)
        self._lib.starling_silu_mul(self._context, gate_up.data_ptr(), out.data_ptr(), tokens, intermediate)
        return out

    def run_layers(
        self,
        x: torch.Tensor,
        layers: Sequence[DecoderLayer],
        batch: Batch,
        keys: torch.Tensor,
        values: torch.Tensor,
        rotary: torch.Tensor,
        window: int | None,
        eps: float,
    ) -> torch.Tensor:
        if self._stack is None or not self._stack.holds(layers, keys, values):
            self._stack = LayerStack(layers, keys, values)
        dim, block_size = keys.shape[4], keys.shape[3]
        kv_heads = keys.shape[2]
        heads = self._stack.qkv_rows // dim - 2 * kv_heads
        shape = self._shape(heads, kv_heads, dim, block_size, window)
        shape.hidden, shape.intermediate, shape.eps = x.shape[1], self._stack.intermediate, eps
        x = _contiguous(x)
        residual = torch.empty_like(x)
        self._lib.starling_layers(
            self._context, ctypes.addressof(self._stack.structs), len(layers), ctypes.addressof(shape),
            self._step(batch), rotary.data_ptr(), self._precision, x.data_ptr(), residual.data_ptr(),
        )  # fmt: skip
        return residual[: batch.logit_rows.numel()]

    def sample(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        min_p: torch.Tensor,
        uniform: torch.Tensor,
    ) -> torch.Tensor:
        settings = (temperature, top_k, top_p, min_p, uniform)
        wanted = (torch.float64, torch.int64, torch.float64, torch.float64, torch.float64)
        assert tuple(s.dtype for s in settings) == wanted and all(s.is_contiguous() for s in settings)
        logits = _contiguous(logits)
        rows, vocabulary = logits.shape
        ids = torch.empty(rows, dtype=torch.int64)
        self._lib.starling_sample(
            self._context, logits.data_ptr(), rows, vocabulary, *(s.data_ptr() for s in settings), ids.data_ptr()
        )
        return ids

    def _linear(self, x: torch.Tensor, weight: Packed, prompt_tokens: torch.Tensor | None) -> torch.Tensor:
        linear, x = _as_linear(weight), _contiguous(x)
        prompt_tokens = None if prompt_tokens is None else prompt_tokens.contiguous()
        tokens = x.shape[0]
        out = torch.empty(tokens, linear.rows)
        self._lib.starling_linear(
            self._context,
            linear.address,
            x.data_ptr(),
            tokens,
            None if prompt_tokens is None else prompt_tokens.data_ptr(),
            self._precision,
            out.data_ptr(),
        )
        return out

    def _norm(self, x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        tokens, hidden = residual.shape
        out = torch.empty(tokens, hidden)
        self._lib.starling_add_norm(
            self._context, None if x is None else x.data_ptr(), residual.data_ptr(), weight.data_ptr(),
            out.data_ptr(), tokens, hidden, eps,
        )  # fmt: skip
        return out

    def _shape(self, heads: int, kv_heads: int, dim: int, block_size: int, window: int | None) -> library.Shape:
        if dim > MAX_HEAD_DIM or heads // kv_heads > MAX_HEADS_PER_KV_HEAD:
            raise DeviceError(
                f"head_dim {dim} with {heads // kv_heads} query heads per key/value head: the CPU kernels take at most "
                f"{MAX_HEAD_DIM} and {MAX_HEADS_PER_KV_HEAD}."
            )
        half = int(self.kv_dtype == torch.float16)
        return library.Shape(0, 0, heads, kv_heads, dim, window or 0, block_size, half, 0.0)

    def _step(self, batch: Batch) -> int:
        """The address of the batch's C structure, made once per batch: every layer asks for the same one."""
        if batch is not self._step_batch:
            tensors = (
                batch.positions, batch.slots, batch.query_starts, batch.context_lens, batch.block_tables,
                batch.prompt_tokens, batch.logit_rows,
            )  # fmt: skip
            assert all(tensor.is_contiguous() for tensor in tensors) and batch.logit_rows.dtype == torch.int64
            self._step_struct = library.Step(
                batch.positions.numel(), batch.context_lens.numel(), batch.block_tables.shape[1],
                batch.logit_rows.numel(),
                *(tensor.data_ptr() for tensor in tensors),
            )  # fmt: skip
            self._step_batch = batch
        return ctypes.addressof(self._step_struct)


def _as_linear(weight: Packed) -> PackedLinear:
    return weight if isinstance(weight, PackedLinear) else PackedLinear(weight)


def _contiguous(x: torch.Tensor) -> torch.Tensor:
    """`x` as the kernels read it: float32, contiguous. Hold the result while they do: it may be a copy."""
    assert x.dtype == torch.float32
    return x.contiguous()
