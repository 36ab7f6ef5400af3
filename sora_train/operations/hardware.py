"""What devices can do, and how long a traced pass takes on one: every figure is stated here, so that it can be doubted.

A pass takes, for each operation, the longer of its arithmetic and its memory traffic (the roofline of Williams et al.
2009, doi 10.1145/1498765.1498785) plus a fixed cost per operation. Peaks, memory and bandwidth are from the makers'
data sheets. What is reached of them, and the prices, are assumptions; `hardware=cpu` measures this machine instead.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._pytree import tree_unflatten

from sora_train.cli import InputError, nearest
from sora_train.operations.trace import Call, Like, Operation
from sora_train.training.meter import PEAK_TFLOPS

_REACHED = {"matmul": 0.6, "attention": 0.4, "convolution": 0.4}  # of the peak, eager bf16 kernels
_MEMORY_REACHED = 0.75
_TRIED_FLOPS = 3e10  # what takes longer is taken at the measured rate


@dataclass(frozen=True)
class Gloo:
    """Collectives between CPUs, which cost the CPU's time."""

    reduce: float  # byte/s that a rank sends in an all-reduce
    gather_s: float  # seconds for a byte that a rank sends in an all-gather, copies included
    call_s: float  # of a collective of next to nothing


@dataclass(frozen=True)
class Hardware:
    """One device and its links. Rates are what is reached, not peaks."""

    name: str
    memory_gib: float
    peak: float  # FLOP/s, dense bf16
    rates: Mapping[str, float] = field(repr=False)  # FLOP/s by kind of operation, bf16
    fp32_slowdown: Mapping[str, float] = field(repr=False)  # by kind; 1 where it isn't named
    bandwidth: float  # byte/s of its own memory
    overhead_s: float  # of one operation
    link: float  # byte/s between devices of one machine, per direction
    network: float  # byte/s between machines, per device
    dollars_per_hour: float  # one device; an assumption, prices differ by far
    gloo: Gloo | None = None  # what its ranks talk through, where it isn't NCCL

    def seconds(self, operations: tuple[Operation, ...]) -> float:
        """How long a traced pass takes."""
        return sum(self.overhead_s + self._computing(o) for o in operations)

    def _computing(self, operation: Operation) -> float:
        moving = operation.bytes / self.bandwidth
        if not operation.flops:
            return moving
        slowdown = self.fp32_slowdown.get(operation.kind, 1.0) if operation.fp32 else 1.0
        return max(operation.flops / self.rates[operation.kind] * slowdown, moving)


@dataclass(frozen=True)
class _ThisCpu(Hardware):
    """One core of this machine: what computes is tried in its own shape, because small products reach no fixed rate."""

    tried: dict[Call, float] = field(default_factory=dict, repr=False)

    def _computing(self, operation: Operation) -> float:
        call = operation.call
        if call is None or operation.flops > _TRIED_FLOPS:
            return super()._computing(operation)
        if call not in self.tried:
            before = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                self.tried[call] = _try(call)
            finally:
                torch.set_num_threads(before)
        return self.tried[call]


@torch.no_grad()
def _try(call: Call) -> float:
    """Seconds of CPU that an operation takes."""

    def real(leaf: object) -> object:
        if isinstance(leaf, Like):
            made = torch.empty_strided(leaf.size, leaf.stride, dtype=leaf.dtype)
            return made.fill_(0.01)
        return torch.tensor(leaf, dtype=torch.int64) if isinstance(leaf, tuple) else leaf

    args, kwargs = tree_unflatten([real(leaf) for leaf in call.leaves], call.spec)
    return _cpu_seconds(lambda: call.function(*args, **kwargs), times=1, rounds=4)


