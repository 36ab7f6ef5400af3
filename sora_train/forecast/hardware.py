"""What devices can do, and how long a traced pass takes on one: every figure is stated here, so that it can be doubted.

A pass takes, for each operation, the longer of its arithmetic and its memory traffic (the roofline of Williams et al.
2009, doi 10.1145/1498765.1498785) plus a fixed cost per operation. Peaks, memory and bandwidth are from the makers'
data sheets. What is reached of them, and the prices, are assumptions; `hardware=cpu` measures this machine instead
(`operations/this_cpu.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sora_train.core.cli import InputError, nearest
from sora_train.forecast.trace import Operation
from sora_train.training.report.meter import PEAK_TFLOPS

_REACHED = {"matmul": 0.6, "attention": 0.4, "convolution": 0.4}  # of the peak, eager bf16 kernels
_MEMORY_REACHED = 0.75


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
    """A GPU by name. Raises InputError for one that isn't here."""
    if name not in GPUS:
        raise InputError(f"there is no hardware={name}; {nearest(name, ['cpu', *GPUS])}")
    return GPUS[name]
