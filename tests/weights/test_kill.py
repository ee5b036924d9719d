"""Pulls that are killed, and pulls that run together: real processes, real SIGKILL."""

import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from starling.weights import inspect
from tests.waiting import wait_for
from tests.weights.conftest import assert_whole, lock_for

MODEL = "model.safetensors"
PROJECT = Path(__file__).parents[2]


@pytest.fixture
def lock_path(tmp_path, lock):
    path = tmp_path / "some-model.lock"
    path.write_text(lock.to_json())
    return path


@contextmanager
def pulling(lock_path: Path, url: str) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "starling", "weights", "pull", "--lock", str(lock_path), "--from", url]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(holds: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    wait_for(lambda: holds() or process.poll() is not None)
    assert holds(), process.communicate()


def test_killed_before_every_touch_of_a_file(hub, files, tmp_path):
    lock_path = tmp_path / "some-model.lock"
    lock_path.write_text(lock_for(files, unknown=("config.json", "tokenizer.json")).to_json())
    right = tmp_path / "right"
    right.mkdir()
    for name, body in files.items():
        (right / name).write_bytes(body)
    done = subprocess.run(
        [sys.executable, "-m", "tests.weights.die_at_every_step", lock_path, tmp_path / "work", hub.url, right],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    deaths = int(done.stdout.split()[-2])
    assert deaths > 30, done.stdout


def test_killed_again_and_again_while_bytes_arrive(hub, lock, lock_path, folder, files, seed):
    rng = random.Random(seed)
    hub.faults_of(MODEL).pause_s = 0.005
    for _ in range(4):
        goal = hub.served_bytes[MODEL] + rng.randrange(len(files[MODEL]) // 6)
        with pulling(lock_path, hub.url) as process:
            wait_until(lambda goal=goal: hub.served_bytes[MODEL] > goal, process)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        assert [report.name for report in inspect(folder, lock) if report.is_fault] == [MODEL]
    hub.faults_of(MODEL).pause_s = 0
    with pulling(lock_path, hub.url) as process:
        _, err = process.communicate()
    assert process.returncode == 0, err
    assert_whole(folder, files)
    starts = [asked for method, name, asked in hub.requests if (method, name) == ("GET", MODEL) and asked]
    assert starts, "every pull started over"


def test_two_together_fetch_once(hub, lock_path, folder, files):
    hub.faults_of(MODEL).pause_s = 0.01
    with pulling(lock_path, hub.url) as first, pulling(lock_path, hub.url) as second:
        outputs = [first.communicate(), second.communicate()]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    assert_whole(folder, files)
    assert hub.served_bytes[MODEL] == len(files[MODEL])


def test_one_that_waits_continues_when_the_other_is_killed(hub, lock_path, folder, files):
    hub.faults_of(MODEL).pause_s = 0.2  # so that the first is still running when the second has started
    with pulling(lock_path, hub.url) as first:
        wait_until(lambda: hub.served_bytes[MODEL] > 150_000, first)
        with pulling(lock_path, hub.url) as second:
            assert second.stderr is not None
            assert "Another pull is running" in second.stderr.readline()
            first.send_signal(signal.SIGKILL)
            hub.faults_of(MODEL).pause_s = 0
            _, err = second.communicate()
            assert second.returncode == 0, err
    assert_whole(folder, files)
    assert hub.served_bytes[MODEL] < 2 * len(files[MODEL])


def test_ctrl_c_keeps_what_arrived(hub, lock, lock_path, folder):
    hub.faults_of(MODEL).pause_s = 0.02
    with pulling(lock_path, hub.url) as process:
        wait_until(lambda: hub.served_bytes[MODEL] > 200_000, process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert "What has arrived is kept" in err
    assert "Traceback" not in err
    (report,) = [report for report in inspect(folder, lock) if report.is_fault]
    assert report.name == MODEL
    assert "bytes of an interrupted pull are kept" in report.detail
