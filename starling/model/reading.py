"""Bytes of an open file into memory that is there already."""

import os


def fill(target: memoryview, file: int, offset: int) -> int:
    """Read into `target` from `offset` on, until it is full or the file ends; how many bytes came. Raises OSError."""
    done = 0
    while done < len(target) and (read := os.preadv(file, [target[done:]], offset + done)):
        done += read
    return done
