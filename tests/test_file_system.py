import fcntl
import logging
import os
import shutil
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from starling import tensor_file
from starling.file_system import NO_LOCKS, exclusive_lock, free_disk_bytes
from tests.waiting import wait_for

DiskUsage = namedtuple("DiskUsage", "total used free")


def test_the_second_one_says_that_it_waits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    order = []

    def second() -> None:
        with exclusive_lock(tmp_path / "lock", "test"):
            order.append("second")

    with ThreadPoolExecutor() as threads, exclusive_lock(tmp_path / "lock", "test"):
        other = threads.submit(second)
        wait_for(lambda: f"Another test is running in {tmp_path}" in caplog.text)
        order.append("first")
    other.result()
    assert order == ["first", "second"]


@pytest.mark.parametrize("fault", NO_LOCKS)
def test_without_locks_it_continues_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: int
) -> None:
    def flock(file: int, operation: int) -> None:
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(fcntl, "flock", flock)
    with exclusive_lock(tmp_path / "lock", "test"):
        assert f"{tmp_path} supports no locks ({os.strerror(fault)}): do not run a second test there" in caplog.text


def test_an_error_of_the_work_is_not_taken_for_one_of_the_lock(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="of the work"), exclusive_lock(tmp_path / "lock", "test"):
        raise OSError(NO_LOCKS[0], "of the work")
    with exclusive_lock(tmp_path / "lock", "test"):
        pass


def test_a_lock_file_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), exclusive_lock(tmp_path / "absent" / "lock", "test"):
        pass


def test_a_file_system_that_does_not_report_free_space_counts_as_large_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for usage, free in ((DiskUsage(9, 2, 7), 7), (DiskUsage(9, 9, 0), 0), (DiskUsage(0, 0, 0), float("inf"))):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        assert free_disk_bytes(tmp_path) == free


@pytest.mark.parametrize("refused", [False, True])
def test_tensor_files_are_readable_by_whoever_serves_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    """Or as the mount says, if permissions are fixed there."""

    def refuse(path: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    with monkeypatch.context() as patch:
        if refused:
            patch.setattr(Path, "chmod", refuse)
        tensor_file.write({"x": torch.ones(3)}, tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors")["x"].tolist() == [1, 1, 1]
    assert refused or (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o644
