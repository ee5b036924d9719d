"""`python -m starling weights pull|verify|status|pin`."""

import argparse
import os
from contextlib import suppress
from pathlib import Path

from starling.errors import PYTHON
from starling.weights.download import pull
from starling.weights.inspection import FileReport, State, inspect, verify
from starling.weights.location import LOCK_PATH
from starling.weights.lock import Lock
from starling.weights.source import RetryPolicy


def add_weights_command(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `weights` to the command line; `args.run(args)` returns the exit code."""
    weights = subparsers.add_parser("weights", help="fetch and verify the model's weights")
    actions = weights.add_subparsers(dest="action", required=True, metavar="pull|verify|status|pin")
    for name, text in (
        ("pull", "download what is missing or wrong; resumes where an earlier pull stopped"),
        ("verify", "hash every file and compare it with the lock"),
        ("status", "show what is known about every file, without hashing"),
        ("pin", "add sizes and digests that the lock does not have yet, for review"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("--lock", type=Path, default=LOCK_PATH, help="the lock (default: %(default)s)")
        action.add_argument("--folder", type=Path, help="where the weights are kept (default: beside the lock)")
        if name == "pull":
            action.add_argument(
                "--from",
                dest="source",
                metavar="URL|FOLDER",
                help="a mirror of the hub, or a folder that holds the files (default: the hub, or HF_ENDPOINT)",
            )
            action.add_argument(
                "--timeout",
                type=_seconds,
                default=RetryPolicy().stall_s,
                metavar="SECONDS",
                help="drop a silent connection after this long; five in a row end the pull (default: %(default)g)",
            )
            action.set_defaults(stopped_note="What has arrived is kept; the next pull resumes from there.")
    weights.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0: success. 1: files are missing or wrong, as printed. Raises WeightsError and OSError."""
    lock = Lock.read(args.lock)
    folder = args.folder or args.lock.with_suffix("")
    return {"pull": _pull, "verify": _verify, "status": _status, "pin": _pin}[args.action](args, lock, folder)


def _pull(args: argparse.Namespace, lock: Lock, folder: Path) -> int:
    print(f"{lock.repository} at {lock.revision}\nLicence: {lock.licence}", flush=True)
    reports = pull(lock, folder, args.source, RetryPolicy(stall_s=args.timeout))
    _show(lock, folder, reports)
    return 0


def _verify(args: argparse.Namespace, lock: Lock, folder: Path) -> int:
    return _show(lock, folder, verify(folder, lock, afresh=True))


def _status(args: argparse.Namespace, lock: Lock, folder: Path) -> int:
    return _show(lock, folder, inspect(folder, lock))


def _show(lock: Lock, folder: Path, reports: list[FileReport]) -> int:
    """Print every file's state, and what to do about it. Returns 1 if something is missing or wrong."""
    print(f"In {folder}:")
    for report in reports:
        print(f"  {report}")
    if any(report.is_fault for report in reports):
        print(f"\nNot usable yet: `{PYTHON} -m starling weights pull` fetches what is missing or wrong.")
        return 1
    if found := [report for report in reports if report.first_use]:
        print("\nThe lock has no digest for these; they were trusted on first use. Compare them with another source,")
        print(f"then commit them: `{PYTHON} -m starling weights pin` writes them into the lock.")
        for report in found:
            print(f"  {report.sha256}  {report.name}")
    if any(report.state is State.UNCHECKED for report in reports):
        print(f"\nSizes are right; `{PYTHON} -m starling weights verify` computes the digests.")
    return 0


def _pin(args: argparse.Namespace, lock: Lock, folder: Path) -> int:
    reports = verify(folder, lock)
    if any(report.is_fault for report in reports):
        return _show(lock, folder, reports)
    found = {r.name: ((folder / r.name).stat().st_size, r.sha256) for r in reports if r.sha256 is not None}
    filled = lock.filled(found)
    if filled == lock:
        print(f"{args.lock} already has every size and digest.")
        return 0
    temporary = args.lock.with_name(f"{args.lock.name}.{os.getpid()}")
    temporary.write_text(filled.to_json(), encoding="utf-8")
    temporary.replace(args.lock)
    for before, after in zip(lock.files, filled.files, strict=True):
        if before != after:
            print(f"  {after.name}: {after.size} bytes, sha256 {after.sha256}")
    print(f"Updated {args.lock}; what it had before is unchanged. Review the difference and commit it.")
    return 0


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 < (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a valid timeout; give seconds above 0")
