"""Where weights come from: a lock that names them exactly, a download that can be stopped anywhere, verification.

In call order: locate → verify (→ ledger, digest) → pull → source (hub, local_folder) → progress. `lock` is the form.
"""

from starling.weights.locate import LOCK_PATH, Located, locate
from starling.weights.lock import Lock, LockedFile
from starling.weights.pull import pull
from starling.weights.source import Patience
from starling.weights.verify import FileReport, State, faults, inspect, verify

__all__ = [
    "LOCK_PATH",
    "FileReport",
    "Located",
    "Lock",
    "LockedFile",
    "Patience",
    "State",
    "faults",
    "inspect",
    "locate",
    "pull",
    "verify",
]
