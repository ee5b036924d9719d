"""Python's search for garbage in reference cycles, kept away from what a server loads once and never drops."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def nothing_to_collect() -> Iterator[None]:
    """What is made inside stays until the process ends, and is never searched.

    A full search of the modules, tables and weights of a server takes 0.1 s, with every thread standing still: four of
    them while it loads, and one about every 2,000 requests.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
