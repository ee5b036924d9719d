"""Pulling from a hub that cuts, truncates, corrupts, stalls and lies."""

import errno
import fcntl
import logging
import os
import random
import shutil
import stat
import traceback
from collections import namedtuple
from pathlib import Path

import pytest

from starling.errors import WeightsError
from starling.weights import Lock, RetryPolicy, State, inspect, progress, pull, verify
from starling.weights import hub as hub_module
from starling.weights.address import without_secrets
from starling.weights.digest import sha256_of
from tests.weights.conftest import BRISK, IMPATIENT, assert_whole, lock_for
from tests.weights.hub_server import HubServer

MODEL = "model.safetensors"


def states(folder: Path, lock: Lock) -> dict[str, State]:
    return {report.name: report.state for report in inspect(folder, lock)}


def test_brings_every_file_and_then_needs_no_network(hub, lock, folder, files):
    reports = pull(lock, folder, hub.url, BRISK)
    assert {report.state for report in reports} == {State.VERIFIED}
    assert_whole(folder, files)
    asked = len(hub.requests)
    assert pull(lock, folder, hub.url, BRISK) == reports
    assert len(hub.requests) == asked


def test_brings_only_what_is_missing_or_wrong(hub, lock, folder, files):
    pull(lock, folder, hub.url, BRISK)
    hub.requests.clear()
    (folder / "config.json").unlink()
    body = bytearray(files["tokenizer.json"])
    body[len(body) // 2] ^= 1
    (folder / "tokenizer.json").write_bytes(body)
    pull(lock, folder, hub.url, BRISK)
    assert_whole(folder, files)
    assert {name for _, name, _ in hub.requests} == {"config.json", "tokenizer.json"}


def test_resumes_after_cuts(hub, lock, folder, files, seed, monkeypatch):
    monkeypatch.setattr(hub_module, "MIN_PROGRESS_BYTES", 1000)  # every cut leaves more than this
    rng = random.Random(seed)
    hub.faults_of(MODEL).cut_after = [rng.randrange(20_000, 60_000) for _ in range(6)]
    pull(lock, folder, hub.url, BRISK)
    assert_whole(folder, files)
    starts = [asked for method, name, asked in hub.requests if (method, name) == ("GET", MODEL) and asked]
    assert starts, "no Range was asked for: the download started over"
    assert hub.served_bytes[MODEL] < 2 * len(files[MODEL])


@pytest.mark.parametrize("ranges", ["ignored", "refused", "moved"])
def test_starts_over_when_the_server_does_not_honour_ranges(hub, lock, folder, files, ranges):
    hub.faults_of(MODEL).cut_after = [100_000]
    hub.faults_of(MODEL).ranges = ranges
    pull(lock, folder, hub.url, BRISK)
    assert_whole(folder, files)


def test_resumes_in_a_later_pull(hub, lock, folder, files):
    faults = hub.faults_of(MODEL)
    faults.stall_after = 300_000
    with pytest.raises(WeightsError, match=r"model\.safetensors.*nothing arrived for 1 s; gave up after 1 attempts"):
        pull(lock, folder, hub.url, IMPATIENT)
    assert states(folder, lock)[MODEL] is State.MISSING
    faults.stall_after = None
    before = hub.served_bytes[MODEL]
    pull(lock, folder, hub.url, BRISK)
    assert_whole(folder, files)
    assert hub.served_bytes[MODEL] - before < len(files[MODEL])


@pytest.mark.parametrize("after", [0, 200_000])
def test_gives_up_on_a_server_that_trickles(hub, lock, folder, after):
    hub.faults_of(MODEL).trickle_after = after
    with pytest.raises(WeightsError, match=r"only \d+ bytes arrived in 1 s"):
        pull(lock, folder, hub.url, IMPATIENT)


def test_a_truncated_body_is_not_the_file(hub, lock, folder):
    hub.faults_of(MODEL).end_after = 1000
    with pytest.raises(WeightsError, match=r"the connection ended at byte \d+ of"):
        pull(lock, folder, hub.url, BRISK)
    assert states(folder, lock)[MODEL] is State.MISSING


def test_a_body_that_is_too_long_is_refused(hub, lock, folder, files):
    hub.faults_of(MODEL).longer_by = 100_000
    with pytest.raises(WeightsError, match=f"sends more than the {len(files[MODEL])} bytes"):
        pull(lock, folder, hub.url, BRISK)
    assert states(folder, lock)[MODEL] is State.MISSING


def test_corruption_is_found_and_discarded(hub, lock, folder, files, seed):
    faults = hub.faults_of(MODEL)
    faults.flip_byte = random.Random(seed).randrange(len(files[MODEL]))
    with pytest.raises(WeightsError, match=r"model\.safetensors: sha256 is [0-9a-f]{64}, expected [0-9a-f]{64}"):
        pull(lock, folder, hub.url, BRISK)
    assert states(folder, lock)[MODEL] is State.MISSING
    faults.flip_byte = None
    pull(lock, folder, hub.url, BRISK)
    assert_whole(folder, files)


def test_the_log_counts_what_has_arrived(hub, lock, folder, files, monkeypatch, caplog):
    """Also when a server starts over, and when an earlier pull left something."""
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.0)
    caplog.set_level(logging.INFO, logger="starling")
    hub.faults_of(MODEL).cut_after, hub.faults_of(MODEL).ranges = [100_000], "ignored"
    (folder / ".partial").mkdir(parents=True)
    (folder / ".partial" / f"tokenizer.json.{lock.revision}").write_bytes(files["tokenizer.json"][:-1])
    pull(lock, folder, hub.url, BRISK)
    for name, body in files.items():
        for label in (name, f"Hashing {name}"):
            told = [line for line in caplog.messages if line.startswith(f"{label}: ")]
            assert told[-1] == f"{label}: {len(body)} of {len(body)} bytes (100 %)"


