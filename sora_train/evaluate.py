"""Measure how good videos are: of a run on its own held-out clips or on prompts, or of any folder.

    python -m sora_train.evaluate run_dir=RUN [split=val|test|train] [shards=[...]] [metrics=quick|full|NAME]
        [count=256] [seed=0] [models={clip: FOLDER}] [release=FOLDER|off] [vae=FOLDER] [base=FOLDER]
    python -m sora_train.evaluate run_dir=RUN tasks=[image_to_video,extension,extension_backwards,interpolation]
    python -m sora_train.evaluate run_dir=RUN prompts=FILE
    python -m sora_train.evaluate videos=DIR [reference=DIR] [prompts=FILE] metrics=quick out=FILE.json
    python -m sora_train.evaluate binding=DIR [each=8]                    BindingBench: its prompts and right videos
    python -m sora_train.evaluate run_dir=RUN format=vbench|vbench_long|vbench2|physics_iq prompts=FILE out=DIR
    python -m sora_train.evaluate videos=DIR format=... prompts=FILE      check such a folder
    python -m sora_train.evaluate side_by_side=[DIR,DIR] out=PAGE.html    a page for blind votes
    python -m sora_train.evaluate votes=[FILE,...] key=PAGE.key.json      what people voted
    python -m sora_train.evaluate videos=DIR memorised=[SHARD,...] out=FILE.json     training clips that samples repeat

See docs/evaluation.md. `run_dir` is a run or an export of one. After an interruption, repeat the command: finished
samples of a run's evaluation are kept. Under torchrun the ranks share the samples.
"""

from __future__ import annotations

from dataclasses import replace

from sora_train.config.load import load
from sora_train.config.schema import Config
from sora_train.core.cli import InputError, nearest, run
from sora_train.core.options import options
from sora_train.core.world import from_environment
from sora_train.data.order.plan import Plan
from sora_train.data.shards import Shards
from sora_train.evaluation.commands import WITHOUT_A_MODEL, Options

SPLITS = {"val": "validation", "test": "test", "train": "sources"}  # and the key of data that names its shards


def main() -> int:
    """Run the evaluation that the options select; returns the exit code."""
    o = options(Options, __doc__)
    if o.memorised:
        from sora_train.generation.training_clips import find_copies

        return find_copies(o)
    if o.run_dir:
        return _with_model(o)
    return next(command for key, command in WITHOUT_A_MODEL.items() if not key or getattr(o, key))(o)


def _with_model(o: Options) -> int:
    import torch  # these imports take seconds, and only this function needs them

    from sora_train.generation.evaluate_run import evaluate_run
    from sora_train.operations.inputs import check_inputs
    from sora_train.operations.trained import load_sampler, named_weights
    from sora_train.release.chosen import safeguards_for

    config, world = replace(load(o.run_dir, o.vae, o.base), run_dir=o.run_dir), from_environment()
    told = ("vae.path",) if o.vae is not None else ()
    check_inputs(config, o.run_dir, ", or say where they are: base=FOLDER, vae=FOLDER", told)
    plan = None if o.prompts else _plan(config, o)
    device = torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    safeguards = safeguards_for(o.release, mark=False, guard=False)  # captions of the data, unmarked pixels
    sampler = load_sampler(config, o.run_dir, device)
    return evaluate_run(o, sampler, named_weights(o.run_dir), plan, world, safeguards)


def _plan(config: Config, o: Options) -> Plan:
    """Build the plan of the clips to evaluate on. Raises InputError for a split without shards."""
    if o.split not in SPLITS:
        raise InputError(f"split={o.split}; {nearest(o.split, list(SPLITS))}")
    if o.split == "train" and not o.shards:
        return Shards(config).plan(config).plans[0]
    key = SPLITS[o.split]
    config.data.validation = o.shards or getattr(config.data, key)
    plan = Shards(config).held_out(config)
    if plan is None:
        raise InputError(f"the run has no shards to evaluate on (data.{key} is empty); give shards=[...]")
    return plan


if __name__ == "__main__":
    run(main)
