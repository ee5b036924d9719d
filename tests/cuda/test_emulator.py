"""The emulated device does what device.h promises, and detects the faults that it is there for."""

import contextlib
from pathlib import Path

import pytest
import torch

from tests.cuda import ptx
from tests.cuda.emulator import EmulatedModule, EmulatedStream

PROBE = Path(__file__).with_name("probe.cu")


@pytest.fixture(scope="module")
def probe() -> EmulatedModule:
    return EmulatedModule(PROBE)


def fault_of(message: str | None) -> contextlib.AbstractContextManager[object]:
    return pytest.raises(AssertionError, match=message) if message else contextlib.nullcontext()


def test_copies_and_barriers(probe: EmulatedModule) -> None:
    x, y = torch.randn(3, 64), torch.empty(3, 64)
    probe.launch("reverse", (3, 1, 1), 64, 256, x, y)
    assert torch.equal(y, x.flip(1))


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        ("reverse_without_waiting", "copy under way"),
        ("reverse_without_barrier", "without a barrier"),
        ("refill_without_barrier", "without a barrier|copy under way"),
    ],
)
def test_a_missing_wait_is_a_fault(probe: EmulatedModule, kernel: str, fault: str) -> None:
    for _ in range(20):  # whatever order the threads run in
        with pytest.raises(AssertionError, match=fault):
            probe.launch(kernel, (1, 1, 1), 64, 256, torch.randn(64), torch.empty(64))


def test_a_barrier_that_not_all_reach_is_a_fault(probe: EmulatedModule) -> None:
    with pytest.raises(AssertionError, match="different barriers"):
        probe.launch("divergent", (1, 1, 1), 64, 0)


def test_shared_memory_has_bounds(probe: EmulatedModule) -> None:
    with pytest.raises(AssertionError, match="outside the block's shared memory"):
        probe.launch("reverse", (1, 1, 1), 64, 64, torch.randn(64), torch.empty(64))
    with pytest.raises(AssertionError, match="more shared memory"):
        probe.launch("reverse", (1, 1, 1), 64, 200_000, torch.randn(64), torch.empty(64))


@pytest.mark.parametrize("short", ["x", "y", None])
@pytest.mark.parametrize(("kernel", "threads"), [("powers", 32), ("reverse", 64), ("ask_ahead", 32)])
def test_global_memory_is_what_a_kernel_was_given(kernel: str, threads: int, short: str | None) -> None:
    """Loads, asynchronous copies, prefetches; stores. Beyond these tensors there is other memory."""
    stream = EmulatedStream()
    x, y = (torch.zeros(128)[: threads - 4 if name == short else threads] for name in "xy")
    with fault_of("outside the tensors" if short else None):
        EmulatedModule(PROBE, stream=stream).launch(kernel, (1, 1, 1), threads, 256, x, y)
        stream.synchronize()


def test_a_grid_without_blocks_is_a_fault(probe: EmulatedModule) -> None:
    with pytest.raises(AssertionError, match="refuses a grid"):
        probe.launch("reverse", (1, 0, 1), 64, 256, torch.randn(64), torch.empty(64))


def test_an_unaligned_copy_is_a_fault(probe: EmulatedModule) -> None:
    with pytest.raises(AssertionError, match="not aligned"):
        probe.launch("reverse", (1, 1, 1), 64, 256, torch.randn(65)[1:], torch.empty(64))


def test_tensor_core_fragments(probe: EmulatedModule) -> None:
    a, b, c = torch.randn(16, 16).half(), torch.randn(16, 8).half(), torch.empty(16, 8)
    probe.launch("product", (1, 1, 1), 32, 256, a, b, c)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_bits(probe: EmulatedModule) -> None:
    x, y = torch.randint(0, 2**31, (32,), dtype=torch.int32), torch.empty(32, dtype=torch.int32)
    probe.launch("merge", (1, 1, 1), 32, 0, x, y)
    assert torch.equal(y, (x & 0x000F000F) | 0x64006400)


def test_the_last_block_adds_in_order(probe: EmulatedModule) -> None:
    x, parts, counter, total = torch.randn(20, 32), torch.empty(20), torch.zeros(1, dtype=torch.int32), torch.empty(1)
    found = set()
    for _ in range(5):
        probe.launch("total", (20, 1, 1), 32, 4, x, parts, counter, total)
        found.add(total.item())
        assert counter.item() == 0
    assert len(found) == 1
    torch.testing.assert_close(total[0], x.sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "blocks", "fault"),
    [
        ("write_without_barrier", 1, None),
        ("write_without_barrier", 2, "two blocks access"),
        ("read_without_barrier", 1, "without a barrier"),
        ("copy_without_barrier", 1, "without a barrier"),
    ],
)
def test_threads_that_meet_in_global_memory(probe: EmulatedModule, kernel: str, blocks: int, fault: str | None) -> None:
    for _ in range(20):
        with fault_of(fault):
            probe.launch(kernel, (blocks, 1, 1), 64, 128, torch.zeros(128), torch.empty(128))


