"""The emulated GPU does what CUDA promises, and no more; only scripts/emulated-gpu runs these."""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.cuda.emulated_gpu import is_emulated

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not is_emulated(), reason="needs the emulated GPU")]
TRIES = 100  # the device may work ahead of any call, at random


def test_a_result_is_old_until_it_is_waited_for() -> None:
    early = 0
    for number in range(1, TRIES):
        host, device = torch.zeros(4, pin_memory=True), torch.full((4,), float(number), device="cuda")
        torch.cuda.synchronize()
        host.copy_(device, non_blocking=True)
        early += not host.any()
        torch.cuda.synchronize()
        assert (host == number).all()
    assert early > TRIES // 2


@pytest.mark.parametrize("waits", [False, True])
def test_what_is_overwritten_before_its_copy_is_done_is_copied_wrong(waits: bool) -> None:
    wrong = 0
    device, copied = torch.zeros(4, device="cuda"), torch.cuda.Event()  # type: ignore[no-untyped-call]
    host = torch.zeros(4, pin_memory=True)
    for number in range(1, TRIES):
        host.fill_(number)
        device.copy_(host, non_blocking=True)
        copied.record()
        if waits:
            copied.synchronize()
        host.fill_(-1)
        wrong += device.cpu()[0].item() != number
    assert wrong == 0 if waits else wrong > TRIES // 2


@pytest.mark.parametrize("waits", [False, True])
def test_streams_run_side_by_side(waits: bool) -> None:
    first, second = (torch.cuda.Stream() for _ in range(2))  # type: ignore[no-untyped-call]
    device, wrong = torch.zeros(4, device="cuda"), 0
    sources = [torch.full((4,), float(number), pin_memory=True) for number in range(TRIES)]
    for number, source in enumerate(sources):
        with torch.cuda.stream(first):
            device.copy_(source, non_blocking=True)
        if waits:
            second.wait_stream(first)
        with torch.cuda.stream(second):
            wrong += device.cpu()[0].item() != number
        torch.cuda.synchronize()
    assert wrong == 0 if waits else wrong > TRIES // 2


def test_waiting_for_the_device_breaks_a_capture() -> None:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        graph.capture_begin()
        for refused in (torch.cuda.synchronize, graph.capture_end):
            with pytest.raises(torch.AcceleratorError):
                refused()
    torch.cuda.synchronize()


def test_a_graph_holds_no_operation_of_torchs_own() -> None:
    device = torch.ones(4, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        graph.capture_begin()
        with pytest.raises(RuntimeError, match="not one of our kernels"):
            device.add_(1)
        with pytest.warns(UserWarning, match="Graph is empty"):
            graph.capture_end()
    assert (device == 1).all()


def test_memory_ends_and_begins_as_nan() -> None:
    free, _ = torch.cuda.mem_get_info()
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(free + 1, dtype=torch.uint8, device="cuda")
    torch.cuda.empty_cache()
    assert torch.empty(32 << 20, dtype=torch.float16, device="cuda")[-9:].isnan().all()


def test_the_driver_needs_a_context_on_every_thread() -> None:
    """CUDA's runtime makes its own current, in the first of its calls on a thread."""
    driver = ctypes.CDLL("libcuda.so.1")
    torch.cuda.synchronize()

    def load() -> int:
        return int(driver.cuModuleLoadData(ctypes.byref(ctypes.c_void_p()), b"no machine code"))

    def synchronize_then_load() -> int:
        torch.cuda.synchronize()
        return load()

    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        assert first.submit(load).result() == 201  # CUDA_ERROR_INVALID_CONTEXT
        assert second.submit(synchronize_then_load).result() == 200  # CUDA_ERROR_INVALID_IMAGE
