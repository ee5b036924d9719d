"""Every way in which a folder can differ from its lock is found; a start does not hash 4 GB again."""

import errno
import os
import random

import pytest

from starling.weights import State, faults, inspect, verify
from starling.weights.digest import sha256_of
from tests.weights.conftest import lock_for

MODEL = "model.safetensors"


@pytest.fixture
def filled(folder, files):
    folder.mkdir()
    for name, body in files.items():
        (folder / name).write_bytes(body)
    return folder


def test_a_quick_look_hashes_nothing_and_remembers(filled, lock, monkeypatch):
    assert {report.state for report in inspect(filled, lock)} == {State.UNCHECKED}
    assert {report.state for report in verify(filled, lock)} == {State.VERIFIED}
    assert {report.state for report in inspect(filled, lock)} == {State.VERIFIED}
    hashed = []
    monkeypatch.setattr("starling.weights.inspection.sha256_of", lambda path, advance: hashed.append(path))
    verify(filled, lock)
    assert not hashed


def test_all_faults_at_once(filled, lock, files):
    (filled / "config.json").unlink()
    (filled / "tokenizer.json").write_bytes(files["tokenizer.json"] + b"!")
    (filled / MODEL).write_bytes(bytes(len(files[MODEL])))
    (filled / "other.safetensors").touch()
    found = {report.name: report.state for report in verify(filled, lock)}
    assert found == {
        "config.json": State.MISSING,
        "tokenizer.json": State.WRONG_SIZE,
        MODEL: State.WRONG_DIGEST,
        "other.safetensors": State.EXTRA,
    }
    assert len(faults(verify(filled, lock))) == 4


def test_any_changed_byte_is_found(filled, lock, files, seed):
    verify(filled, lock)
    rng = random.Random(seed)
    name = rng.choice(sorted(files))
    body = bytearray(files[name])
    body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
    path = filled / name
    times = path.stat()
    path.write_bytes(body)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))  # some kernels' clocks have ticks of milliseconds
    assert [report.name for report in verify(filled, lock) if report.is_fault] == [name]


def test_a_time_that_an_image_s_layer_cut_to_seconds_is_the_same(filled, lock):
    """In a pulled image, file times are whole seconds: a .verified.json baked in with the files must stay valid."""
    verify(filled, lock)
    for path in filled.glob("*.*"):
        time = path.stat().st_mtime_ns // 10**9 * 10**9
        os.utime(path, ns=(time, time))
    assert {report.state for report in inspect(filled, lock)} == {State.VERIFIED}


def test_afresh_finds_what_keeps_its_size_and_time(filled, lock, files):
    verify(filled, lock)
    path = filled / MODEL
    stat = path.stat()
    path.write_bytes(bytes(len(files[MODEL])))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert not faults(verify(filled, lock))
    assert faults(verify(filled, lock, afresh=True))


@pytest.mark.parametrize("unknown", [(), (MODEL,)])
def test_what_was_found_wrong_is_wrong_until_it_is_right(filled, files, unknown):
    """A disk that loses a bit keeps size and time: otherwise a quick look would still call the file verified, and no
    pull would repair it."""
    lock = lock_for(files, unknown)
    verify(filled, lock)
    path = filled / MODEL
    stat = path.stat()
    for body, wrong in ((bytes(len(files[MODEL])), [MODEL]), (files[MODEL], [])):
        path.write_bytes(body)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        for afresh in (True, False):
            assert [report.name for report in verify(filled, lock, afresh=afresh) if report.is_fault] == wrong


def test_what_changes_while_it_is_hashed_is_not_remembered(filled, lock, files, monkeypatch):
    def meanwhile(path, advance):
        found = sha256_of(path, advance)
        stat = path.stat()
        path.write_bytes(bytes(stat.st_size))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
        return found

    with monkeypatch.context() as patched:
        patched.setattr("starling.weights.inspection.sha256_of", meanwhile)
        verify(filled, lock)
    assert {report.state for report in inspect(filled, lock)} == {State.UNCHECKED}
    assert len(faults(verify(filled, lock))) == len(files)


def test_a_file_of_another_size_is_not_the_one_that_was_hashed(filled, files):
    """Even if its time is the same and the lock has no size."""
    lock = lock_for(files, unknown=(MODEL,))
    verify(filled, lock)
    path = filled / MODEL
    stat = path.stat()
    path.write_bytes(files[MODEL] + b"!")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert [report.name for report in verify(filled, lock) if report.is_fault] == [MODEL]


def test_a_replacement_for_another_revisions_file_is_trusted(filled, files):
    lock = lock_for(files, unknown=("config.json",))
    verify(filled, lock)
    other = lock.model_copy(update={"revision": "1" * 40})
    assert [report.name for report in verify(filled, other) if report.is_fault] == ["config.json"]
    (filled / "config.json").write_bytes(files["config.json"] + b"!")
    assert not faults(verify(filled, other))


def test_a_changed_lock_overrides_the_ledger(filled, lock, files):
    verify(filled, lock)
    other = lock_for({**files, MODEL: bytes(len(files[MODEL]))})
    assert [report.name for report in inspect(filled, other) if report.is_fault] == [MODEL]


@pytest.mark.parametrize("damage", ["", "{", '{"files": {"config.json": {}}}', "[]"])
def test_a_damaged_ledger_counts_as_none(filled, lock, damage):
    verify(filled, lock)
    (filled / ".verified.json").write_text(damage)
    assert {report.state for report in inspect(filled, lock)} == {State.UNCHECKED}
    assert not faults(verify(filled, lock))


def test_a_file_that_cannot_be_read_is_a_fault_among_the_others(filled, lock, files, monkeypatch):
    """Root may read everything, so the refusal is simulated."""

    def refuse(path, advance):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (filled / "config.json").write_bytes(files["config.json"] + b"!")
    monkeypatch.setattr("starling.weights.inspection.sha256_of", refuse)
    found = faults(verify(filled, lock))
    assert f"{MODEL}: unreadable (Permission denied)" in found
    assert len(found) == 3


def test_a_folder_that_may_not_be_entered_is_a_fault_of_every_file(filled, lock, monkeypatch):
    """As when root pulled the weights and another user serves them. Root may enter all, so Path itself refuses here."""

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(type(filled), "is_file", refuse)
    assert faults(inspect(filled, lock)) == [f"{file.name}: unreadable (Permission denied)" for file in lock.files]


def test_a_folder_that_cannot_be_written_is_still_verified(filled, lock, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError("read-only")

    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    assert not faults(verify(filled, lock))
