"""Forecast memory, time and packing of a run, without a GPU, a process group or a trained VAE.

    python -m sora_train.plan experiment=demo world_size=64 hardware=h100 [key=value ...]

    world_size=1         ranks
    hardware=h100        a100, h100, h200, b200, l40s, rtx4090, or cpu (this machine's cores, measured)
    per_node=8           ranks of one machine
    price=...            dollars per rank and hour, instead of the table's assumption
    disk_gb_s=2          what the shared file system writes, all ranks together
    device_hours=50676   hours that one device runs between failures
    rehearse=true        besides, take one real step of one rank here, the others missing; needs that rank's memory

Prints parameters, batch arithmetic, FLOPs and checkpoint advice; if the shards exist, steps per epoch, packing and
balance; memory by part and step time for ZeRO 0 to 3 and by degree of sequence parallelism; and suggests a setting.
docs/planning.md has its accuracy.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from sora_train.config.hydra import run_hydra
from sora_train.config.schema import Config
from sora_train.core.cli import InputError, run
from sora_train.data.order.plan import Plan
from sora_train.data.shards import Shards
from sora_train.forecast.estimate import degrees, estimate, heaviest_pass
from sora_train.forecast.footprint import stage_of
from sora_train.forecast.forecast import Forecast, forecast, show
from sora_train.forecast.hardware import hardware
from sora_train.forecast.rehearsal import rehearse
from sora_train.forecast.this_machine import measure_cpu
from sora_train.forecast.timing import DEVICE_HOURS_PER_FAILURE


@dataclass
class Options:
    """Command-line options, in addition to the configuration."""

    world_size: int = 1
    hardware: str = "h100"
    per_node: int = 8
    price: float | None = None
    disk_gb_s: float = 2.0
    device_hours: float = DEVICE_HOURS_PER_FAILURE
    rehearse: bool = False


def main() -> int:
    """Print the forecast for the command line."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    options = take(sys.argv)
    if not any(argument.startswith("run_dir=") for argument in sys.argv[1:]):
        sys.argv.append("run_dir=runs/planned")  # nothing is written
    return run_hydra(lambda config: plan(config, options), need_vae=False)


def plan(config: Config, options: Options) -> int:
    """Print the forecast of one configuration."""
    terminal = Console()
    data, note = _data(config)
    result = predict(config, options, data)
    show(terminal, config, result, note)
    if options.rehearse:
        sizes, _ = heaviest_pass(config, data, options.world_size)
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
    figures = estimate(config, data, options.world_size)
    sizes, share = heaviest_pass(config, data, options.world_size)
    return forecast(
        config, figures, sizes, share, device, options.per_node, options.disk_gb_s * 1e9, options.device_hours,
        degrees(config, data, options.world_size),
    )  # fmt: skip


def _data(config: Config) -> tuple[Plan | None, str]:
    """Build the plan if the shards exist and are indexed; else return the reason."""
    try:
        return Shards(config).plan(config).plans[0], ""
    except InputError as error:
        return None, str(error)


def take(arguments: list[str]) -> Options:
    """Remove our own options from a command line, before Hydra parses it. Raises InputError for a wrong value."""
    known = asdict(Options())
    mine = [a for a in arguments[1:] if a.partition("=")[0] in known]
    arguments[1:] = [a for a in arguments[1:] if a not in mine]
    try:
        merged: Any = OmegaConf.merge(OmegaConf.structured(Options), OmegaConf.from_dotlist(mine))
        options = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise InputError(f"{getattr(error, 'full_key', '')}: {str(error).splitlines()[0]}") from error
    assert isinstance(options, Options)
    for name in ("world_size", "per_node", "disk_gb_s", "device_hours"):
        if getattr(options, name) <= 0:
            raise InputError(f"{name}={getattr(options, name)} must be above 0")
    return options


if __name__ == "__main__":
    run(main)