def test_a_pulled_file_is_remembered_whatever_an_archive_does_to_its_time(hub, lock, folder):
    """Image layers and other archives: some truncate it to seconds, some round it."""
    pull(lock, folder, hub.url, BRISK)
    for path in folder.glob("*.*"):
        second = -(-path.stat().st_mtime_ns // 10**9) * 10**9
        os.utime(path, ns=(second, second))
    assert set(states(folder, lock).values()) == {State.VERIFIED}


def test_a_power_cut_leaves_whole_files_or_none(hub, lock, folder, files, disk_events):
    """A file's content is on the disk before its name is, and its name before the pull continues."""
    pull(lock, folder, hub.url, BRISK)
    home = folder.stat().st_ino
    for name in files:
        inode = (folder / name).stat().st_ino
        named = disk_events.index(("renamed", inode, name))
        assert ("synced", inode) in disk_events[:named]
        assert disk_events[named + 1] == ("synced", home)
    assert any(event[0] == "renamed" and event[2] == ".verified.json" for event in disk_events)


def test_a_damaged_partial_file_of_an_earlier_pull_is_fetched_again(hub, lock, folder, files):
    faults = hub.faults_of(MODEL)
    faults.flip_byte, faults.stall_after = 10, 200_000
    with pytest.raises(WeightsError):
        pull(lock, folder, hub.url, IMPATIENT)
    faults.flip_byte = faults.stall_after = None
    pull(lock, folder, hub.url, BRISK)
    assert_whole(folder, files)


def test_a_partial_file_that_is_longer_than_the_file_is_dropped(hub, folder, files):
    """Even if no known digest would reveal it."""
    lock = lock_for(files, unknown=(MODEL,))
    hub.faults_of(MODEL).etag = "5f3-1a2b"
    (folder / ".partial").mkdir(parents=True)
    (folder / ".partial" / f"{MODEL}.{lock.revision}").write_bytes(bytes(len(files[MODEL]) + 1))
    pull(lock, folder, hub.url, BRISK)
    assert_whole(folder, files)


def test_the_partial_file_of_another_revision_is_not_resumed(hub, folder, files):
    """Even though no known digest would reveal it."""
    hub.faults_of(MODEL).etag = "5f3-1a2b"
    hub.faults_of(MODEL).cut_after = [100_000]
    lock = lock_for(files, unknown=(MODEL,))
    with pytest.raises(WeightsError, match="gave up after 1 attempts"):
        pull(lock, folder, hub.url, RetryPolicy(attempts=1))
    other = lock.model_copy(update={"revision": "1" * 40})
    new = dict(files, **{MODEL: files[MODEL][::-1]})
    with HubServer(other.repository, other.revision, new, faults=hub.faults).running() as newer:
        pull(other, folder, newer.url, BRISK)
    assert_whole(folder, new)


def test_transient_failures_are_waited_out(hub, lock, folder, files):
    hub.faults_of(MODEL).statuses = [503, 429]
    pull(lock, folder, hub.url, BRISK)
    assert_whole(folder, files)


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({"RateLimit": '"resolvers";r=0;t=287', "RateLimit-Policy": '"fixed window";"resolvers";q=3000;w=300'}, 287),
        ({"RateLimit": '"resolvers";r=12;t=287', "Retry-After": "7"}, 7),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, BRISK.first_wait_s),
        ({"Retry-After": "86400"}, 300),
    ],
)
def test_the_wait_that_a_server_asks_for_is_kept(hub, lock, folder, monkeypatch, headers, wait_s):
    waits_s = []
    monkeypatch.setattr(hub_module.time, "sleep", waits_s.append)
    hub.faults_of(MODEL).statuses, hub.faults_of(MODEL).status_headers = [429], headers
    pull(lock, folder, hub.url, BRISK)
    assert waits_s == [wait_s]


