"""What a run will need and how its data packs, without a GPU, a process group or a trained VAE.

    python -m sora_train.plan experiment=demo world_size=64 [key=value ...]

Prints parameters, memory per rank, batch arithmetic and FLOPs; with shards at hand also steps per epoch, packing and
balance.
"""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from sora_train.assemble import Shards
from sora_train.cli import InputError, run
from sora_train.compose import run_hydra
from sora_train.config import Config, Method
from sora_train.data.plan import Plan
from sora_train.generation import build_vae, build_video_model
from sora_train.operations.planner import estimate, meta_network


def main() -> int:
    """Plan the run that the command line describes."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    ranks = _take("world_size")
    if not any(argument.startswith("run_dir=") for argument in sys.argv[1:]):
        sys.argv.append("run_dir=runs/planned")  # nothing is written
    return run_hydra(lambda config: plan(config, ranks), need_vae=False)


def plan(config: Config, ranks: int) -> int:
    """Print the estimate of one configuration."""
    if config.method is Method.diffusion:
        network = meta_network(build_video_model, config)
    else:
        network = meta_network(build_vae, config.vae)
    data, note = _data(config)
    e = estimate(config, network, data, ranks)
    table = Table(title=f"{config.method.value} on {ranks} rank(s), {config.precision.value}", show_header=False)
    gib = 2**30
    rows = [
        ("parameters", f"{e.parameters / 1e6:.1f}M"),
        ("model, optimizer and EMA per rank", f"{e.state_bytes / gib:.2f} GiB"),
        ("activations per rank, estimated", f"{e.activation_bytes / gib:.2f} GiB"),
        ("slots per step", f"{config.data.slots}, {e.passes} pass(es) per rank, {e.idle:.0%} of the places idle"),
        ("tokens per step, at most", f"{config.data.slots * config.data.max_tokens:,}"),
        ("model FLOPs per full step", f"{e.step_flops:.3g}"),
        ("model FLOPs of the run", f"{e.step_flops * config.steps:.3g}"),
    ]
    if e.steps_per_epoch is not None and e.fill is not None and e.balance is not None:
        rows += [
            ("steps per epoch", f"{e.steps_per_epoch}"),
            ("token budget used", f"{e.fill:.1%}"),
            ("balance of the slots", f"{e.balance:.1%}"),
            ("a step's departure from the mix, at most", f"{e.departure:.1%} of its tokens"),
        ]
    else:
        rows.append(("data", note))
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    return 0


def _data(config: Config) -> tuple[Plan | None, str]:
    """The plan of the shards, where they are there and indexed; else why not."""
    try:
        return Shards(config).plan(config).plans[0], ""
    except InputError as error:
        return None, str(error)


def _take(name: str) -> int:
    """Take `name=N` out of the command line, before Hydra sees it; 1 where it isn't there."""
    for argument in sys.argv[1:]:
        key, _, value = argument.partition("=")
        if key == name:
            sys.argv.remove(argument)
            if not value.isdigit() or int(value) < 1:
                raise InputError(f"{name}={value} must be a whole number above 0")
            return int(value)
    return 1


if __name__ == "__main__":
    run(main)
