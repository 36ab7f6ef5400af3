"""A process beside a rank that ends it when it no longer answers, also where a thread holds the GIL for ever.

    python monitor.py PID < BEATS

Each line of stdin is a sign of life, and holds the seconds until the next one is due. When it is overdue, the rank is
told to write the stacks of its threads (SIGUSR2, see `Watch`), and killed. Time in which the rank or this process was
stopped (by a Slurm suspension, `docker pause`, Ctrl-Z) doesn't count. Needs nothing but Python, and ends with the rank.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from pathlib import Path

_TICK = 0.25  # seconds between looks
_WRITING = 1.0  # seconds that the rank has to write its stacks


def is_stopped(pid: int) -> bool:
    """Tell whether a process is stopped (state T or t of /proc/PID/stat)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except (OSError, IndexError):
        return False


def main() -> None:
    """Watch the process of the command line until stdin is closed."""
    pid, limit, waited = int(sys.argv[1]), float("inf"), 0.0
    while waited <= limit:
        if os.getppid() != pid:  # it is gone, though a child of it may keep stdin open
            return
        before = time.monotonic()
        if select.select([0], [], [], _TICK)[0]:
            beats = os.read(0, 1 << 16)
            if not beats:
                return
            limit, waited = float(beats.split()[-1]), 0.0
        elif not is_stopped(pid):
            waited += min(time.monotonic() - before, 2 * _TICK)  # more: this process was stopped itself
    os.kill(pid, signal.SIGUSR2)
    time.sleep(_WRITING)
    os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
