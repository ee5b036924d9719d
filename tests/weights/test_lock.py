"""The lock's form is strict, and filling it in never changes what it knows."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starling.errors import WeightsError
from starling.weights import LOCK_PATH, Lock
from tests.weights.conftest import lock_for

GOOD = {
    "repository": "someone/some-model",
    "revision": "a" * 40,
    "licence": "mit",
    "files": [{"name": "model.safetensors", "size": 5, "sha256": "0" * 64}],
}


def write(path: Path, raw: object) -> Path:
    path.write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return path


def with_file(**changes: object) -> dict[str, object]:
    return {**GOOD, "files": [{**GOOD["files"][0], **changes}]}  # type: ignore[dict-item]


def test_our_own_lock_names_what_is_served():
    lock = Lock.read(LOCK_PATH)
    assert lock.revision == "f0a87c473f82b2e369a4106ef658dc663ebcba2e"
    model = {file.name: file for file in lock.files}["model.safetensors"]
    assert model.size == 4_150_913_000
    assert model.sha256 == "8dc38fa4fcb40313de4e73c17252b0a175b82170f5e8d2c877b0dbb22eb08621"
    assert LOCK_PATH.read_text(encoding="utf-8") == lock.to_json()


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pth", "x.ckpt", "x.pkl", "model.safetensors.py"]
)
def test_files_that_can_run_code_are_refused(tmp_path, name):
    raw = {**GOOD, "files": [*GOOD["files"], {"name": name, "size": 5, "sha256": "unknown"}]}
    with pytest.raises(WeightsError, match="which hold no code"):
        Lock.read(write(tmp_path / "lock", raw))


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/model.safetensors", "a/model.safetensors", "a\\b.json", ".json", ""]
)
def test_names_stay_inside_the_folder(tmp_path, name):
    with pytest.raises(WeightsError, match=r"files\.0\.name"):
        Lock.read(write(tmp_path / "lock", with_file(name=name)))


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({**GOOD, "colour": "red"}, "colour: Extra inputs are not permitted"),
        (with_file(colour="red"), "files.0.colour: Extra inputs are not permitted"),
        ({**GOOD, "revision": "main"}, "revision"),
        ({**GOOD, "repository": "no-owner"}, "repository"),
        ({**GOOD, "files": []}, "files"),
        ({**GOOD, "files": GOOD["files"] * 2}, "named twice"),
        (with_file(name="config.json"), "no .safetensors file"),
        (with_file(size="5"), "files.0.size"),
        (with_file(size=0), "files.0.size"),
        (with_file(size=None), 'write "unknown"'),
        (with_file(sha256=None), 'write "unknown"'),
        (with_file(sha256="AB" * 32), "files.0.sha256"),
        ({key: GOOD[key] for key in ("repository", "licence", "files")}, "revision: Field required"),
        (json.dumps(GOOD)[:-1] + ', "licence": "other"}', "keys are given twice: licence"),
        ("{", "cannot be read"),
        ("[]", "is not a lock"),
    ],
)
def test_what_is_not_a_lock_is_refused(tmp_path, raw, says):
    with pytest.raises(WeightsError) as caught:
        Lock.read(write(tmp_path / "lock", raw))
    assert says in str(caught.value)


def test_every_fault_is_named_at_once(tmp_path):
    with pytest.raises(WeightsError) as caught:
        Lock.read(write(tmp_path / "lock", {**with_file(size=-1, sha256="x"), "revision": "main"}))
    for place in ("revision", "files.0.size", "files.0.sha256"):
        assert place in str(caught.value)


@given(
    bodies=st.dictionaries(
        st.from_regex(r"[a-z]{1,8}\.(json|safetensors)", fullmatch=True), st.binary(min_size=1), min_size=1
    ),
    data=st.data(),
)
def test_filling_changes_only_what_is_unknown(bodies, data):
    bodies["model.safetensors"] = b"tensors"
    unknown = tuple(data.draw(st.sets(st.sampled_from(sorted(bodies)))))
    lock = lock_for(bodies, unknown)
    assert Lock.model_validate_json(lock.to_json()) == lock
    true = {name: (len(body), hashlib.sha256(body).hexdigest()) for name, body in bodies.items()}
    lies = {name: (1 << 40, "f" * 64) for name in bodies if name not in unknown}
    assert lock.filled({}) == lock
    assert lock.filled({**true, **lies}) == lock_for(bodies)
