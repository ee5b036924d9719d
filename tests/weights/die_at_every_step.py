"""Run as a program: pull in a child that kills itself with SIGKILL before its n-th file operation, for every n.

After every death no wrong content may have a file's final name, and a second pull must finish the work.
Arguments: the lock, a folder to work in, where to pull from, a folder with the right files.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from starling.errors import WeightsError
from starling.weights import Lock, RetryPolicy, inspect, locate, pull

# Audit events, which CPython raises before the system call: https://docs.python.org/3/library/audit_events.html
TOUCHES = {"open", "os.mkdir", "os.rename", "os.utime", "os.truncate", "os.remove", "os.rmdir", "fcntl.flock"}
RETRY = RetryPolicy(stall_s=5, attempts=2, first_wait_s=0.01)


def pull_until(step: int, lock: Lock, folder: Path, where: str) -> bool:
    """Pull in a child that dies before touch number `step`. Returns whether it got that far."""
    child = os.fork()
    if child == 0:
        touched = 0

        def die(event: str, args: tuple[Any, ...]) -> None:
            nonlocal touched
            # flock gets a descriptor, the others a path; what the libraries open elsewhere does not count.
            if event in TOUCHES and (event == "fcntl.flock" or str(folder) in str(args[0])):
                touched += 1
                if touched == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(die)
        pull(lock, folder, where, RETRY)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        return True
    assert os.WEXITSTATUS(status) == 0, status
    return False


def check(lock_path: Path, folder: Path, right: dict[str, bytes]) -> None:
    """Nothing half-written has a file's final name, and setup accepts the folder only if it is complete."""
    present = {path.name: path.read_bytes() for path in folder.glob("*") if path.suffix in {".json", ".safetensors"}}
    present.pop(".verified.json", None)
    for name, body in present.items():
        assert body == right[name], f"{name} is damaged"
    faulty = {report.name for report in inspect(folder, Lock.read(lock_path)) if report.is_fault}
    assert faulty == right.keys() - present.keys()
    try:
        locate(lock_path=lock_path, folder=folder)
    except WeightsError:
        assert faulty
    else:
        assert present == right


def main() -> None:
    lock_path, base, where, source = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    lock = Lock.read(lock_path)
    right = {file.name: (source / file.name).read_bytes() for file in lock.files}
    step = 1
    while pull_until(step, lock, base / f"step{step}", where):
        folder = base / f"step{step}"
        check(lock_path, folder, right)
        pull(lock, folder, where, RETRY)
        check(lock_path, folder, right)
        left = {path.name for path in folder.iterdir()} - right.keys()
        assert left == {".verified.json", ".pull.lock"}, left
        step += 1
    print(f"died {step - 1} times")


if __name__ == "__main__":
    main()
