"""The order in which weights are looked for, and the error when there are none."""

import logging

import pytest

from starling.errors import WeightsError
from starling.settings import Settings
from starling.weights import locate, locate_weights, pull
from tests.weights.conftest import BRISK, assert_whole


@pytest.fixture
def lock_path(tmp_path, lock):
    path = tmp_path / "some-model.lock"
    path.write_text(lock.to_json())
    return path


def test_an_explicit_folder_comes_first_and_is_not_checked(tmp_path, lock_path, hub, caplog):
    explicit = tmp_path / "mine"
    explicit.mkdir()
    for name in ("config.json", "tokenizer.json", "part-1.safetensors"):
        (explicit / name).write_bytes(b"anything")
    with caplog.at_level(logging.INFO):
        found = locate(explicit, allow_download=True, where=hub.url, lock_path=lock_path)
    assert (found.folder, found.origin, found.model_sha256) == (explicit, "explicit", None)
    assert "not checked against the lock" in caplog.text
    assert not hub.requests


def test_an_explicit_folder_that_is_wrong_is_an_error_not_a_fallback(tmp_path, lock_path, lock, folder, hub):
    pull(lock, folder, hub.url, BRISK)
    with pytest.raises(WeightsError, match="which is not a folder"):
        locate(tmp_path / "absent", lock_path=lock_path)
    pickles = tmp_path / "pickles"
    pickles.mkdir()
    (pickles / "pytorch_model.bin").touch()
    with pytest.raises(WeightsError, match=r"lacks config\.json, tokenizer\.json, \*\.safetensors \(no other form"):
        locate(pickles, lock_path=lock_path)


@pytest.mark.parametrize("asked", ["is_dir", "is_file", "iterdir"])
def test_an_explicit_folder_that_may_not_be_entered_is_reported_as_such(tmp_path, monkeypatch, asked):
    """Root may enter every folder, so Path itself refuses here, whichever question it is asked."""

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(tmp_path), asked, refuse)
    with pytest.raises(WeightsError, match=r"which cannot be read: Permission denied\. Name the folder"):
        locate(tmp_path)


def test_a_baked_folder_is_checked(lock_path, lock, folder, files, hub):
    pull(lock, folder, hub.url, BRISK)
    hub.requests.clear()
    found = locate(allow_download=True, where=hub.url, lock_path=lock_path)
    assert (found.folder, found.origin) == (folder, "baked")
    assert found.model_sha256 == {file.name: file for file in lock.files}["model.safetensors"].sha256
    assert not hub.requests
    (folder / "model.safetensors").write_bytes(bytes(len(files["model.safetensors"])))
    (folder / "config.json").unlink()
    (folder / "config.json").write_bytes(files["config.json"])
    with pytest.raises(WeightsError, match=r"model\.safetensors: wrong digest"):
        locate(lock_path=lock_path)
    (folder / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"config\.json: missing"):
        locate(lock_path=lock_path)


def test_sizes_are_looked_at_before_anything_is_hashed(lock_path, lock, folder, files, hub, monkeypatch):
    pull(lock, folder, hub.url, BRISK)
    (folder / ".verified.json").unlink()
    (folder / "config.json").write_bytes(files["config.json"] + b"!")
    monkeypatch.setattr("starling.weights.inspection.sha256_of", lambda path, advance: pytest.fail("hashed"))
    with pytest.raises(WeightsError, match=r"config\.json: wrong size"):
        locate(lock_path=lock_path)


def test_a_download_when_allowed_and_only_then(lock_path, folder, files, hub):
    with pytest.raises(WeightsError) as caught:
        locate(lock_path=lock_path, where=hub.url)
    for word in (
        "no download is allowed",
        "python -m starling weights pull",
        "STARLING_WEIGHTS",
        "STARLING_ALLOW_DOWNLOAD=1",
        "scripts/demo",
    ):
        assert word in str(caught.value)
    assert not hub.requests
    found = locate(allow_download=True, where=hub.url, lock_path=lock_path, retry=BRISK)
    assert (found.folder, found.origin) == (folder, "downloaded")
    assert_whole(folder, files)


def test_the_settings_say_where_weights_come_from(tmp_path, lock_path, folder, files, hub, monkeypatch):
    monkeypatch.setitem(locate.__kwdefaults__, "lock_path", lock_path)  # instead of the real weights' lock
    with pytest.raises(WeightsError, match="no download is allowed"):
        locate_weights(Settings(weights_source=hub.url))
    with pytest.raises(WeightsError, match="which is not a folder"):
        locate_weights(Settings(weights=tmp_path / "absent", weights_source=hub.url, allow_download=True))
    assert locate_weights(Settings(weights_source=hub.url, allow_download=True)).origin == "downloaded"
    assert_whole(folder, files)


def test_a_failed_download_says_what_else_can_be_done(lock_path, hub):
    hub.faults_of("model.safetensors").statuses = [500] * 9
    with pytest.raises(WeightsError, match=r"answers 500(.|\n)*scripts/demo"):
        locate(allow_download=True, where=hub.url, lock_path=lock_path, retry=BRISK)
