"""How long work takes on a device: by its own events on a GPU, by the host's clock elsewhere."""

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch

Work = Callable[[], object]
ROUND_S = 0.01  # a shorter round would measure the events themselves
MAX_REPEATS = 1000


class Clock:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cuda = device.type == "cuda"

    def wait(self) -> None:
        """Wait until the device has finished all its work."""
        if self._cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Work, repeats: int = 1) -> float:
        """Seconds per call, over `repeats` calls in a row on the current stream, which is idle before and after."""
        self.wait()
        if not self._cuda:
            began_s = time.perf_counter()
            for _ in range(repeats):
                work()
            return (time.perf_counter() - began_s) / repeats
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / repeats

    def median(self, work: Work, rounds: int = 5) -> float:
        """Median over `rounds`, each of as many calls as fill ROUND_S, after a call that does not count."""
        return self.medians([work], rounds)[0]

    def medians(self, works: Sequence[Work], rounds: int = 5) -> list[float]:
        """The same for several, which take turns so that all of them see the same clocks and temperatures."""
        repeats = [max(1, min(MAX_REPEATS, math.ceil(ROUND_S / self.seconds(work)))) for work in works]
        found: list[list[float]] = [[] for _ in works]
        for _ in range(rounds):
            for work, count, seconds in zip(works, repeats, found, strict=True):
                seconds.append(self.seconds(work, count))
        return [statistics.median(seconds) for seconds in found]


def captured(works: Sequence[Work], device: torch.device) -> Work:
    """All of `works` in turn; on a GPU as one graph, so that no launch waits for the host."""

    def in_turn() -> None:
        for work in works:
            work()

    if device.type != "cuda":
        return in_turn
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        in_turn()  # compiles, tunes and allocates what a capture must not
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        in_turn()
    return graph.replay
