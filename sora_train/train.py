"""Train a VAE or a video model.

    python -m sora_train.train experiment=demo run_dir=runs/x key=value ...
    torchrun --nproc-per-node N -m sora_train.train experiment=demo run_dir=runs/x ...
    python -m sora_train.train -m experiment=demo run_dir=runs/sweep optim.lr=1e-3,3e-3

The same command goes on where a stopped or killed run was. Exit codes: 0 done, 2 wrong configuration or input,
75 stopped by a signal after saving (give the command again), 1 anything else.
"""

from __future__ import annotations

import os
from pathlib import Path

from sora_train.cli import BAD_INPUT, InputError, run
from sora_train.compose import run_hydra, write_exit
from sora_train.config import Config, to_yaml
from sora_train.data.index import expand
from sora_train.world import World, from_environment


def train(config: Config) -> int:
    """One rank's part in a run, from a checked configuration to an exit code (also left in run_dir/exit.json)."""
    world = from_environment().with_sequence(config.parallel.sequence)
    code, reason = 1, "failed; see the logs"
    try:
        code = _train(config, world)
        reason = {0: "done", 75: "stopped by a signal after saving"}.get(code, reason)
    except InputError as error:
        code, reason = BAD_INPUT, str(error)
        raise
    finally:
        if world.is_main:
            write_exit(config.run_dir, code, reason)
    return code


def _train(config: Config, world: World) -> int:
    for patterns in (*(source.shards for source in config.data.sources.values()), config.data.validation):
        expand(patterns)  # a missing shard is answered now: what follows takes seconds to import
    import torch
    import torch.distributed as dist

    from sora_train.assemble import Shards, build_trainer
    from sora_train.data.pool import Pool
    from sora_train.training.console import setup_logging
    from sora_train.training.zero import connect, disconnect

    shards = Shards(config)
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    setup_logging(run_dir, world.rank)
    if world.is_main:
        (run_dir / "exit.json").unlink(missing_ok=True)
        shards.index()
        (run_dir / "config.yaml").write_text(to_yaml(config))
    torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) // world.local_size))
    device = connect(world)
    try:
        d = config.data
        with Pool(d.workers, d.decode_timeout_s, int(d.decode_memory_gib * 2**30)) as pool:
            dist.barrier()  # the main rank has indexed the shards
            trainer = build_trainer(config, world, device, shards, pool)
            try:
                return trainer.train()
            finally:
                trainer.close()
    finally:
        disconnect()


if __name__ == "__main__":
    run(lambda: run_hydra(train))
