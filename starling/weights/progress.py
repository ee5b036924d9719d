"""Progress over bytes: a bar on a terminal, a line now and then in a log."""

import logging
import sys
import time
from types import TracebackType
from typing import NoReturn

from tqdm import tqdm

logger = logging.getLogger(__name__)

QUIET_BELOW_BYTES = 16 << 20  # what takes a moment needs no bar
LOG_EVERY_S = 10.0


class Progress:
    """`advance(n)` with n < 0 takes bytes back (a download that starts over)."""

    def __init__(self, label: str, total_bytes: int, done_bytes: int = 0) -> None:
        self._label = label
        self._total_bytes = total_bytes
        self._done_bytes = done_bytes
        self._bar: tqdm[NoReturn] | None = None
        self._logged_s = time.monotonic()

    def __enter__(self) -> "Progress":
        if self._total_bytes >= QUIET_BELOW_BYTES and sys.stderr.isatty():
            self._bar = tqdm(
                desc=self._label, total=self._total_bytes, initial=self._done_bytes, unit="B", unit_scale=True
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count_bytes: int) -> None:
        self._done_bytes += count_bytes
        if self._bar is not None:
            self._bar.update(count_bytes)
        elif time.monotonic() - self._logged_s >= LOG_EVERY_S:
            self._logged_s = time.monotonic()
            share = 100 * self._done_bytes // self._total_bytes
            logger.info("%s: %d of %d bytes (%d %%)", self._label, self._done_bytes, self._total_bytes, share)