def _gpu(name: str, memory: float, bandwidth_tb: float, link_gb: float, network_gb: float, dollars: float) -> Hardware:
    """A GPU of `meter.PEAK_TFLOPS`. fp32 runs as TF32 at half the bf16 rate."""
    peak = PEAK_TFLOPS[name] * 1e12
    rates = {kind: share * peak for kind, share in _REACHED.items()}
    return Hardware(
        name, memory, peak, rates, dict.fromkeys(rates, 2.0), _MEMORY_REACHED * bandwidth_tb * 1e12, 5e-6,
        link_gb * 1e9, network_gb * 1e9, dollars,
    )  # fmt: skip


GPUS = {
    "a100": _gpu("A100", 80, 2.04, 250, 20, 1.8),
    "h100": _gpu("H100", 80, 3.35, 370, 40, 2.5),
    "h200": _gpu("H200", 141, 4.8, 370, 40, 3.0),
    "b200": _gpu("B200", 180, 8.0, 740, 40, 5.0),
    "l40s": _gpu("L40S", 48, 0.864, 25, 10, 1.0),
    "rtx4090": _gpu("RTX 4090", 24, 1.008, 20, 2, 0.4),
}


def hardware(name: str) -> Hardware:
    """A device by name; `cpu` measures one core of this machine, which takes about two seconds."""
    if name == "cpu":
        return measure_cpu()
    if name not in GPUS:
        raise InputError(f"there is no hardware={name}; {nearest(name, ['cpu', *GPUS])}")
    return GPUS[name]


def measure_cpu() -> Hardware:
    """What one core reaches, in CPU time, so that a busy machine measures the same as a quiet one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a, b = torch.randn(1024, 384), torch.randn(384, 1536)
        q = torch.randn(1, 6, 512, 64)
        video, kernel = torch.randn(1, 24, 5, 16, 16), torch.randn(48, 24, 3, 3, 3)
        x, y, tiny = torch.randn(1 << 22), torch.randn(1 << 22), torch.randn(8)  # 16 MiB: beyond the caches
        a_16, b_16 = a.bfloat16(), b.bfloat16()
        rates = {
            "matmul": 2 * 1024 * 384 * 1536 / _cpu_seconds(lambda: a_16 @ b_16),
            "attention": 4 * q.numel() * 512 / _cpu_seconds(lambda: F.scaled_dot_product_attention(q, q, q)),
            "convolution": 2 * 27 * 24 * 48 * 5 * 256 / _cpu_seconds(lambda: F.conv3d(video, kernel, padding=1)),
        }
        slowdown = {"matmul": _cpu_seconds(lambda: a @ b) / _cpu_seconds(lambda: a_16 @ b_16)}
        bandwidth = 3 * x.nbytes / _cpu_seconds(lambda: x + y)
        overhead = _cpu_seconds(lambda: tiny + tiny, 200)
        link = (4 << 21) / _gloo_seconds(_reduce, 1 << 21)  # it sends as much as there is
    finally:
        torch.set_num_threads(before)
    gloo = Gloo(link, _gloo_seconds(_gather, 1 << 20) / (4 << 20), _gloo_seconds(_gather, 8, 200))
    network = min(link, 1e9)
    return _ThisCpu(
        "one CPU core", 4.0, rates["matmul"], rates, slowdown, bandwidth, 3 * overhead, link, network, 0.02, gloo
    )


def _reduce(group: dist.ProcessGroupGloo, values: torch.Tensor) -> None:
    group.allreduce([values]).wait()  # type: ignore[attr-defined]


def _gather(group: dist.ProcessGroupGloo, values: torch.Tensor) -> None:
    group._allgather_base(torch.empty(2 * len(values)), values).wait()  # type: ignore[attr-defined]


def _gloo_seconds(act: Callable[[dist.ProcessGroupGloo, torch.Tensor], None], numel: int, times: int = 6) -> float:
    """Seconds of a rank's CPU for a collective of so many fp32 elements, between two ranks of this process."""
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


def _cpu_seconds(act: Callable[[], object], times: int = 5, rounds: int = 7) -> float:
    """The least of a few CPU times of `act`, after one that isn't counted."""
    act()
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(times):
            act()
        best = min(best, (time.process_time() - start) / times)
    return best
