"""Train a VAE or a video model.

    python -m sora_train.train experiment=demo run_dir=runs/x key=value ...
    torchrun --nproc-per-node N -m sora_train.train experiment=demo run_dir=runs/x ...
    python -m sora_train.train -m experiment=demo run_dir=runs/sweep optim.lr=1e-3,3e-3

The same command resumes a stopped or killed run. Exit codes: 0 done, 2 wrong configuration or input,
75 stopped by a signal after saving (give the command again), 1 anything else.
"""

from __future__ import annotations

import logging
from pathlib import Path

from sora_train.config.hydra import run_hydra, write_exit
from sora_train.config.load import to_yaml
from sora_train.config.schema import Config
from sora_train.core.cli import BAD_INPUT, InputError, run
from sora_train.core.outputs import usable
from sora_train.core.world import World, from_environment, threads_here
from sora_train.data.index.patterns import expand
from sora_train.data.read.commands import is_command, words
from sora_train.data.read.store import scheme
from sora_train.operations.inputs import check_inputs
from sora_train.operations.lock import RunLock
from sora_train.operations.preflight import changes, count_restart, done_already
from sora_train.training.state.mirror import Mirror


def train(config: Config) -> int:
    """Run training on one rank; returns the exit code, which is written to run_dir/exit.json too."""
    world = from_environment().with_sequence(config.parallel.sequence)
    code, reason = 1, "failed; see the logs"
    try:
        code, reason = _start(config, world)
    except InputError as error:
        code, reason = BAD_INPUT, str(error)
        raise
    finally:
        told = (Path(config.run_dir) / "exit.json").exists()  # the rank that failed first has written the reason
        if code == BAD_INPUT or (world.is_main and not (code == 1 and told)):
            write_exit(config.run_dir, code, reason)
        if world.is_main and code != BAD_INPUT:
            _report(Path(config.run_dir))
    return code


def _report(run_dir: Path) -> None:
    """Write report.html. A failure is logged and doesn't change the exit code."""
    if not (run_dir / "metrics.jsonl").is_file():
        return
    from sora_train.operations.records import read
    from sora_train.operations.report import write_report

    try:
        write_report(read(run_dir))
    except Exception as error:
        logging.getLogger(__name__).warning("report.html is not written: %s: %s", type(error).__name__, error)


def _start(config: Config, world: World) -> tuple[int, str]:
    """Run the checks that need no slow import (shards, lock, changed keys), then train.

    Returns:
        The exit code and its reason.
    """
    for patterns in (*(source.shards for source in config.data.sources.values()), config.data.validation):
        expand([p for p in patterns if scheme(p) is None])  # reports missing shards now, before slow imports
        for command in filter(is_command, patterns):
            words(command, config.data.commands)  # reports commands that aren't allowed
    for table in (t for t in config.data.side_tables if scheme(t) is None):
        expand([table], None, "side table", "data.side_tables")
    if not world.is_main:
        return _train(config, world, [])
    run_dir = Path(config.run_dir)
    with usable(run_dir, "run_dir"):
        lock = RunLock(run_dir)
    try:
        with usable(run_dir, "run_dir"):
            (run_dir / "exit.json").unlink(missing_ok=True)
            if mirror := Mirror.of(config):
                mirror.restore()
            changed = changes(config)
            if not config.guard.accept_changes:
                check_inputs(config, run_dir, ", choose another run_dir, or set guard.accept_changes=true")
            count_restart(config, world)
        return _train(config, world, changed)
    finally:
        lock.release()


def _train(config: Config, world: World, changed: list[str]) -> tuple[int, str]:
    import torch

    from sora_train.data.read.pool import Pool
    from sora_train.data.shards import Shards, with_length
    from sora_train.operations.build import build_trainer
    from sora_train.operations.indexing import index_everywhere
    from sora_train.operations.memory import out_of_memory
    from sora_train.operations.vocabulary import with_tokenizer
    from sora_train.training.engine.process_group import connect, disconnect
    from sora_train.training.report.console import setup_logging

    shards = Shards(config)
    run_dir = Path(config.run_dir)
    with usable(run_dir, "run_dir"):
        run_dir.mkdir(parents=True, exist_ok=True)
        setup_logging(run_dir, world.rank)
    for line in changed:
        logging.getLogger(__name__).warning("changed since the last start: %s", line)
    torch.set_num_threads(config.threads or threads_here(world))
    device = connect(world)
    try:
        with usable(run_dir, "run_dir"):
            index_everywhere(shards.wanted, world)
            if config.epochs is not None:
                config = with_length(config, shards.plan(config))
            if world.is_main and done_already(config):
                logging.getLogger(__name__).warning("nothing to train: the run has its %d steps", config.steps)
            elif world.is_main:
                (run_dir / "config.yaml").write_text(to_yaml(config))
            config = with_tokenizer(config, shards, world)
        with Pool.of(config.data, shards.store) as pool, out_of_memory(config, world) as known:
            with usable(run_dir, "run_dir"):
                trainer = build_trainer(config, world, device, shards, pool)
            known.where = trainer.where
            try:
                return trainer.train(), trainer.reason
            finally:
                trainer.close()
    finally:
        disconnect()


if __name__ == "__main__":
    run(lambda: run_hydra(train, usage=__doc__ or ""))
