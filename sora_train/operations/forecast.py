"""A configuration on stated hardware: every ZeRO stage beside the others, what fits, and what to set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from sora_train.config import Config, Method
from sora_train.operations.footprint import Memory, memory, stage_of
from sora_train.operations.hardware import Hardware
from sora_train.operations.planner import Estimate
from sora_train.operations.timing import SaveAdvice, StepTime, save_advice, step_time
from sora_train.operations.trace import Size, Untrained, trace
from sora_train.training.console import duration

# What recomputes more than each value of model.activation_checkpointing.
_MORE: dict[Any, tuple[Any, ...]] = {False: (True,), "none": ("selective", "block"), "selective": ("block",)}
_USABLE = 0.9  # share of a device's memory; the rest is for the driver, kernels' scratch and fragmentation


@dataclass(frozen=True)
class StageForecast:
    """One ZeRO stage."""

    memory: Memory
    time: StepTime
    fits: bool


@dataclass(frozen=True)
class Forecast:
    """Everything `plan` prints."""

    figures: Estimate
    device: Hardware
    stages: Mapping[int, StageForecast]  # as configured
    recomputing: Mapping[str, Mapping[int, StageForecast]]  # by override: what could be recomputed beside
    save: SaveAdvice


def forecast(
    config: Config, figures: Estimate, sizes: list[Size], share: float, device: Hardware, per_node: int, disk: float,
    hours_per_failure: float, untrained: Untrained,
) -> Forecast:  # fmt: skip
    """Trace the heaviest pass and lay it out over the stages."""
    stages = _stages(config, figures, sizes, share, device, per_node, untrained)
    recomputing = {}
    for choice in _MORE.get(config.model.activation_checkpointing, ()) if config.method is Method.diffusion else ():
        other = replace(config, model=replace(config.model, activation_checkpointing=choice))
        name = f"model.activation_checkpointing={str(choice).lower()}"
        recomputing[name] = _stages(other, figures, sizes, share, device, per_node, untrained)
    save = save_advice(figures.parameters, figures.ranks, disk, hours_per_failure)
    return Forecast(figures, device, stages, recomputing, save)


def _stages(
    config: Config, figures: Estimate, sizes: list[Size], share: float, device: Hardware, per_node: int,
    untrained: Untrained,
) -> dict[int, StageForecast]:  # fmt: skip
    traced = trace(config, sizes, untrained)
    count, ranks, passes = figures.parameters, figures.ranks, figures.passes
    found = {}
    for stage in range(3 if config.method is Method.autoencoder else 4):
        needs = memory(config, count, traced, ranks, passes, stage)
        time = step_time(config, count, traced, ranks, passes, stage, device, per_node, share)
        found[stage] = StageForecast(needs, time, needs.peak <= _USABLE * device.memory_gib * 2**30)
    return found


def suggestion(config: Config, result: Forecast) -> str:
    """Which setting to take: the fastest that fits, the configured one where it is as good."""
    options = {f"deepspeed=zero{stage}": s for stage, s in result.stages.items()}
    for override, stages in result.recomputing.items():
        options |= {f"deepspeed=zero{stage} {override}": s for stage, s in stages.items()}
    fitting = {name: s.time.total for name, s in options.items() if s.fits}
    if not fitting:
        least = min(s.memory.peak for s in options.values()) / 2**30
        return (
            f"nothing fits {result.device.name}, {result.device.memory_gib:.0f} GiB (the least is {least:.1f} GiB); "
            "take more ranks, a lower data.max_tokens, or a smaller model"
        )
    current = f"deepspeed=zero{stage_of(config)}"
    best = min(fitting, key=lambda name: fitting[name])
    if current in fitting and fitting[current] <= 1.02 * fitting[best]:
        return f"{current} as configured fits, and nothing that fits is faster"
    verb = "fits too, but slower" if current in fitting else "does not fit"
    return f"take {best}: it fits and is the fastest that does ({current} as configured {verb})"


def show(terminal: Console, config: Config, result: Forecast, note: str) -> None:
    """Print the tables."""
    terminal.print(_facts(config, result, note))
    terminal.print(_memory_table(config, result))
    terminal.print(_time_table(config, result))
    terminal.print(suggestion(config, result), highlight=False)


def _facts(config: Config, result: Forecast, note: str) -> Table:
    e, data, save = result.figures, config.data, result.save
    title = f"{config.method.value} on {e.ranks} rank(s) of {result.device.name}, {config.precision.value}"
    table = Table(title=title, show_header=False)
    rows = [
        ("parameters", f"{e.parameters / 1e6:.1f}M"),
        ("slots per step", f"{data.slots}, {e.passes} pass(es) per rank, {e.idle:.0%} of the places idle"),
        ("tokens per step, at most", f"{data.slots * data.max_tokens:,}"),
        ("model FLOPs per full step", f"{e.step_flops:.3g}"),
        ("model FLOPs of the run", f"{e.step_flops * config.steps:.3g}"),
        ("checkpoint", f"{save.checkpoint_bytes / 2**30:.2f} GiB; written in {save.written_s:.0f} s"),
        (
            "save every",
            f"{duration(save.interval_s)}, for a failure every {duration(save.failure_every_s)}: "
            f"{save.lost:.2%} of the time lost to saves and repeated work",
        ),
    ]
    if e.steps_per_epoch is not None and e.fill is not None and e.balance is not None and e.departure is not None:
        epochs = config.steps / max(1, e.steps_per_epoch)
        rows += [
            ("steps per epoch", f"{e.steps_per_epoch}; the run is {epochs:.2f} epochs"),
            ("token budget used", f"{e.fill:.1%}"),
            ("balance of the slots", f"{e.balance:.1%}"),
            ("a step's departure from the mix, at most", f"{e.departure:.1%} of its tokens"),
        ]
    else:
        rows.append(("data", note))
    for row in rows:
        table.add_row(*row)
    return table


def _columns(result: Forecast) -> dict[str, StageForecast]:
    both = {f"ZeRO {stage}": s for stage, s in result.stages.items()}
    for override, stages in result.recomputing.items():
        both |= {f"ZeRO {stage}, recomputing {override.partition('=')[2]}": s for stage, s in stages.items()}
    return both


def _memory_table(config: Config, result: Forecast) -> Table:
    columns = _columns(result)
    table = Table(title="memory of one rank at its peak, GiB")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    parts = {
        "weights": "weights", "gradients": "gradients", "optimizer": "optimizer", "EMA": "ema", "VAE": "encoder",
        "activations": "activations", "buckets, gathered weights": "bucket", "peak": "peak",
    }  # fmt: skip
    for label, part in parts.items():
        table.add_row(label, *(f"{getattr(s.memory, part) / 2**30:.2f}" for s in columns.values()))
    table.add_row(f"fits {result.device.memory_gib:.0f} GiB", *("yes" if s.fits else "no" for s in columns.values()))
    return table


def _time_table(config: Config, result: Forecast) -> Table:
    columns = _columns(result)
    table = Table(title="estimated time and cost; nothing is taken to overlap")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    e, device, steps = result.figures, result.device, config.steps
    hours = [s.time.total * steps / 3600 for s in columns.values()]
    mfu = [e.step_flops / s.time.total / e.ranks / device.peak for s in columns.values()]
    table.add_row("compute, s", *(f"{s.time.compute:.3g}" for s in columns.values()))
    table.add_row("update, s", *(f"{s.time.update:.3g}" for s in columns.values()))
    table.add_row("communication, s", *(f"{s.time.communication:.3g}" for s in columns.values()))
    table.add_row("step, s", *(f"{s.time.total:.3g}" for s in columns.values()))
    table.add_row("MFU", *(f"{share:.0%}" for share in mfu))
    table.add_row(f"{steps:,} steps", *(duration(h * 3600) for h in hours))
    price = device.dollars_per_hour
    table.add_row(f"at ${price:g} per rank and hour", *(f"${h * e.ranks * price:,.0f}" for h in hours))
    return table
