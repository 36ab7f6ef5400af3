"""Start of a benchmark's ranks on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_ranks(module: str, argument: str, ranks: int) -> None:
    """Run a module as `ranks` processes of one group, with one thread each, until all have ended.

    Args:
        module: Name of the module; it reads rank and meeting point from the environment.
        argument: Its only argument.
        ranks: Number of processes.

    Raises:
        RuntimeError: One ended with another code than 0.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}  # fmt: skip
    command, root = [sys.executable, "-m", module, argument], Path(__file__).parents[1]
    started = [
        subprocess.Popen(command, env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=root)
        for rank in range(ranks)
    ]
    try:
        codes = [process.wait() for process in started]
    finally:
        for process in started:
            process.kill()
    if any(codes):
        raise RuntimeError(f"the ranks of {module} ended with {codes}")
