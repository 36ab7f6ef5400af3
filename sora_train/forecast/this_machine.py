"""Measured rates of one CPU core: the operations of a traced pass are replayed, in order and with their shapes.

If an operation is repeated alone, its operands are in the cache and it is measured too fast: the times of a forward and
backward pass of 80 ms add up to 55 ms. In a replay in the order of the pass, with outputs kept alive for a while, the
state of the caches is that of a run.

Times are CPU times, and medians of a few rounds; minima would be those of a machine without other load.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_unflatten

from sora_train.forecast.hardware import Gloo, Hardware
from sora_train.forecast.trace import Call, Like, Operation, Recorder

_LARGE_FLOPS, _LARGE_BYTES = 3e9, 16 << 20  # larger operations profit little from caches, and are measured alone
_TRIED_FLOPS = 3e10  # larger operations aren't run; their time is computed from the measured rate
_HELD = 32 << 20  # bytes of outputs that are kept alive: a few times a core's cache
_ROUNDS, _ROUNDS_S = 5, 10.0  # number of measured replays, and limit of their total seconds


@dataclass(frozen=True)
class ThisCpu(Hardware):
    """One core of this machine. `overhead_s` is the overhead of Python, modules and autograd per operation."""

    tried: dict[Any, float] = field(default_factory=dict, repr=False)  # measured seconds, by call and by pass

    def seconds(self, operations: tuple[Operation, ...]) -> float:
        """Time of a traced pass in seconds, measured by a replay."""
        if operations not in self.tried:
            with _one_thread():
                small = [o.call for o in operations if o.call is not None and _is_small(o)]
                large = [o for o in operations if o.call is None or not _is_small(o)]
                self.tried[operations] = _replayed(small) + sum(map(self._computing, large))
        return self.tried[operations] + len(operations) * self.overhead_s

    def _computing(self, operation: Operation) -> float:
        call = operation.call
        if call is None or not operation.flops or operation.flops > _TRIED_FLOPS:
            return super()._computing(operation)
        if call not in self.tried:
            self.tried[call] = _replayed([call])
        return self.tried[call]


def _is_small(operation: Operation) -> bool:
    return operation.flops <= _LARGE_FLOPS and operation.bytes <= _LARGE_BYTES


@torch.no_grad()
def _replayed(calls: Sequence[Call]) -> float:
    """CPU seconds of these calls in order, on constant values; tensors of equal shape share memory."""
    tensors: dict[Like, Tensor] = {}

    def real(leaf: Any) -> Any:
        if isinstance(leaf, Like):
            if leaf not in tensors:
                tensors[leaf] = torch.empty_strided(leaf.size, leaf.stride, dtype=leaf.dtype).fill_(0.01)
            return tensors[leaf]
        return torch.tensor(leaf, dtype=torch.int64) if isinstance(leaf, tuple) else leaf

    made = {}
    for call in dict.fromkeys(calls):
        args, kwargs = tree_unflatten([real(leaf) for leaf in call.leaves], call.spec)
        out = call.function(*args, **kwargs)
        made[call] = (call.function, args, kwargs, sum(x.nbytes for x in tree_leaves(out) if isinstance(x, Tensor)))
    ready = [made[call] for call in calls]

    def replay() -> None:
        held: deque[tuple[int, Any]] = deque()
        total = 0
        for function, args, kwargs, size in ready:
            held.append((size, function(*args, **kwargs)))
            total += size
            while total > _HELD:
                total -= held.popleft()[0]

    return _cpu_seconds(replay, times=1, rounds=_ROUNDS, limit_s=_ROUNDS_S)


def _added_seconds() -> float:
    """Overhead of Python, modules and autograd per operation: time of a tiny network's pass minus its operations'."""

    def taken(network: nn.Module, x: Tensor) -> None:
        for _ in range(8):
            x = x + 0.5 * network(x)
        x.sum().backward()
        network.zero_grad()

    def make() -> tuple[nn.Module, Tensor]:
        return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8)), torch.ones(4, 8)

    with FakeTensorMode(), Recorder() as recorder:
        taken(*make())
    network, x = make()
    with torch.enable_grad():
        whole = _cpu_seconds(lambda: taken(network, x), times=5)
    calls = [operation.call for operation in recorder.operations if operation.call is not None]
    return max(0.0, whole - _replayed(calls)) / len(calls)


def measure_cpu() -> ThisCpu:
    """Measure the rates of one core. Takes about two seconds."""
    with _one_thread():
        a, b = torch.randn(1024, 384), torch.randn(384, 1536)
        q = torch.randn(1, 6, 512, 64)
        video, kernel = torch.randn(1, 24, 5, 16, 16), torch.randn(48, 24, 3, 3, 3)
        x, y = torch.randn(1 << 22), torch.randn(1 << 22)  # 16 MiB: beyond the caches
        a_16, b_16 = a.bfloat16(), b.bfloat16()
        half, single = _cpu_seconds(lambda: a_16 @ b_16), _cpu_seconds(lambda: a @ b)
        rates = {
            "matmul": 2 * 1024 * 384 * 1536 / half,
            "attention": 4 * q.numel() * 512 / _cpu_seconds(lambda: F.scaled_dot_product_attention(q, q, q)),
            "convolution": 2 * 27 * 24 * 48 * 5 * 256 / _cpu_seconds(lambda: F.conv3d(video, kernel, padding=1)),
        }
        slowdown = {"matmul": single / half}
        bandwidth = 3 * x.nbytes / _cpu_seconds(lambda: x + y)
        added = _added_seconds()
        link = (4 << 21) / _gloo_seconds(_reduce, 1 << 21)  # in an all-reduce of two, a rank sends the tensor once
    gloo = Gloo(link, _gloo_seconds(_gather, 1 << 20) / (4 << 20), _gloo_seconds(_gather, 8, 200))
    network = min(link, 1e9)
    return ThisCpu("one CPU core", 4.0, rates["matmul"], rates, slowdown, bandwidth, added, link, network, 0.02, gloo)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _reduce(group: dist.ProcessGroupGloo, values: Tensor) -> None:
    group.allreduce([values]).wait()  # type: ignore[attr-defined]


def _gather(group: dist.ProcessGroupGloo, values: Tensor) -> None:
    group._allgather_base(torch.empty(2 * len(values)), values).wait()  # type: ignore[attr-defined]


def _gloo_seconds(act: Callable[[dist.ProcessGroupGloo, Tensor], None], numel: int, times: int = 6) -> float:
    """CPU seconds of a rank for a collective of `numel` fp32 elements, between two ranks in this process."""
    store = dist.HashStore()

    def rank(number: int) -> None:
        group = dist.ProcessGroupGloo(store, number, 2, timedelta(seconds=60))
        values = torch.zeros(numel)
        for _ in range(times):
            act(group, values)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    start = time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return (time.process_time() - start) / 2 / times


def _cpu_seconds(act: Callable[[], object], times: int = 5, rounds: int = 7, limit_s: float = 1.0) -> float:
    """Median CPU seconds of `act` after one warm-up call; fewer calls if they would exceed `limit_s`."""
    start = time.process_time()
    act()
    times = max(1, min(times, int(limit_s / rounds / max(time.process_time() - start, 1e-9))))
    taken: list[float] = []
    while len(taken) < rounds and (not taken or sum(taken) * times < limit_s):
        start = time.process_time()
        for _ in range(times):
            act()
        taken.append((time.process_time() - start) / times)
    return statistics.median(taken)
