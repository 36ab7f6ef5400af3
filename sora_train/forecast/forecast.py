"""Forecast of a configuration on given hardware: memory and time at every ZeRO stage, and a suggested setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sora_train.config.registry import METHODS
from sora_train.config.schema import Config
from sora_train.forecast.deep import deep_trace
from sora_train.forecast.estimate import Degree, Estimate, Heaviest
from sora_train.forecast.footprint import Memory, memory, stage_of
from sora_train.forecast.hardware import Hardware
from sora_train.forecast.timing import SaveAdvice, StepTime, save_advice, step_time
from sora_train.forecast.trace import trace
from sora_train.training.report.console import duration

# Settings that recompute more than each value of model.activation_checkpointing.
_MORE = {"none": ("selective", "block"), "selective": ("block",), "block": ()}
_USABLE = 0.9  # usable share of a device's memory; the rest is for the driver, kernels' scratch and fragmentation


@dataclass(frozen=True)
class StageForecast:
    """Memory and step time of one rank at a ZeRO stage."""

    memory: Memory
    time: StepTime
    fits: bool


@dataclass(frozen=True)
class Forecast:
    """Everything that `sora_train.plan` prints."""

    figures: Estimate
    device: Hardware
    stages: Mapping[int, StageForecast]  # by stage, otherwise as configured
    recomputing: Mapping[str, Mapping[int, StageForecast]]  # by override that recomputes more, then by stage
    save: SaveAdvice
    sharing: Mapping[int, StageForecast] = field(default_factory=dict)  # by sequence parallelism, configured stage


def forecast(
    config: Config, figures: Estimate, heaviest: Heaviest, device: Hardware, per_node: int, *, disk: float,
    hours_per_failure: float, degrees: Mapping[int, Degree] | None = None,
) -> Forecast:  # fmt: skip
    """Trace the heaviest pass, and forecast memory and time at every stage.

    Args:
        config: Configuration of the run.
        figures: Its batch figures.
        heaviest: The heaviest pass.
        device: Hardware of a rank.
        per_node: Ranks per machine.
        disk: Rate at which all ranks together write checkpoints, byte/s.
        hours_per_failure: Mean time between failures of one device, hours.
        degrees: Degrees of sequence parallelism to compare at the configured stage.
    """
    stages = by_stage(config, figures, heaviest, device, per_node)
    recomputing = {}
    for choice in _MORE[config.model.activation_checkpointing] if METHODS.get(config.method).recomputes else ():
        other = replace(config, model=replace(config.model, activation_checkpointing=choice))
        name = f"model.activation_checkpointing={choice}"
        recomputing[name] = by_stage(other, figures, heaviest, device, per_node)
    averages = 1 + len(config.optim.ema_lengths)
    save = save_advice(figures.parameters - figures.frozen, figures.ranks, disk, hours_per_failure, averages)
    sharing = {}
    for degree, one in (degrees or {}).items():
        same = replace(figures, passes=one.passes)
        each = by_stage(one.config, same, one.heaviest, device, per_node)
        sharing[degree] = each[stage_of(config)]
    return Forecast(figures, device, stages, recomputing, save, sharing)


def by_stage(
    config: Config, figures: Estimate, heaviest: Heaviest, device: Hardware, per_node: int
) -> dict[int, StageForecast]:
    """Memory and step time at every ZeRO stage, otherwise as configured; the arguments are those of `forecast`."""
    # a CPU's time is measured with the operations in their order
    traced = (trace if device.gloo else deep_trace)(config, heaviest.sizes, figures.encoded, heaviest.ranks)
    count, ranks, passes = figures.parameters - figures.frozen, figures.ranks, figures.passes
    found = {}
    for stage in range(METHODS.get(config.method).highest_stage + 1):
        needs = memory(config, count, traced, ranks, passes, stage, frozen=figures.frozen, gloo=bool(device.gloo))
        time = step_time(
            config,
            count,
            traced,
            ranks,
            passes,
            stage,
            device=device,
            per_node=per_node,
            share=heaviest.share,
            frozen=figures.frozen,
        )
        found[stage] = StageForecast(needs, time, needs.peak <= _USABLE * device.memory_gib * 2**30)
    return found


def suggestion(config: Config, result: Forecast) -> str:
    """Sentence that suggests a setting: the fastest that fits, or the configured one if it is within 2% of it."""
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
    """Print the forecast as tables; `note` says why there are no figures of the data, if so."""
    terminal.print(_facts(config, result, note))
    terminal.print(_memory_table(config, result))
    terminal.print(_time_table(config, result))
    if len(result.sharing) > 1:
        terminal.print(_sharing_table(config, result))
    terminal.print(suggestion(config, result), highlight=False)


def _facts(config: Config, result: Forecast, note: str) -> Table:
    e, data, save = result.figures, config.data, result.save
    title = f"{config.method} on {e.ranks} rank(s) of {result.device.name}, {config.precision.value}"
    table = Table(title=title, show_header=False)
    rows = [
        ("parameters", f"{e.parameters / 1e6:.1f}M" + (f", {e.frozen / 1e6:.1f}M of them frozen" if e.frozen else "")),
        ("slots per step", f"{data.slots}, {e.passes} pass(es) per rank, {e.idle:.0%} of the places idle"),
        ("tokens per step, at most", f"{data.slots * data.max_tokens:,}"),
        ("clips", "latents and text embeddings from the shards" if e.encoded else "encoded anew in every step"),
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
            ("balance of the slots", f"{e.balance:.1%}" + (" of measured seconds" if e.slot_s else " of FLOPs")),
            *([("slots in packs of several", f"{e.shared:.0%}")] if e.shared else []),
            *([("a step's dearest slot, as measured", f"{e.slot_s:.3g} s")] if e.slot_s else []),
            ("a step's departure from the mix, at most", f"{e.departure:.1%} of its tokens"),
        ]
    else:
        rows.append(("data", note))
    for row in rows:
        table.add_row(*row)
    return table


def _rows(config: Config, result: Forecast) -> list[tuple[str, str, StageForecast]]:
    """Rows of the tables: ZeRO stage, recomputation, and forecast."""
    now = config.model.activation_checkpointing if METHODS.get(config.method).recomputes else "none"
    rows = [(f"ZeRO {stage}", now, s) for stage, s in result.stages.items()]
    for override, stages in result.recomputing.items():
        rows += [(f"ZeRO {stage}", override.partition("=")[2], s) for stage, s in stages.items()]
    return rows


def _table(title: str, heads: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    for number, head in enumerate(["", "recomputes", *heads]):
        table.add_column(head, justify="right" if number > 1 else "left", no_wrap=number < 2)
    for row in rows:
        table.add_row(*row)
    return table


def _memory_table(config: Config, result: Forecast) -> Table:
    parts = {
        "weights": "weights", "grad": "gradients", "Adam": "optimizer", "EMA": "ema", "VAE": "encoder",
        "activ.": "activations", "buffers": "bucket", "peak": "peak",
    }  # fmt: skip
    rows = [
        [stage, recomputed, *(_gib(getattr(s.memory, part)) for part in parts.values()), "yes" if s.fits else "no"]
        for stage, recomputed, s in _rows(config, result)
    ]
    return _table("memory of one rank at its peak, GiB", [*parts, f"fits {result.device.memory_gib:.0f}"], rows)


def _sharing_table(config: Config, result: Forecast) -> Table:
    """Table of memory and time of a rank by degree of sequence parallelism."""
    table = Table(title=f"ranks that share a pack, at ZeRO {stage_of(config)}, GiB and seconds", box=SIMPLE)
    for head in ("parallel.sequence", "activ.", "peak", f"fits {result.device.memory_gib:.0f}", "comm.", "step"):
        table.add_column(head, justify="right")
    for degree, s in result.sharing.items():
        times = [f"{x:.2g}" if x < 10 else f"{x:.0f}" for x in (s.time.communication, s.time.total)]
        table.add_row(str(degree), _gib(s.memory.activations), _gib(s.memory.peak), "yes" if s.fits else "no", *times)
    return table


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f}" if count < 100 * 2**30 else f"{count / 2**30:.0f}"


def _time_table(config: Config, result: Forecast) -> Table:
    e, device, steps = result.figures, result.device, config.steps
    rows = []
    for stage, recomputed, s in _rows(config, result):
        time, hours = s.time, s.time.total * steps / 3600
        seconds = (time.compute, time.update, time.communication, time.total)
        parts = [f"{x:.2g}" if x < 10 else f"{x:.0f}" for x in seconds]
        mfu = e.step_flops / time.total / e.ranks / device.peak
        cost = f"${hours * e.ranks * device.dollars_per_hour:,.0f}"
        rows.append([stage, recomputed, *parts, f"{mfu:.0%}", duration(hours * 3600), cost])
    title = (
        f"time of a step in seconds; {steps:,} steps at ${device.dollars_per_hour:g} per rank and hour; "
        "nothing is taken to overlap"
    )
    return _table(title, ["compute", "update", "comm.", "step", "MFU", "run", "cost"], rows)
