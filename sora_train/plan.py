"""Forecast of what a run will need and how its data packs, without a GPU, a process group or a trained VAE.

    python -m sora_train.plan experiment=demo world_size=64 hardware=h100 [key=value ...]

    world_size=1         ranks
    hardware=h100        a100, h100, h200, b200, l40s, rtx4090, or cpu (this machine's cores, measured)
    per_node=8           ranks of one machine
    price=...            dollars per rank and hour, instead of the table's assumption
    disk_gb_s=2          what the shared file system writes, all ranks together
    device_hours=50676   hours that one device runs between failures
    scale=true           also 64 to 16,384 ranks with the same work per rank: collectives, agreement, saves, goodput
    encoded=true         if the shards aren't available: assume clips encoded by data_tools.encode_latents
    rehearse=true        also run one real step of one rank here, without the others; needs that rank's memory

Prints parameters, batch arithmetic, FLOPs and checkpoint advice; if the shards exist, steps per epoch, packing and
balance; memory by part and step time for ZeRO 0 to 3 and by degree of sequence parallelism; and suggests a setting.
docs/planning.md has its accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rich.console import Console

from sora_train.config.hydra import run_hydra
from sora_train.config.load import absent
from sora_train.config.schema import Config
from sora_train.core.cli import InputError, run
from sora_train.core.options import number, options_and_overrides
from sora_train.data.order.plan import Plan
from sora_train.data.shards import Shards
from sora_train.forecast.estimate import degrees, estimate, heaviest_pass
from sora_train.forecast.footprint import stage_of
from sora_train.forecast.forecast import Forecast, forecast, show
from sora_train.forecast.hardware import hardware
from sora_train.forecast.rehearsal import rehearse
from sora_train.forecast.scale import scaled
from sora_train.forecast.scale import table as scale_table
from sora_train.forecast.this_machine import measure_cpu
from sora_train.forecast.timing import DEVICE_HOURS_PER_FAILURE
from sora_train.forecast.trace import trace


@dataclass
class Options:
    """Options of the command in addition to the configuration."""

    world_size: int = number(1, least=1)
    hardware: str = "h100"
    per_node: int = number(8, least=1)
    price: float | None = number(None, least=0)
    disk_gb_s: float = number(2.0, above=0)
    device_hours: float = number(DEVICE_HOURS_PER_FAILURE, above=0)
    scale: bool = False
    encoded: bool = False
    rehearse: bool = False


def main() -> int:
    """Plan the run that the command line describes."""
    options = options_and_overrides(Options, __doc__, "runs/planned")
    return run_hydra(lambda config: plan(config, options), need_vae=False)


def plan(config: Config, options: Options) -> int:
    """Print the forecast of one configuration."""
    terminal = Console()
    data, note = _data(config)
    if config.epochs is not None:
        if data is None:
            raise InputError(
                f"epochs={config.epochs:g} can't be counted in steps: {note}; give steps=... to plan without"
            )
        config = replace(config, steps=data.count(config.epochs))
    for key in absent(config):
        terminal.print(f"nothing is at {key}; planned with its shape in the configuration", highlight=False)
    result = predict(config, options, data)
    show(terminal, config, result, note)
    if options.scale:
        if result.device.gloo is not None:
            raise InputError("scale=true is for GPUs; give hardware=h100, or another")
        heaviest = heaviest_pass(config, data, options.world_size, options.per_node)
        traced = trace(config, heaviest.sizes, ranks=heaviest.ranks)
        rows = scaled(
            config, result.figures, traced, heaviest.share, result.device, options.per_node,
            disk=options.disk_gb_s * 1e9, hours_per_failure=options.device_hours,
        )  # fmt: skip
        terminal.print(scale_table(rows, result.device))
    if options.rehearse:
        sizes = heaviest_pass(config, data, options.world_size).sizes
        took = rehearse(config, options.world_size, result.figures.passes, sizes)
        expected = result.stages[stage_of(config)].memory.peak
        terminal.print(
            f"rehearsed one step as one of {options.world_size} ranks at ZeRO stage {stage_of(config)}: "
            f"{took.owned:,} elements of the optimizer state, at most {took.peak / 2**20:,.1f} MiB of tensors "
            f"({expected / 2**20:,.1f} MiB planned; {took.start / 2**20:,.1f} MiB at the start), {took.seconds:.1f} s"
        )
    return 0


def predict(config: Config, options: Options, data: Plan | None) -> Forecast:
    """Compute the forecast of a configuration; `data` is its plan if there are shards."""
    device = measure_cpu() if options.hardware == "cpu" else hardware(options.hardware)
    if options.price is not None:
        device = replace(device, dollars_per_hour=options.price)
    figures = estimate(config, data, options.world_size, options.encoded)
    heaviest = heaviest_pass(config, data, options.world_size, options.per_node)
    return forecast(
        config, figures, heaviest, device, options.per_node, disk=options.disk_gb_s * 1e9,
        hours_per_failure=options.device_hours, degrees=degrees(config, data, options.world_size),
    )  # fmt: skip


def _data(config: Config) -> tuple[Plan | None, str]:
    """Build the plan if the shards exist and are indexed; else return the reason."""
    try:
        return Shards(config).plan(config).plans[0], ""
    except InputError as error:
        return None, str(error)


if __name__ == "__main__":
    run(main)
