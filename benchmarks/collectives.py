"""The alpha-beta model of gloo's collectives, fitted to two and three ranks and held against four.

    python -m benchmarks.collectives [rounds=7]

Ranks are threads of one process that meet over TCP, and the times are CPU seconds of a rank, which other processes
don't disturb. `python -m sora_train.plan scale=true` uses the same formulas.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from benchmarks.report import write
from sora_train.core.cli import run as run_command
from sora_train.core.options import number, options
from sora_train.forecast.scale import AlphaBeta, fit

SIZES = (1 << 10, 1 << 17, 1 << 20, 1 << 22, 1 << 24)  # bytes
Group = dist.ProcessGroupGloo
Act = Callable[[Group, torch.Tensor, torch.Tensor], None]


@dataclass
class Options:
    """The number of measurements of each; the median counts."""

    rounds: int = number(7, least=1)


def all_reduce(group: Group, whole: torch.Tensor, part: torch.Tensor) -> None:
    """Sum the whole tensor."""
    group.allreduce([whole]).wait()  # type: ignore[attr-defined]


def all_gather(group: Group, whole: torch.Tensor, part: torch.Tensor) -> None:
    """Gather the whole tensor from equal parts."""
    group._allgather_base(whole, part).wait()  # type: ignore[attr-defined]


KINDS: dict[str, tuple[Act, int]] = {"all-reduce": (all_reduce, 2), "all-gather": (all_gather, 1)}


def measure(act: Act, ranks: int, rounds: int) -> Iterator[tuple[int, float, float]]:
    """Ranks, bytes and CPU seconds of a rank, for every size."""
    store = dist.HashStore()
    groups: dict[int, Group] = {}

    def together(one: Callable[[int], None]) -> float:
        start = time.process_time()
        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.process_time() - start

    def meet(rank: int) -> None:
        groups[rank] = Group(store, rank, ranks, timedelta(seconds=300))

    together(meet)
    for nbytes in SIZES:
        repeats = max(1, min(50, (1 << 22) // nbytes))
        parts = [torch.zeros(nbytes // 4 // ranks) for _ in range(ranks)]
        wholes = [torch.zeros(len(parts[0]) * ranks) for _ in range(ranks)]

        several = partial(_several, act, groups, wholes, parts, repeats)
        taken = [together(several) / ranks / repeats for _ in range(rounds + 1)][1:]
        yield ranks, nbytes, statistics.median(taken)


def _several(
    act: Act, groups: dict[int, Group], wholes: list[torch.Tensor], parts: list[torch.Tensor], times: int, rank: int
) -> None:
    for _ in range(times):
        act(groups[rank], wholes[rank], parts[rank])


def rows(kind: str, rounds: int) -> tuple[AlphaBeta, list[tuple[str, ...]]]:
    """The fit of a kind, and what it says of four ranks beside what they took."""
    act, times = KINDS[kind]
    found = fit([one for ranks in (2, 3) for one in measure(act, ranks, rounds)], times)
    table = []
    for ranks, nbytes, seconds in measure(act, 4, rounds):
        said = found.all_reduce(nbytes, ranks) if times == 2 else found.gather(nbytes, ranks)
        table.append(
            (
                kind,
                f"{nbytes / 1024:,.0f} KiB",
                f"{seconds * 1e3:.3f}",
                f"{said * 1e3:.3f}",
                f"{said / seconds - 1:+.0%}",
            )
        )
    return found, table


def main() -> int:
    """Measure, print, and write the table to docs/results.md."""
    o = options(Options, __doc__)
    torch.set_num_threads(1)
    fits, table = {}, []
    for kind in KINDS:
        fits[kind], more = rows(kind, o.rounds)
        table += more
    told = "; ".join(
        f"{kind} {f.call * 1e6:.0f} us, {f.alpha * 1e6:.0f} us a message, {f.beta * 1e9:.2f} ns a byte"
        for kind, f in fits.items()
    )
    header = ("collective", "size", "four ranks, CPU ms of a rank", "forecast", "error")
    write("Collectives: alpha-beta model against four ranks", f"Fitted to two and three ranks: {told}.", header, table)
    return 0


if __name__ == "__main__":
    run_command(main)
