"""Measure what packs of a run's model cost on this device, to balance them by seconds instead of FLOPs.

    python -m sora_train.calibrate experiment=demo out=cost.json [key=value ...]
    python -m sora_train.train experiment=demo data.cost=cost.json run_dir=runs/demo

    out=cost.json        file to write
    rounds=5             measurements of each pack; the median counts
    latents=false        true if shards contain latents, or the cache keeps all of them: the VAE isn't run

The command measures encoding, forward and backward pass of packs with one or several clips, of several lengths and
sizes within `data.max_frames`, `data.max_pixels` and `data.max_tokens`. It fits the seconds as a linear function of the
numbers of packs, clips, tokens, squared tokens and pixels. The plan's hash covers the fitted values. A run keeps its
own copy, so a new fit never changes a started run.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from sora_train.config.hydra import run_hydra
from sora_train.config.schema import Config
from sora_train.core.cli import InputError, run
from sora_train.core.options import number, options_and_overrides
from sora_train.core.outputs import usable


@dataclass
class Options:
    """Options of the command in addition to the configuration."""

    out: str
    rounds: int = number(5, least=1)
    latents: bool = False


def main() -> int:
    """Measure the configuration of the command line."""
    options = options_and_overrides(Options, __doc__, "runs/planned")
    return run_hydra(lambda config: calibrate(config, options), need_vae=False)


def calibrate(config: Config, options: Options) -> int:
    """Measure, fit and write the file."""
    import torch

    from sora_train.core.world import World, threads_here
    from sora_train.forecast.calibration import as_json, fit, measure

    if not Path(options.out).resolve().parent.is_dir():
        raise InputError(f"out={options.out}: its folder doesn't exist")
    torch.set_num_threads(config.threads or threads_here(World()))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    packs = list(measure(config, device, options.rounds, options.latents))
    result = fit(config, packs)
    for term, seconds in result.seconds.items():
        print(f"{term.replace('_', ' '):10} {seconds:.3g} s")
    ours, flops = (statistics.median(errors) for errors in (result.errors, result.flops_errors))
    print(f"{len(packs)} packs on {name}, {min(p.seconds for p in packs):.3g} to {max(p.seconds for p in packs):.3g} s")
    print(f"error of a pack that was left out of the fit: {ours:.1%}; of seconds proportional to FLOPs: {flops:.1%}")
    with usable(Path(options.out), "out"):
        Path(options.out).write_text(json.dumps(as_json(config, result, name), indent=1) + "\n")
    print(f"written to {options.out}; train and plan with data.cost={options.out}")
    return 0


if __name__ == "__main__":
    run(main)
