"""`sora_train.train` under torchrun, with a stop signal that torchrun gets when rank 0 enters a phase.

torchrun ... -m tests.faults.start '{"phase": "save", "count": 1, "number": 15, "note": FILE}' experiment=...
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from sora_train.config.hydra import run_hydra
from sora_train.core.cli import run
from sora_train.core.world import from_environment
from sora_train.train import train
from tests.faults.sabotage import signal_in


def main() -> int:
    """Command of the ranks; torchrun is their parent, and hands its signals on to all of them."""
    asked = json.loads(sys.argv.pop(1))
    if from_environment().is_main:
        note = Path(asked["note"])
        signal_in(asked["phase"], asked["count"], asked["number"], target=os.getppid(), note=note)
    return run_hydra(train)


if __name__ == "__main__":
    run(main)
