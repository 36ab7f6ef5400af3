"""Time on a machine that does other things too: limits hold for CPU seconds, or give way to what is waiting."""

from __future__ import annotations

import os
import resource


def cpu_s() -> float:
    """CPU seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def slack_s() -> float:
    """Seconds to add to a limit of wall time: ten for each process that waits for a core, none on a quiet machine."""
    return 10.0 * max(0.0, os.getloadavg()[0] - len(os.sched_getaffinity(0)))
