"""Check that this machine, or all machines of a job, are ready for a run.

    python -m sora_train.doctor [shards=[my/*.tar]] [run_dir=runs/x] [json=report.json]
    torchrun --nnodes 4 ... -m sora_train.doctor ...      the same on every machine, and the links between them

    shards     read a part of them
    run_dir    whether checkpoints can be written there (runs)
    json       also write the findings to this file: by machine, and "between ranks"

Exit code: 0 no check fails (there may be warnings), 1 a check fails (the same on every rank), 2 wrong options.
"""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sora_train.core.cli import InputError, run
from sora_train.core.options import options
from sora_train.core.world import World, from_environment


@dataclass
class Options:
    """Options of the command."""

    shards: list[str] = field(default_factory=list)
    run_dir: str = "runs"
    json: str = ""


def main() -> int:
    """Run the checks and report them; returns the exit code."""
    wanted = options(Options, __doc__)
    if wanted.json and not Path(wanted.json).absolute().parent.is_dir():
        raise InputError(f"json={wanted.json}: there is no folder {Path(wanted.json).absolute().parent}; make it first")
    world = from_environment()
    from sora_train.operations.checks import FAILURE, machine

    host = socket.gethostname()
    mine = {host: [f.as_dict() for f in machine(wanted.shards, wanted.run_dir)]} if world.local_rank == 0 else {}
    found = _everywhere(world, mine, wanted.json) if world.launched else mine
    if not world.launched:
        _report(found, wanted.json)
    return 1 if any(f["status"] == FAILURE for findings in found.values() for f in findings) else 0


def _everywhere(world: World, mine: dict[str, Any], path: str) -> dict[str, Any]:
    """Gather the findings of all machines, run the checks between them, and report before any rank exits.

    As soon as a rank exits with 1, torchrun kills the others, even the main rank while it still writes its report.
    """
    import torch.distributed as dist

    from sora_train.operations.links import between
    from sora_train.training.engine.process_group import connect, disconnect

    device = connect(world)
    try:
        parts: list[dict[str, Any]] = [{}] * world.size
        dist.all_gather_object(parts, mine)
        found: dict[str, Any] = {}
        for rank, part in enumerate(parts):
            for host, findings in part.items():
                found[host if host not in found else f"{host}, rank {rank}"] = findings
        if world.size > 1:
            found["between ranks"] = [f.as_dict() for f in between(world, device)]
        if world.is_main:
            _report(found, path)
        dist.barrier()
        return found
    finally:
        disconnect()


def _report(found: dict[str, Any], path: str) -> None:
    """Print the findings as tables, and the failures below them, since tables of many machines are long."""
    _show(found)
    for host, findings in found.items():
        for finding in findings:
            if finding["status"] == "failure":
                print(f"failure: {host}: {finding['check']}: {finding['detail']}", flush=True)
    if path:
        Path(path).write_text(json.dumps(found, indent=1) + "\n")


def _show(found: dict[str, Any]) -> None:
    colours = {"ok": "green", "warning": "yellow", "failure": "red"}
    terminal = Console()
    for host, findings in found.items():
        table = Table(title=host, show_header=False)
        for finding in findings:
            colour = colours[finding["status"]]
            table.add_row(finding["check"], f"[{colour}]{finding['status']}[/{colour}]", finding["detail"])
        terminal.print(table)
    counts = {status: sum(f["status"] == status for fs in found.values() for f in fs) for status in colours}
    terminal.print(", ".join(f"{count} {status}" for status, count in counts.items()))


if __name__ == "__main__":
    run(main)
