"""A stage whose work goes wrong in the ways that work can."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_tools.curation.stage import Drop, Item


def work(item: Item, parameters: Mapping[str, Any], folder: Path) -> Item:
    """Do what the item says, right or wrong."""
    if item["do"] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if item["do"] == "hang":
        time.sleep(1000)
    if item["do"] == "drop":
        raise Drop("a reason", "a detail")
    if item["do"] == "break":
        raise ZeroDivisionError("by zero")
    return {"done": item["do"]}