def test_waits_double_and_a_lost_source_is_asked_for_no_other_file(hub, lock, folder, files, monkeypatch):
    waits_s = []
    monkeypatch.setattr(hub_module.time, "sleep", waits_s.append)
    for name in files:
        hub.faults_of(name).statuses = [503] * 9
    with pytest.raises(WeightsError, match="gave up after 5 attempts"):
        pull(lock, folder, hub.url, RetryPolicy())
    assert waits_s == [1, 2, 4, 8]


def test_redirects_without_an_end_are_a_fault_of_their_file(hub, lock, folder):
    hub.faults_of(MODEL).circles = True
    with pytest.raises(WeightsError, match=r"model\.safetensors: http://127\.0\.0\.1:\d+: .*redirects"):
        pull(lock, folder, hub.url, BRISK)
    assert states(folder, lock)["tokenizer.json"] is State.VERIFIED


def test_every_fault_is_reported_at_once_and_before_any_byte(hub, lock, folder, files):
    hub.faults_of(MODEL).size = len(files[MODEL]) - 1
    hub.faults_of("config.json").commit = "0" * 40
    del hub.files["tokenizer.json"]
    with pytest.raises(WeightsError) as caught:
        pull(lock, folder, hub.url, BRISK)
    text = str(caught.value)
    assert f"the source has {len(files[MODEL]) - 1} bytes, the lock says {len(files[MODEL])}" in text
    assert f"serves revision {'0' * 40}" in text
    assert "tokenizer.json" in text
    assert "404" in text
    assert not any(method == "GET" for method, _, _ in hub.requests)


def test_every_wrong_digest_is_reported(hub, lock, folder):
    hub.faults_of(MODEL).flip_byte = 0
    hub.faults_of("config.json").flip_byte = 0
    with pytest.raises(WeightsError) as caught:
        pull(lock, folder, hub.url, BRISK)
    assert "config.json: sha256 is" in str(caught.value)
    assert f"{MODEL}: sha256 is" in str(caught.value)
    assert states(folder, lock)["tokenizer.json"] is State.VERIFIED


