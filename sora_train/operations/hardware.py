"""What devices can do, and how long a traced pass takes on one: every figure is stated here, so that it can be doubted.

A pass takes, for each operation, the longer of its arithmetic and its memory traffic (the roofline of Williams et al.
2009, doi 10.1145/1498765.1498785) plus a fixed cost per operation. Peaks, memory and bandwidth are from the makers'
data sheets. What is reached of them, and the prices, are assumptions; `hardware=cpu` measures this machine instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from sora_train.cli import InputError, nearest
from sora_train.operations.trace import Operation
from sora_train.training.meter import PEAK_TFLOPS

_REACHED = {"matmul": 0.6, "attention": 0.4, "convolution": 0.4}  # of the peak, eager bf16 kernels
_MEMORY_REACHED = 0.75


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

    def seconds(self, operations: tuple[Operation, ...]) -> float:
        """How long a traced pass takes."""
        return sum(self.overhead_s + max(self._arithmetic(o), o.bytes / self.bandwidth) for o in operations)

    def _arithmetic(self, operation: Operation) -> float:
        if not operation.flops:
            return 0.0
        slowdown = self.fp32_slowdown.get(operation.kind, 1.0) if operation.fp32 else 1.0
        return operation.flops / self.rates[operation.kind] * slowdown


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
    finally:
        torch.set_num_threads(before)
    return Hardware("one CPU core", 4.0, rates["matmul"], rates, slowdown, bandwidth, 3 * overhead, 1e9, 1e9, 0.02)


def _cpu_seconds(act: Callable[[], object], times: int = 5) -> float:
    """The least of a few CPU times of `act`, after one that isn't counted."""
    act()
    best = float("inf")
    for _ in range(7):
        start = time.process_time()
        for _ in range(times):
            act()
        best = min(best, (time.process_time() - start) / times)
    return best
