"""How every command ends: its exit code, and what it prints after an error or Ctrl-C."""

import signal
import sys
from collections.abc import Callable

from starling.errors import StarlingError


def exit_code(run: Callable[[], int], stopped_note: str = "") -> int:
    """The command's own; 1 after an error, which is printed; 130 on Ctrl-C, with `stopped_note`: how to continue."""
    try:
        return run()
    except (StarlingError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nStopped. {stopped_note}".rstrip(), file=sys.stderr)
        return 128 + signal.SIGINT