def test_a_hub_with_another_digest_is_refused_before_the_download(hub, lock, folder):
    hub.faults_of(MODEL).etag = "ab" * 32
    with pytest.raises(WeightsError, match=f"the source has sha256 {'ab' * 32}, the lock says"):
        pull(lock, folder, hub.url, BRISK)
    assert not any(method == "GET" for method, _, _ in hub.requests)


def test_what_was_right_stays_when_a_pull_fails(hub, lock, folder, files):
    pull(lock, folder, hub.url, BRISK)
    (folder / "config.json").unlink()
    hub.faults_of("config.json").flip_byte = 0
    with pytest.raises(WeightsError):
        pull(lock, folder, hub.url, BRISK)
    assert (folder / MODEL).read_bytes() == files[MODEL]


def test_a_full_disk_is_reported_before_the_download(hub, lock, folder, files, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 5, 5))
    need = sum(map(len, files.values()))
    with pytest.raises(WeightsError, match=f"the disk has 5 bytes free but {need} are needed"):
        pull(lock, folder, hub.url, BRISK)
    assert not any(method == "GET" for method, _, _ in hub.requests)


def test_a_disk_with_just_enough_space_for_the_rest_is_enough(hub, lock, folder, files, monkeypatch):
    (folder / ".partial").mkdir(parents=True)
    (folder / ".partial" / f"{MODEL}.{lock.revision}").write_bytes(files[MODEL][:100_000])
    usage = namedtuple("usage", "total used free")
    free = sum(map(len, files.values())) - 100_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - free, free))
    pull(lock, folder, hub.url, BRISK)
    assert_whole(folder, files)


def test_a_network_share_that_lacks_what_disks_have_can_hold_the_weights(hub, lock, folder, files, monkeypatch):
    """No locks, no flushing of folders, times set by the owner only, no report of free space."""

    def flock(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    def fsync(file: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flushed.append(os.fstat(file).st_ino)

    def utime(path: Path, times: tuple[int, int]) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    flushed: list[int] = []
    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "utime", utime)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(0, 0, 0))
    assert {report.state for report in pull(lock, folder, hub.url, BRISK)} == {State.VERIFIED}
    assert_whole(folder, files)
    assert {(folder / name).stat().st_ino for name in files} <= set(flushed)


def test_a_folder_that_cannot_be_made_is_a_fault_of_the_weights(hub, lock, folder):
    folder.write_text("no folder")
    with pytest.raises(WeightsError, match="cannot be written to"):
        pull(lock, folder / "below", hub.url, BRISK)


def test_tensors_that_the_lock_does_not_name_are_a_fault(hub, lock, folder):
    pull(lock, folder, hub.url, BRISK)
    (folder / "more.safetensors").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"more\.safetensors: not in the lock"):
        pull(lock, folder, hub.url, BRISK)
    (folder / "config.json").unlink()
    hub.faults_of("config.json").flip_byte = 0
    with pytest.raises(WeightsError, match=r"more\.safetensors: not in the lock(.|\n)*config\.json: sha256 is"):
        pull(lock, folder, hub.url, BRISK)


def test_nobody_at_the_address(lock, folder):
    with pytest.raises(WeightsError, match=r"http://127\.0\.0\.1:9: .*gave up after 3 attempts") as caught:
        pull(lock, folder, "http://user:password@127.0.0.1:9", BRISK)
    assert str(caught.value).count("gave up") == 1, "the other files were asked for too"


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("ftp://user:s3cret@mirror.example", "begins with ftp://"),
        ("s3://KEY:s3cret@bucket/folder", "begins with s3://"),
        ("user:s3cret@http://mirror.example", "has no scheme"),
        ("user:s3cret@mirror.example/folder", "'mirror.example/folder' is not a source of weights"),
        ("http://user:s3cret and more@mirror.example", "'http://…' is not a source of weights"),
        ("https://user:s3cret/and@mirror.example", "'https://…' is not a source of weights"),
        ("https://user:1/s3cret@mirror.example", "'https://…' is not a source of weights"),
        ("https://user:1?s3cret@mirror.example", "'https://…' is not a source of weights"),
        ("https://?token=s3cret", "'https://…' is not a source of weights"),
        ("https://#s3cret", "'https://…' is not a source of weights"),
        ("http://[bad", r"'http://\[bad' is not a source of weights"),
        ("http://host:port", "'http://host:port' is not a source of weights"),
        ("http://host:65536", "'http://host:65536' is not a source of weights"),
        ("HTTP://", "'http://' is not a source of weights"),
        ("http://:80/folder", "'http://:80/folder' is not a source of weights"),
        ("http://a host", "'http://a host' is not a source of weights"),
        ("http://host\x01", r"'http://host\\x01' is not a source of weights"),
    ],
)
def test_an_invalid_address_is_refused_without_showing_its_secrets(lock, folder, address, told, caplog):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(WeightsError, match=told) as caught:
        pull(lock, folder, address)
    assert "s3cret" not in caplog.text + "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("user", ["user:s3cret", "user:s3'cret", "user:%20s3cret", "s3cret", "user:@s3cret"])
