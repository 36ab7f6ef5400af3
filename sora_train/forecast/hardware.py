"""Rates of devices, and the time of a traced pass on them. All assumed figures are in this file.

The time of an operation is the larger of its arithmetic and its memory traffic (roofline model, Williams et al. 2009,
doi 10.1145/1498765.1498785) plus a fixed overhead. Peaks, memory and bandwidth are from the makers' data sheets. The
reached shares of them and the prices are assumptions; `hardware=cpu` measures this machine instead
(`forecast/this_machine.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sora_train.core.cli import InputError, nearest
from sora_train.forecast.trace import Operation
from sora_train.training.report.meter import PEAK_TFLOPS

_REACHED = {"matmul": 0.6, "attention": 0.4, "convolution": 0.4}  # share of the peak, eager bf16 kernels
_MEMORY_REACHED = 0.75  # share of the peak memory bandwidth


@dataclass(frozen=True)
class Gloo:
    """Measured cost of gloo's collectives between CPUs."""

    reduce: float  # byte/s that a rank sends in an all-reduce
    gather_s: float  # seconds per byte that a rank sends in an all-gather, copies included
    call_s: float  # seconds of a collective with hardly any data


@dataclass(frozen=True)
class Hardware:
    """One device and its links. Rates are reached ones, not peaks."""

    name: str
    memory_gib: float
    peak: float  # FLOP/s, dense bf16
    rates: Mapping[str, float] = field(repr=False)  # FLOP/s by kind of operation, bf16
    fp32_slowdown: Mapping[str, float] = field(repr=False)  # factor on time in fp32 by kind; 1 if missing
    bandwidth: float  # byte/s of its memory
    overhead_s: float  # seconds per operation, in addition
    link: float  # byte/s between devices of one machine, per direction
    network: float  # byte/s between machines, per device
    dollars_per_hour: float  # of one device; an assumption, as prices vary widely
    gloo: Gloo | None = None  # cost of gloo, for CPUs; None for NCCL

    def seconds(self, operations: tuple[Operation, ...]) -> float:
        """Time of a traced pass in seconds."""
        return sum(self.overhead_s + self._computing(o) for o in operations)

    def _computing(self, operation: Operation) -> float:
        moving = operation.bytes / self.bandwidth
        if not operation.flops:
            return moving
        slowdown = self.fp32_slowdown.get(operation.kind, 1.0) if operation.fp32 else 1.0
        return max(operation.flops / self.rates[operation.kind] * slowdown, moving)


def _gpu(name: str, memory: float, bandwidth_tb: float, link_gb: float, network_gb: float, dollars: float) -> Hardware:
    """Build the figures of a GPU of `meter.PEAK_TFLOPS`; fp32 runs as TF32 at half the bf16 rate.

    Units: memory GiB, bandwidth TB/s, links GB/s, dollars per hour.
    """
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
    """Look up a GPU by name. Raises InputError if it is unknown."""
    if name not in GPUS:
        raise InputError(f"there is no hardware={name}; {nearest(name, ['cpu', *GPUS])}")
    return GPUS[name]
