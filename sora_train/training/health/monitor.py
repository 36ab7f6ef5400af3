"""Monitor process of a rank: kills the rank when its heartbeats stop, even if a thread never releases the GIL.

    python monitor.py PID < BEATS

Each line of stdin is a heartbeat: the number of seconds until the next one is due. If a heartbeat is overdue, the
monitor makes the rank write the stacks of its threads (SIGUSR2, see `Watch`), and kills it. Time in which the rank or
this process was stopped (by a Slurm suspension, `docker pause`, Ctrl-Z) doesn't count. The script uses only Python's
standard library, and exits when the rank has exited.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from pathlib import Path

_TICK = 0.25  # seconds between checks
_WRITING = 1.0  # seconds that the rank has to write its stacks


def is_stopped(pid: int) -> bool:
    """Tell whether a process is stopped (state T or t of /proc/PID/stat)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except (OSError, IndexError):
        return False


def main() -> None:
    """Watch the process whose PID is the first argument, until stdin is closed."""
    pid, limit, waited = int(sys.argv[1]), float("inf"), 0.0
    while waited <= limit:
        if os.getppid() != pid:  # the rank has exited; a child of it may keep stdin open
            return
        before = time.monotonic()
        if select.select([0], [], [], _TICK)[0]:
            beats = os.read(0, 1 << 16)
            if not beats:
                return
            limit, waited = float(beats.split()[-1]), 0.0
        elif not is_stopped(pid):
            waited += min(time.monotonic() - before, 2 * _TICK)  # a longer wait means that this process was stopped
    os.kill(pid, signal.SIGUSR2)
    time.sleep(_WRITING)
    os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
