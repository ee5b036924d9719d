"""Where weights come from: a lock that names them exactly, a download that resumes after interruption, verification.

In call order: location → inspection (→ ledger, digest) → download → hub (→ address) or local_folder, each a
`source`. `lock` is the lock file's format.
"""

from starling.weights.download import pull
from starling.weights.inspection import FileReport, State, faults, inspect, verify
from starling.weights.location import LOCK_PATH, Located, locate, locate_weights
from starling.weights.lock import Lock, LockedFile
from starling.weights.source import RetryPolicy

__all__ = [
    "LOCK_PATH",
    "FileReport",
    "Located",
    "Lock",
    "LockedFile",
    "RetryPolicy",
    "State",
    "faults",
    "inspect",
    "locate",
    "locate_weights",
    "pull",
    "verify",
]