def test_the_user_part_of_an_address_is_shown_nowhere(lock, folder, caplog, user):
    caplog.set_level(logging.DEBUG, logger="starling")
    with pytest.raises(WeightsError, match=r"https://127\.0\.0\.1:9/folder: .*gave up after 3 attempts") as caught:
        pull(lock, folder, f"HTTPS://{user}@127.0.0.1:9/folder/", BRISK)
    assert "s3" not in caplog.text + "".join(traceback.format_exception(caught.value))


def test_addresses_in_a_text_lose_their_secrets():
    text = """at 'HTTP://user:s3'cret@mirror.example/a?sig=s3cret@x#s3cret' and <https://cdn.example:8080/b@c>."""
    assert without_secrets(text) == "at 'HTTP://mirror.example/a and <https://cdn.example:8080/b@c>."


def test_a_scheme_is_a_scheme_in_any_case(hub, lock, folder, files):
    pull(lock, folder, hub.url.replace("http", "HTTP"), BRISK)
    assert_whole(folder, files)


def test_a_folder_stands_in_for_the_hub(tmp_path, lock, folder, files):
    source = tmp_path / "source"
    source.mkdir()
    for name, body in files.items():
        (source / name).write_bytes(body)
    (folder / ".partial").mkdir(parents=True)
    (folder / ".partial" / f"{MODEL}.{lock.revision}").write_bytes(files[MODEL][:100_000])
    pull(lock, folder, str(source), BRISK)
    assert_whole(folder, files)


def test_a_folder_that_changes_meanwhile(tmp_path, folder, files, monkeypatch):
    """Even if no known digest would reveal it."""
    source, disk_usage = tmp_path / "source", shutil.disk_usage
    source.mkdir()
    (source / MODEL).write_bytes(files[MODEL])

    def meanwhile(path):  # looked at between the offer and the copy
        (source / MODEL).write_bytes(files[MODEL][:-1])
        return disk_usage(path)

    monkeypatch.setattr(shutil, "disk_usage", meanwhile)
    with pytest.raises(WeightsError, match="changed while it was copied"):
        pull(lock_for({MODEL: files[MODEL]}, unknown=(MODEL,)), folder, str(source), BRISK)
    assert not (folder / MODEL).exists()


def test_a_folder_that_is_short_wrong_or_absent(tmp_path, lock, folder, files):
    source = tmp_path / "source"
    source.mkdir()
    (source / MODEL).write_bytes(files[MODEL][:-1])
    (source / "config.json").write_bytes(bytes(len(files["config.json"])))
    with pytest.raises(WeightsError) as caught:
        pull(lock, folder, str(source), BRISK)
    assert MODEL in str(caught.value)
    assert "tokenizer.json" in str(caught.value)
    with pytest.raises(WeightsError, match="neither a folder nor"):
        pull(lock, folder, str(tmp_path / "nowhere"), BRISK)


