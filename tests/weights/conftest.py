"""A small checkpoint's files, a lock for them, and a hub that serves them."""

import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from starling.weights import Lock, LockedFile, RetryPolicy
from tests.weights.hub_server import HubServer

REVISION = "f0a87c473f82b2e369a4106ef658dc663ebcba2e"
REPOSITORY = "someone/some-model"
BRISK = RetryPolicy(attempts=3, first_wait_s=0.01)
IMPATIENT = RetryPolicy(stall_s=1, attempts=1)  # for tests of stalls


def lock_for(files: dict[str, bytes], unknown: tuple[str, ...] = ()) -> Lock:
    """`unknown`: names whose size and digest are not in the lock."""
    return Lock(
        repository=REPOSITORY,
        revision=REVISION,
        licence="none",
        files=tuple(
            LockedFile(
                name=name,
                size="unknown" if name in unknown else len(body),
                sha256="unknown" if name in unknown else hashlib.sha256(body).hexdigest(),
            )
            for name, body in files.items()
        ),
    )


@pytest.fixture
def seed() -> int:
    """Fresh in every run; a failing test shows it."""
    value = int(os.environ.get("STARLING_TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"seed {value}: set STARLING_TEST_SEED to it to repeat this run")
    return value


@pytest.fixture
def files(seed: int) -> dict[str, bytes]:
    rng = random.Random(seed)
    return {
        "config.json": rng.randbytes(rng.randrange(1, 2000)),
        "tokenizer.json": rng.randbytes(rng.randrange(1, 200_000)),
        "model.safetensors": rng.randbytes(rng.randrange(500_000, 900_000)),
    }


@pytest.fixture
def lock(files: dict[str, bytes]) -> Lock:
    return lock_for(files)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "some-model"


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[HubServer]:
    with HubServer(REPOSITORY, REVISION, dict(files)).running() as server:
        yield server


def assert_whole(folder: Path, files: dict[str, bytes]) -> None:
    for name, body in files.items():
        assert (folder / name).read_bytes() == body, name
    assert not (folder / ".partial").exists()
