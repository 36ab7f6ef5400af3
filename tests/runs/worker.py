"""Real runs of one and two ranks that the tests beside this file look at.

    python -m tests.runs.worker KIND FOLDER SHARD...

makes the runs of a kind, and writes what came of them to FOLDER.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from tests.faults.bed import Bed
from tests.faults.decode_server import serve
from tests.runs.compared import (
    adapters,
    all_adapters,
    imports,
    large_minute,
    matrix,
    minute,
    moved_plugs,
    plugs,
    side_tables,
    whole_matrix,
)
from tests.runs.degrees import degrees, degrees_of_four, failing_part
from tests.runs.disturbances import launchers, long_history, other_plan, suspended
from tests.runs.evaluations import evaluations, looks, refusals
from tests.runs.interruptions import debugs, full_disk, kills, mirrored, moves
from tests.runs.late_rank import late_rank

KINDS: dict[str, Callable[[Bed], object]] = {
    "matrix": matrix, "whole matrix": whole_matrix, "kills": kills, "moves": moves, "mirrored": mirrored,
    "debugs": debugs, "plugs": plugs, "moved plugs": moved_plugs, "adapters": adapters, "all adapters": all_adapters,
    "minute": minute, "large minute": large_minute, "imports": imports, "side tables": side_tables,
    "full disk": full_disk, "suspended": suspended, "long history": long_history, "other plan": other_plan,
    "launchers": launchers, "degrees": degrees, "degrees of four": degrees_of_four,
    "failing part": failing_part, "late rank": late_rank,
    "looks": looks, "evaluations": evaluations, "refusals": refusals,
}  # fmt: skip
DISTURBED = ("suspended", "launchers", "long history", "other plan")


def main() -> None:
    """Make the runs; their decode processes are forked too, except where the runs are disturbed as a whole."""
    kind, folder, *shards = sys.argv[1:]
    server = None if kind in DISTURBED else serve()
    try:
        made = KINDS[kind](Bed(Path(folder), steps=20, shards=shards))
    finally:
        if server is not None:
            server.kill()
            server.wait()
    Path(folder).with_suffix(".json").write_text(json.dumps(made))


if __name__ == "__main__":
    main()