def test_first_use_is_recorded_logged_and_then_expected(hub, folder, files, caplog):
    lock = lock_for(files, unknown=("config.json", "tokenizer.json"))
    with caplog.at_level(logging.WARNING):
        reports = {report.name: report for report in pull(lock, folder, hub.url, BRISK)}
    assert_whole(folder, files)
    assert reports["config.json"].first_use
    assert not reports[MODEL].first_use
    assert "trusted" in caplog.text
    body = bytearray(files["config.json"])
    body[0] ^= 1
    (folder / "config.json").write_bytes(body)
    (report,) = [report for report in verify(folder, lock) if report.is_fault]
    assert "on first use it was" in report.detail
    hub.files["config.json"] = bytes(body)  # a server that changed its mind at the same revision
    with pytest.raises(WeightsError, match=r"config\.json: sha256 is .*, expected"):
        pull(lock, folder, hub.url, BRISK)


@pytest.mark.parametrize(("name", "told"), [("config.json", "its git blob id is"), (MODEL, "sha256 is .*, expected")])
def test_first_use_of_a_corrupt_file_is_caught_by_the_hubs_own_checksum(hub, folder, files, name, told):
    lock = lock_for(files, unknown=(name,))
    hub.faults_of(name).flip_byte = 0
    with pytest.raises(WeightsError, match=told):
        pull(lock, folder, hub.url, BRISK)


def test_a_file_that_was_there_is_adopted_only_if_the_hub_vouches_for_it(hub, folder, files):
    lock = lock_for(files, unknown=("config.json", "tokenizer.json"))
    folder.mkdir()
    (folder / "config.json").write_bytes(files["config.json"])
    (folder / "tokenizer.json").write_bytes(bytes(len(files["tokenizer.json"])))
    (folder / MODEL).write_bytes(files[MODEL])
    pull(lock, folder, hub.url, BRISK)
    assert_whole(folder, files)
    assert {name for method, name, _ in hub.requests if method == "GET"} == {"tokenizer.json"}


def test_a_file_of_another_size_is_not_hashed_before_it_is_fetched(hub, lock, folder, files, monkeypatch):
    hashed = []

    def noting(path, *advance):
        hashed.append(path)
        return sha256_of(path, *advance)

    monkeypatch.setattr("starling.weights.download.sha256_of", noting)
    folder.mkdir()
    (folder / MODEL).write_bytes(b"cut short")
    pull(lock, folder, hub.url, BRISK)
    assert_whole(folder, files)
    assert folder / MODEL not in hashed


def test_files_of_another_revision_are_not_taken_for_this_one(hub, folder, files):
    lock = lock_for(files, unknown=("config.json",))
    pull(lock, folder, hub.url, BRISK)
    other = lock.model_copy(update={"revision": "1" * 40})
    (report,) = [report for report in inspect(folder, other) if report.is_fault]
    assert "was fetched for" in report.detail
    new = dict(files, **{"config.json": files["config.json"] + b"!"})
    with HubServer(other.repository, other.revision, new).running() as newer:
        pull(other, folder, newer.url, BRISK)
    assert_whole(folder, new)


def test_the_token_goes_only_to_the_hub_and_no_secret_to_the_log(hub, lock, folder, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    hub.faults_of(MODEL).statuses = [503]
    hub.faults_of("config.json").statuses = [400]
    caplog.set_level(logging.DEBUG, logger="starling")
    with pytest.raises(WeightsError) as caught:
        pull(lock, folder, hub.url.replace("//", "//user:password@"), BRISK)
    for secret in ("hf_very_secret", "password", "top-secret"):
        assert secret not in caplog.text + str(caught.value)
    assert not any("hf_very_secret" in str(headers) for headers in hub.headers)


def test_a_plain_web_server_is_enough(hub, lock, folder, files):
    """It need not redirect, its ETag may mean nothing to us, and it may compress for clients that accept that."""
    for name in files:
        hub.faults_of(name).redirects = False
        hub.faults_of(name).etag = "5f3-1a2b"
        hub.faults_of(name).compresses = True
    pull(lock, folder, hub.url + "/", BRISK)
    assert_whole(folder, files)
