"""Waiting for another thread or process."""

import time
from collections.abc import Callable
from typing import Any

HANG_S = 120.0  # bounds waits that might never end; no test measures anything against it
POLL_S = 0.002


def wait_for(happened: Callable[[], Any]) -> Any:
    """The first true value of `happened()`."""
    end_s = time.monotonic() + HANG_S
    while not (value := happened()):
        assert time.monotonic() < end_s, "timed out"
        time.sleep(POLL_S)
    return value
