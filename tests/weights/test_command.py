"""The command line, as a user meets it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from starling.__main__ import main
from starling.weights import Lock
from tests.weights.conftest import assert_whole, lock_for

MODEL = "model.safetensors"
PROJECT = Path(__file__).parents[2]


@pytest.fixture
def lock_path(tmp_path, files):
    path = tmp_path / "some-model.lock"
    path.write_text(lock_for(files, unknown=("config.json", "tokenizer.json")).to_json())
    return path


def weights(*arguments: object) -> int:
    return main(["weights", *map(str, arguments)])


def test_status_pull_verify_damage_repair(lock_path, hub, folder, files, capsys):
    assert weights("status", "--lock", lock_path) == 1
    out = capsys.readouterr().out
    assert out.count("missing") >= 3
    assert "weights pull" in out
    assert weights("pull", "--lock", lock_path, "--from", hub.url) == 0
    assert_whole(folder, files)
    assert weights("status", "--lock", lock_path) == 0
    assert weights("verify", "--lock", lock_path) == 0
    times = (folder / MODEL).stat()
    (folder / MODEL).write_bytes(bytes(len(files[MODEL])))
    os.utime(folder / MODEL, ns=(times.st_atime_ns, times.st_mtime_ns))  # as if the disk had lost a bit
    assert weights("verify", "--lock", lock_path) == 1
    assert f"{MODEL}: wrong digest" in capsys.readouterr().out
    assert weights("status", "--lock", lock_path) == 0
    assert f"{MODEL}: not hashed yet" in capsys.readouterr().out
    assert weights("pull", "--lock", lock_path, "--from", hub.url) == 0
    assert_whole(folder, files)


def test_folder_says_where_the_weights_are(lock_path, hub, folder, tmp_path, files):
    for action in (("pull", "--from", hub.url), ("status",), ("verify",), ("pin",)):
        assert weights(*action, "--lock", lock_path, "--folder", tmp_path / "elsewhere") == 0
    assert_whole(tmp_path / "elsewhere", files)
    assert not folder.exists()


def test_files_that_were_copied_there_are_hashed_when_it_matters(lock_path, folder, files, capsys):
    folder.mkdir()
    for name, body in files.items():
        (folder / name).write_bytes(body)
    assert weights("status", "--lock", lock_path) == 0
    assert "weights verify" in capsys.readouterr().out
    assert weights("pin", "--lock", lock_path) == 0
    assert Lock.read(lock_path) == lock_for(files)


def test_a_silent_connection_is_dropped_after_the_timeout(lock_path, hub, capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the attempts
    hub.faults_of(MODEL).stall_after = 0
    assert weights("pull", "--lock", lock_path, "--from", hub.url, "--timeout", "0.2") == 1
    assert "nothing arrived for 0.2 s; gave up after 5 attempts" in capsys.readouterr().err


def test_nothing_of_another_model_is_trusted(lock_path, folder, files, capsys):
    folder.mkdir()
    for name, body in files.items():
        (folder / name).write_bytes(bytes(len(body)))
    assert weights("verify", "--lock", lock_path) == 1
    out = capsys.readouterr().out
    assert "tokenizer.json: not hashed yet" in out and "weights pin" not in out
    assert not (folder / ".verified.json").exists()


def test_pin_fills_in_what_is_unknown_and_nothing_else(lock_path, hub, files, capsys):
    weights("pull", "--lock", lock_path, "--from", hub.url)
    assert "weights pin" in capsys.readouterr().out
    assert weights("pin", "--lock", lock_path) == 0
    assert Lock.read(lock_path) == lock_for(files)
    assert weights("pin", "--lock", lock_path) == 0
    assert "already has every size and digest" in capsys.readouterr().out


def test_a_lock_that_cannot_be_written_is_reported(lock_path, hub, capsys):
    weights("pull", "--lock", lock_path, "--from", hub.url)
    Path(f"{lock_path}.{os.getpid()}").mkdir()  # where the new lock would be written
    assert weights("pin", "--lock", lock_path) == 1
    assert "Is a directory" in capsys.readouterr().err


def test_pin_refuses_a_folder_that_is_wrong(lock_path, hub, folder):
    weights("pull", "--lock", lock_path, "--from", hub.url)
    before = lock_path.read_bytes()
    (folder / MODEL).write_bytes(b"short")
    assert weights("pin", "--lock", lock_path) == 1
    assert lock_path.read_bytes() == before


def test_faults_go_to_stderr_without_a_traceback(lock_path, tmp_path, capsys):
    assert weights("pull", "--lock", tmp_path / "absent.lock") == 1
    assert "absent.lock" in capsys.readouterr().err
    for timeout in ("-1", "0", "inf", "nan", "soon"):
        with pytest.raises(SystemExit) as caught:
            weights("pull", "--lock", lock_path, "--timeout", timeout)
        assert caught.value.code == 2
        assert "give seconds above 0" in capsys.readouterr().err


def test_offline_is_honoured(lock_path, hub, folder, files, tmp_path):
    """In its own process: huggingface_hub reads HF_HUB_OFFLINE when it is imported."""
    source = tmp_path / "source"
    source.mkdir()
    for name, body in files.items():
        (source / name).write_bytes(body)

    def pull(*arguments: object) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "starling", "weights", "pull", "--lock", str(lock_path), *map(str, arguments)]
        environ = {**os.environ, "HF_HUB_OFFLINE": "1"}
        return subprocess.run(command, cwd=PROJECT, env=environ, capture_output=True, text=True, check=False)

    refused = pull("--from", hub.url)
    assert refused.returncode == 1
    assert "HF_HUB_OFFLINE is set" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not hub.requests
    assert pull("--from", source).returncode == 0
    assert_whole(folder, files)


def test_the_token_goes_to_hf_endpoint_and_not_where_it_redirects_to(lock_path, hub, folder, files):
    """In its own process: huggingface_hub reads HF_ENDPOINT, here one with a path, when it is imported."""
    command = [sys.executable, "-m", "starling", "weights", "pull", "--lock", str(lock_path)]
    environ = {**os.environ, "HF_ENDPOINT": f"{hub.url}/proxies/hub/", "HF_TOKEN": "hf_very_secret"}
    done = subprocess.run(command, cwd=PROJECT, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_whole(folder, files)
    assert "hf_very_secret" not in done.stdout + done.stderr
    asked = [{name.lower(): value for name, value in headers.items()} for headers in hub.headers]
    shown_to = {(headers["host"].split(":")[0], headers.get("authorization")) for headers in asked}
    assert shown_to == {("127.0.0.1", "Bearer hf_very_secret"), ("localhost", None)}


@pytest.mark.parametrize("endpoint", ["http://[bad", "http://host:port", "http://me:se[cret@host", "host"])
def test_an_invalid_hf_endpoint_is_reported_in_one_line(lock_path, endpoint):
    """In its own process: importing huggingface_hub fails on some of these."""
    command = [sys.executable, "-m", "starling", "weights", "pull", "--lock", str(lock_path)]
    environ = {**os.environ, "HF_ENDPOINT": endpoint}
    done = subprocess.run(command, cwd=PROJECT, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("HF_ENDPOINT cannot be used. ") and "Give " in line
    assert ("has no scheme" if endpoint == "host" else "http://…" if "@" in endpoint else endpoint) in line
    assert "cret" not in line


def test_a_start_with_whole_weights_does_not_import_the_hubs_library(lock_path, hub, folder):
    weights("pull", "--lock", lock_path, "--from", hub.url)
    code = (
        "import sys, pathlib; from starling.weights import locate; "
        "locate(lock_path=pathlib.Path(sys.argv[1])); "
        "sys.exit(any(name in sys.modules for name in ('huggingface_hub', 'httpx2', 'torch')))"
    )
    subprocess.run([sys.executable, "-c", code, str(lock_path)], cwd=PROJECT, check=True)
