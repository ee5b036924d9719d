"""The start-up report."""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
TICK_S = 0.01  # the resolution at which the kernel records a process's start


def test_a_process_s_start_time_is_when_it_was_spawned() -> None:
    code = "from starling.startup import process_began_s; print(process_began_s())"
    before_s = time.time()
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        after_s = time.time()
        began_s = float(process.communicate()[0])
    assert before_s - 2 * TICK_S <= began_s <= after_s + 2 * TICK_S
