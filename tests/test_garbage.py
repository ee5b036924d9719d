"""The collector skips what was loaded, but not what is created later."""

import gc
import weakref

import pytest

from starling.garbage import frozen_heap


class Node:
    def __init__(self) -> None:
        self.itself = self  # a cycle, so that only the collector can free it


def test_what_was_loaded_is_not_scanned_and_what_comes_later_is() -> None:
    try:
        with pytest.raises(ValueError, match="setup"), frozen_heap():
            assert not gc.isenabled()
            loaded = weakref.ref(Node())
            raise ValueError("setup")
        assert gc.isenabled()
        later = weakref.ref(Node())
        gc.collect()
        assert loaded() is not None and later() is None
    finally:
        gc.unfreeze()
    gc.collect()
    assert loaded() is None
