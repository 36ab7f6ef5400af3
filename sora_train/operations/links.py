"""Checks between machines: versions and variables, bandwidth of each pair and of an all-reduce, and clock skew."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from sora_train.core.world import World
from sora_train.operations.checks import FAILURE, OK, WARNING, Finding
from sora_train.operations.preflight import differences, surroundings

_BYTES = 16 << 20
_SLOW = 0.5  # share of the median speed below which a pair is slow
_SKEW_S = 0.5  # clock skew from which a warning is given, seconds


def rounds(count: int) -> Iterator[list[tuple[int, int]]]:
    """Yield all pairs of `count` members once, in rounds of disjoint pairs (circle method of round-robin schedules)."""
    places: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    for _ in range(len(places) - 1):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None]
        places = [places[0], places[-1], *places[1:-1]]


def between(world: World, device: torch.device) -> list[Finding]:
    """Run all checks between ranks. Collective; every rank gets the same findings."""
    hosts: list[str] = [""] * world.size
    dist.all_gather_object(hosts, socket.gethostname())
    nodes = list(range(0, world.size, world.local_size))
    speakers = nodes if len(nodes) > 1 else list(range(world.size))  # on a single machine, test pairs of its ranks
    names = [f"{hosts[r]} (rank {r})" for r in speakers]
    speeds = _pairs(speakers, world.rank, device)
    return [*_alike(world), *judge(speeds, names), _together(world, device), _clocks(speakers, hosts, world)]


def _alike(world: World) -> list[Finding]:
    """Find what training would refuse: a rank whose versions, code or variables differ from those of most ranks."""
    everyone: list[dict[str, str]] = [{}] * world.size
    dist.all_gather_object(everyone, surroundings())
    odd = [Finding("agreement", FAILURE, line) for line in differences(everyone)]
    return odd or [Finding("agreement", OK, f"{world.size} ranks have the same versions, code and variables")]


def judge(speeds: dict[tuple[int, int], float], names: Sequence[str]) -> list[Finding]:
    """Evaluate pair speeds in byte/s: report slow pairs, and the machine that is in most of them."""
    middle = statistics.median(speeds.values())
    slow = sorted((speed, pair) for pair, speed in speeds.items() if speed < _SLOW * middle)
    found = [Finding("pairs", OK, f"{len(speeds)} pair(s), median {middle / 1e9:.2f} GB/s each way", middle / 1e9)]
    for speed, (a, b) in slow:
        text = f"{names[a]} and {names[b]}: {speed / 1e9:.2f} GB/s, below half of the median"
        found.append(Finding("slow pair", WARNING, text, speed / 1e9))
    if len(slow) > 1:
        often = [sum(n in pair for _, pair in slow) for n in range(len(names))]
        worst = max(range(len(names)), key=lambda n: often[n])
        text = f"{names[worst]} is in {often[worst]} of {len(slow)} slow pairs; take it out first"
        found.append(Finding("slow machine", FAILURE, text, often[worst]))
    return found


def _pairs(speakers: list[int], rank: int, device: torch.device) -> dict[tuple[int, int], float]:
    """Measure each pair's speed in byte/s and direction, both sending at once; by indices into `speakers`."""
    out = torch.ones(_BYTES // 4, device=device)
    into = torch.empty_like(out)
    mine: dict[tuple[int, int], float] = {}
    for pairs in rounds(len(speakers)):
        dist.barrier()
        for a, b in pairs:
            if rank not in (speakers[a], speakers[b]):
                continue
            other = speakers[b] if rank == speakers[a] else speakers[a]
            best = float("inf")
            for _ in range(3):
                start = time.monotonic()
                exchange = [dist.P2POp(dist.isend, out, other), dist.P2POp(dist.irecv, into, other)]
                for work in dist.batch_isend_irecv(exchange):
                    work.wait()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                best = min(best, time.monotonic() - start)
            mine[a, b] = _BYTES / best
    everyone: list[dict[tuple[int, int], float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    merged: dict[tuple[int, int], float] = {}
    for part in everyone:
        for pair, speed in part.items():
            merged[pair] = min(speed, merged.get(pair, speed))
    return merged


def _together(world: World, device: torch.device) -> Finding:
    """Measure the bus bandwidth of an all-reduce over all n ranks: 2 (n - 1) / n of its bytes / time."""
    values = torch.empty(_BYTES // 4, device=device)
    best, right = float("inf"), True
    for _ in range(3):
        values.fill_(1.0)  # reset, or repeated sums would soon exceed the integers that fp32 represents
        dist.barrier()
        start = time.monotonic()
        dist.all_reduce(values)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.monotonic() - start)
        right = right and bool((values == world.size).all())
    slowest = torch.tensor([best], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    speed = 2 * (world.size - 1) / world.size * _BYTES / slowest.item() / 1e9
    text = f"{world.size} ranks, {speed:.2f} GB/s on the bus" + ("" if right else "; the sums are wrong")
    return Finding("all-reduce", OK if right else FAILURE, text, speed)


def _clocks(speakers: list[int], hosts: list[str], world: World) -> Finding:
    """Measure the clock skew after a barrier. An upper bound, as ranks don't leave the barrier at the same time."""
    least = float("inf")
    place = (0, 0)
    for _ in range(3):
        dist.barrier()
        now = torch.zeros(world.size, dtype=torch.float64)
        now[world.rank] = time.time()
        dist.all_reduce(now)
        times = now[speakers]
        spread = float(times.max() - times.min())
        if spread < least:
            least, place = spread, (speakers[int(times.argmin())], speakers[int(times.argmax())])
    text = f"at most {least:.3f} s apart ({hosts[place[0]]} behind {hosts[place[1]]})"
    return Finding("clocks", OK if least < _SKEW_S else WARNING, text, least)
