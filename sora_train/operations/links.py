"""Between machines: versions and variables, bandwidth of every pair and of all together, how far clocks are apart."""

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
_SLOW = 0.5  # of the median of all pairs
_SKEW_S = 0.5


def rounds(count: int) -> Iterator[list[tuple[int, int]]]:
    """Every pair of `count` once, in rounds in which nobody is in two pairs (the circle method of tournaments)."""
    places: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    for _ in range(len(places) - 1):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None]
        places = [places[0], places[-1], *places[1:-1]]


def between(world: World, device: torch.device) -> list[Finding]:
    """All checks between ranks; every rank calls it, and every rank gets the same findings."""
    hosts: list[str] = [""] * world.size
    dist.all_gather_object(hosts, socket.gethostname())
    nodes = list(range(0, world.size, world.local_size))
    speakers = nodes if len(nodes) > 1 else list(range(world.size))  # on one machine: its ranks
    names = [f"{hosts[r]} (rank {r})" for r in speakers]
    speeds = _pairs(speakers, world.rank, device)
    return [*_alike(world), *judge(speeds, names), _together(world, device), _clocks(speakers, hosts, world)]


def _alike(world: World) -> list[Finding]:
    """Find what training would refuse: a rank with other versions, other code or other variables than most."""
    everyone: list[dict[str, str]] = [{}] * world.size
    dist.all_gather_object(everyone, surroundings())
    odd = [Finding("agreement", FAILURE, line) for line in differences(everyone)]
    return odd or [Finding("agreement", OK, f"{world.size} ranks have the same versions, code and variables")]


def judge(speeds: dict[tuple[int, int], float], names: Sequence[str]) -> list[Finding]:
    """Findings on pair speeds in byte/s: slow pairs by name, and who is in most of them."""
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
    """Byte/s each way while both of a pair send to each other, by place in `speakers`."""
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
    """Bus bandwidth of an all-reduce over all ranks: 2 (n - 1) / n of the bytes in the time it takes."""
    values = torch.empty(_BYTES // 4, device=device)
    best, right = float("inf"), True
    for _ in range(3):
        values.fill_(1.0)  # anew each time: a power of the ranks would soon be more than fp32 can count
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
    """Spread of the clocks right after a barrier; the barrier's own spread counts as skew, so it is an upper bound."""
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
