"""Waiting for what another thread or process does."""

import time
from collections.abc import Callable
from typing import Any

HANG_S = 120.0  # a bound for what would otherwise wait for ever; nothing is judged by it
POLL_S = 0.002


def wait_for(happened: Callable[[], Any]) -> Any:
    """The first true value of `happened()`."""
    end_s = time.monotonic() + HANG_S
    while not (value := happened()):
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(POLL_S)
    return value
