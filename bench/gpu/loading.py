"""The time that a start spends on the weights: reading them, copying them to the device, packing them there."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from bench.gpu.clock import Clock
from starling.model.awq import AwqWeight
from starling.model.config import ModelConfig
from starling.model.ops import Ops

PIECE_BYTES = 32 << 20


def read_rate(path: Path, threads: int, pinned: bool, max_bytes: int = 1 << 32) -> float:
    """Bytes per s at which `threads` threads read the beginning of a file, each into a buffer of its own."""
    size = min(path.stat().st_size, max_bytes)
    buffers = [torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=pinned) for _ in range(threads)]
    for buffer in buffers:
        buffer.zero_()  # faults its pages in, as in a buffer that is reused
    pieces = range(0, size, PIECE_BYTES)

    def read(thread: int) -> int:
        with path.open("rb", buffering=0) as file:
            view = memoryview(buffers[thread].numpy().data)
            return sum(os.preadv(file.fileno(), [view], piece) for piece in pieces[thread::threads])

    with ThreadPoolExecutor(threads) as pool:
        began_s = time.perf_counter()
        total = sum(pool.map(read, range(threads)))
        return total / (time.perf_counter() - began_s)


def copy_rate(clock: Clock) -> float:
    """Bytes per s from pinned memory to the device."""
    host = torch.empty(8 * PIECE_BYTES, dtype=torch.uint8, pin_memory=clock.device.type == "cuda")
    host.random_()
    device = torch.empty_like(host, device=clock.device)
    return host.numel() / clock.median(lambda: device.copy_(host, non_blocking=True))


def pack_seconds(config: ModelConfig, ops: Ops, clock: Clock) -> float:
    """To pack all weights, once on the device: one layer times the number of layers, and the head."""
    hidden, inter, group = config.hidden_size, config.intermediate_size, config.group_size

    def weight(inputs: int, outputs: int) -> AwqWeight:
        def words(rows: int) -> torch.Tensor:
            return torch.randint(-(2**31), 2**31, (rows, outputs // 8), dtype=torch.int32, device=ops.device)

        scales = torch.rand(inputs // group, outputs, device=ops.device).half()
        return AwqWeight(words(inputs), words(inputs // group), scales)

    qkv, out = weight(hidden, config.q_size + 2 * config.kv_size), weight(config.q_size, hidden)
    gate_up, down = weight(hidden, 2 * inter), weight(inter, hidden)
    head = torch.randn(config.vocab_size, hidden, dtype=torch.float16, device=ops.device)

    def layer() -> None:
        for each in (qkv, out, down):
            ops.pack_awq(each)
        ops.pack_awq(gate_up, paired=True)

    layer_s, head_s = clock.median(layer, 3), clock.median(lambda: ops.pack_head(head), 3)
    return config.num_hidden_layers * layer_s + head_s
