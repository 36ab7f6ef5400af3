"""Measure how good samples are: of a run on its own held-out clips, or any folder of videos.

    python -m sora_train.evaluate run_dir=runs/demo [split=val|test|train] [shards=[...]] [metrics=quick]
        [count=256] [seed=0] [models={clip: FOLDER}]
    python -m sora_train.evaluate run_dir=runs/demo tasks=[image_to_video,extension,...] [count=48]

Samples the captions of held-out clips and judges the samples, the clips themselves and the clips through the VAE (the
ceiling) with the metrics asked for (names or groups: quick, full, completion). With `tasks`, clips are completed from
some of their own frames instead. Writes run_dir/evaluation.json and samples under run_dir/samples. Ranks of torchrun
share the clips out; after an interruption, give the command again. See docs/evaluation.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import MISSING

from sora_train.config.load import load
from sora_train.config.schema import Config
from sora_train.core.cli import InputError, nearest, options, run
from sora_train.core.world import from_environment
from sora_train.data.order.plan import Plan
from sora_train.evaluation.registry import choose
from sora_train.generation.evaluate_run import Asked, evaluate_run, write
from sora_train.generation.sampler import load_sampler
from sora_train.methods.build import Shards

_SPLITS = ("val", "test", "train")


@dataclass
class Options:
    """Command-line options."""

    run_dir: str = MISSING
    split: str = "val"
    shards: list[str] = field(default_factory=list)  # instead of the split's
    metrics: Any = None  # names and groups; null: quick, or completion with tasks
    models: dict[str, str] = field(default_factory=dict)  # local folders of networks by the name metrics give them
    tasks: list[str] = field(default_factory=list)
    count: int = 256
    seed: int = 0


def main() -> int:
    """Evaluate, print the table, write it."""
    o = options(Options, __doc__)
    names = o.metrics if isinstance(o.metrics, list) else [o.metrics or ("completion" if o.tasks else "quick")]
    judges = choose(names, o.models)
    config, world = load(o.run_dir), from_environment()
    plan = _plan(config, o)
    device = torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    sampler = load_sampler(config, o.run_dir, device)
    outcomes = evaluate_run(config, sampler, plan, judges, Asked(o.split, o.tasks, o.count, o.seed), world)
    if world.is_main:
        write(config, outcomes)
    return 0


def _plan(config: Config, o: Options) -> Plan:
    """The order of the clips to evaluate on. Raises InputError for a split without shards."""
    if o.split not in _SPLITS:
        raise InputError(f"split={o.split}; {nearest(o.split, list(_SPLITS))}")
    if o.split == "train" and not o.shards:
        return Shards(config).plan(config).plans[0]
    key = "test" if o.split == "test" else "validation"
    config.data.validation = o.shards or getattr(config.data, key)
    plan = Shards(config).held_out(config)
    if plan is None:
        raise InputError(f"the run has no shards to evaluate on (data.{key} is empty); give shards=[...]")
    return plan


if __name__ == "__main__":
    run(main)
