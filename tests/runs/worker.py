"""Real runs of one and two ranks, forked from this process, which has no threads.

    python worker.py KIND FOLDER SHARD ...

Prints one line of JSON with what came of them; the tests beside this file look at it.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.fault_bed import Bed, Job, differences, losses, outcome, run, samples_by_step
from benchmarks.fault_trials import elastic, kill, stage_for
from sora_train.training.checkpoint import KINDS as KINDS_OF_TENSORS
from sora_train.training.checkpoint import latest_intact, load_full

# eight slots: four passes on each of two ranks; two steps an epoch
_STEADY = ("data.slots=8", "data.max_tokens=4", "checkpoint.every_steps=20")


def matrix(bed: Bed) -> object:
    """Samples and losses of each step, by ranks, ZeRO stage and accumulation; one start per number of ranks."""
    found = {}
    for ranks in (1, 2):
        configs = {
            f"{ranks} rank(s), stage {stage}, accumulation {passes}": bed.config(
                f"{ranks}-{stage}-{passes}", f"deepspeed=zero{stage}", f"parallel.accumulation={passes}", *_STEADY
            )
            for stage in range(4)
            for passes in (1, 2, 4)
        }
        first, *then = configs.values()
        job = Job(first, ranks, then=then)
        if code := job.wait():
            raise RuntimeError(f"{ranks} rank(s) ended with {code}:\n{job.log.read_text()[-4000:]}")
        for name, config in configs.items():
            folder = Path(config.run_dir)
            found[name] = {"samples": samples_by_step(folder), "losses": losses(folder)}
    return found


def kills(bed: Bed) -> object:
    """Five kills of one run of two ranks, two of them inside a save."""
    config = bed.config("undisturbed", *stage_for(2))
    if code := run(config, 2):
        raise RuntimeError(f"the undisturbed run ended with {code}; see {config.run_dir}")
    reference = outcome(bed.run_dir("undisturbed"))
    inside = (False, True, False, True, False)
    wrong = kill(bed, "killed", random.Random(7), reference, 2, inside)
    compared = {name: len(values) for name, values in reference.items()}
    return {"wrong": wrong, "torn saves": bed.torn_saves, "compared": compared}


def moves(bed: Bed) -> object:
    """Two ranks at stage 1, one at stage 3, one at stage 0, each going on from the one before."""
    config = bed.config("steady", "deepspeed=zero0")
    if code := run(config, 1):
        raise RuntimeError(f"the undisturbed run ended with {code}; see {config.run_dir}")
    folder = bed.run_dir("steady")
    return {"wrong": elastic(bed, "moved", ((2, 1), (1, 3), (1, 0)), folder), "steps": len(losses(folder))}


def adapters(bed: Bed) -> object:
    """Two ranks train adapters at every ZeRO stage, in bf16, and again at stage 3 with a stop halfway."""
    lora = (
        "model.lora.rank=2", "model.lora.alpha=4", "model.lora.targets=[q,v,mlp.2,text_in.0,out.project]",
        "optim.decay_fraction=0", "optim.lr=0.01", "optim.warmup_steps=1", "steps=4",
    )  # fmt: skip
    configs = [bed.config(f"stage-{stage}", *lora, f"deepspeed=zero{stage}") for stage in range(4)]
    configs += [
        bed.config(f"bf16-{stage}", *lora, f"deepspeed=zero{stage}", "precision=bf16", "logging.validate_every=4")
        for stage in (0, 3)
    ]
    configs += [bed.config("resumed", *lora, "deepspeed=zero3", f"steps={steps}") for steps in (2, 4)]
    first, *then = configs
    job = Job(first, 2, then=then)
    if code := job.wait(timeout_s=3000):
        raise RuntimeError(f"ended with {code}:\n{job.log.read_text()[-4000:]}")
    found: dict[str, object] = {}
    for name in dict.fromkeys(Path(config.run_dir).name for config in configs):
        newest = latest_intact(bed.run_dir(name) / "checkpoints")
        found[name] = {
            "losses": losses(bed.run_dir(name)),
            "tensors": {kind: sorted(load_full(newest, kind)) for kind in KINDS_OF_TENSORS},
            "moved": max(float(w.abs().max()) for n, w in load_full(newest, "ema").items() if "lora_B" in n),
        }
    same = differences(outcome(bed.run_dir("stage-3")), outcome(bed.run_dir("resumed")))
    return {"runs": found, "resumed and undisturbed differ in": same}


KINDS: dict[str, Callable[[Bed], object]] = {"matrix": matrix, "kills": kills, "moves": moves, "adapters": adapters}

if __name__ == "__main__":
    kind, folder, *shards = sys.argv[1:]
    print("\n" + json.dumps(KINDS[kind](Bed(Path(folder), steps=20, shards=shards))))