@pytest.mark.parametrize("missing", range(-1, 4))
def test_blocks_that_meet_need_fences_and_barriers(probe: EmulatedModule, missing: int) -> None:
    x, parts, total, counter = torch.randn(5, 32), torch.empty(5, 32), torch.empty(32), torch.zeros(1).int()
    for _ in range(20):
        with fault_of("two blocks access" if missing >= 0 else None):
            probe.launch("total_without", (5, 1, 1), 32, 4, x, parts, counter.zero_(), total, missing)
            torch.testing.assert_close(total, x.sum(0), rtol=1e-5, atol=1e-5)


def test_bank_conflicts_are_counted(probe: EmulatedModule) -> None:
    y = torch.empty(128)
    for stride, passes in ((1, 1), (2, 2), (3, 1), (12, 4), (32, 32)):
        found = probe.count(lambda stride=stride: probe.launch("strided", (3, 1, 1), 32, 4096, y, stride))
        assert (found.least, found.taken) == (6, 6 * passes)
    found = probe.count(lambda: probe.launch("rows", (1, 1, 1), 32, 512, y))
    assert (found.least, found.taken) == (8, 8)
    probe.launch("rows", (1, 1, 1), 32, 512, y)
    assert probe.count(lambda: None).least == 0


def test_powers_of_two(probe: EmulatedModule) -> None:
    x, y = torch.linspace(-130, 0, 32), torch.empty(32)
    x[0] = -torch.inf
    probe.launch("powers", (1, 1, 1), 32, 0, x, y)
    torch.testing.assert_close(y, torch.where(x < -126, 0, x.exp2()), rtol=2**-22, atol=0)
    assert y[-1] == 1


def test_a_warp_may_be_far_ahead_of_another(probe: EmulatedModule) -> None:
    found = set()
    for _ in range(200):
        x, y = torch.empty(64, dtype=torch.int32), torch.empty(64, dtype=torch.int32)
        probe.launch("overtake", (1, 1, 1), 64, 0, x, y, 0)
        found.add((y[:32].max().item(), y[32:].max().item()))
        probe.launch("overtake", (1, 1, 1), 64, 0, x, y, 1)
        assert (y == 1).all()
    assert {(1, 1), (2, 2)} <= found


@pytest.mark.parametrize("kernel", ["scale", "scale_too_early"])
def test_a_kernel_begins_before_the_previous_one_has_run(kernel: str) -> None:
    stream = EmulatedStream()
    module = EmulatedModule(PROBE, stream=stream)
    x, factors, y = torch.ones(32), torch.full((32,), 3.0), torch.full((32,), torch.nan)
    for _ in range(3):
        module.launch(kernel, (1, 1, 1), 32, 0, x, factors, x)
    module.launch(kernel, (1, 1, 1), 32, 0, x, factors, y)
    assert y.isnan().all()  # it waits its turn
    stream.synchronize()
    assert (y == 81).all() == (kernel == "scale")


@pytest.mark.parametrize("way", ["global.nc", "volatile.global", "relaxed.gpu.global"])
def test_a_load_of_another_kind_is_not_taken_for_a_plain_one(way: str) -> None:
    """A load through a path that is not coherent, say, may return stale data where an overlapping kernel writes."""
    with pytest.raises(AssertionError, match=way):
        ptx.instruction(f"ld.{way}.u32", ["%r1", "[%rd1]"])


def test_a_copy_may_come_before_the_previous_kernel_has_run() -> None:
    stream = EmulatedStream()
    module = EmulatedModule(PROBE, stream=stream)
    x, factors, y = torch.ones(32), torch.full((32,), 3.0), torch.full((32,), torch.nan)
    module.launch("scale", (1, 1, 1), 32, 0, x, factors, x)
    module.launch("copy_too_early", (1, 1, 1), 32, 128, x, y)
    stream.synchronize()
    assert (x == 3).all() and (y == 1).all()


def test_every_thread_waits_for_the_previous_kernel() -> None:
    module = EmulatedModule(PROBE, stream=EmulatedStream())
    with pytest.raises(AssertionError, match="without having waited"):
        module.launch("scale_without_waiting", (1, 1, 1), 64, 0, torch.ones(64), torch.ones(64), torch.empty(64))
