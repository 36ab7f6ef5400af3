"""Predictions of `plan` against what a run takes: most bytes of tensors, and CPU time of a step.

    python -m benchmarks.plan_accuracy

Three small configurations at four ZeRO stages on two ranks with one thread each. Bytes are those of torch's own
allocator, as its profiler records them from before the network is built to after the second step. Time is CPU time of
rank 0, in which other work on the machine hardly shows, against `hardware=cpu` measured in the same process. How fast
a core is changes within minutes, by up to a half on a shared machine, so steps and the measurement of the core take
turns: each round's steps are compared with what is planned on the core as it was right after them.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile

from benchmarks.report import write
from sora_train.config.hydra import CONF
from sora_train.config.load import build
from sora_train.config.registry import METHODS
from sora_train.config.schema import Config
from sora_train.core.batch import Pack
from sora_train.core.world import World, from_environment
from sora_train.forecast.footprint import memory
from sora_train.forecast.this_machine import measure_cpu
from sora_train.forecast.timing import step_time
from sora_train.forecast.trace import Size, clip_of, trace
from sora_train.methods.base import trained
from sora_train.models.video_vae.model import build_vae
from sora_train.training.engine.engines import Engines
from sora_train.training.engine.process_group import connect, disconnect

_COPIED = "++deepspeed.zero_optimization.contiguous_gradients=true"  # DeepSpeed's default; experiment=demo turns it off
_CASES: dict[str, tuple[list[str], list[Size]]] = {
    "demo model, 8 clips": (["model=demo"], [(9, 48, 48)] * 8),
    "10M, recomputing": (
        ["model=20m", "model.depth=4", "model.activation_checkpointing=block", "data.max_pixels=4096", _COPIED],
        [(9, 64, 64)],
    ),
    "wide and shallow, bf16": (
        ["model=20m", "model.width=512", "model.heads=8", "model.ffn=2048", "model.depth=3", "precision=bf16", _COPIED],
        [(9, 48, 64)],
    ),
}
_STAGES = (0, 1, 2, 3)
_ROUNDS, _STEPS = 5, 3
_LETS_GO_S = 0.005
_BUCKET = 1_000_000  # DeepSpeed's default of half a billion elements would hide everything else


def _config(overrides: list[str], stage: int) -> Config:
    bucket = [f"++deepspeed.zero_optimization.reduce_bucket_size={_BUCKET}"] if stage else []
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        tree = compose("train", ["experiment=demo", "run_dir=x", f"deepspeed=zero{stage}", *overrides, *bucket])
    return build(tree, need_vae=False)


class _Run:
    """Real steps of a configuration on the same pack."""

    def __init__(self, config: Config, world: World, device: torch.device, sizes: list[Size]) -> None:
        torch.manual_seed(0)
        self.learner = METHODS.get(config.method).learner(config, device)
        learning = [network.module for _, network in trained(self.learner.networks)]
        self.parameters = sum(p.numel() for module in learning for p in module.parameters())
        self.engines = Engines(self.learner.networks, 1, config)
        self.world, self.sizes = world, sizes

    def step(self) -> float:
        """Its CPU seconds."""
        pack = Pack([clip_of(number, size) for number, size in enumerate(self.sizes)])
        start = time.process_time()
        self.engines.set_pace(self.learner.weight(pack) * self.world.size, 1.0, lambda: None)
        self.learner.step(self.engines, [pack])
        self.engines.update_averages()
        return time.process_time() - start


def _peak(prof: profile) -> int:
    """Most bytes allocated at once while the profiler ran."""
    live = peak = 0
    found = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(found, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@contextmanager
def _collectives_end() -> Iterator[None]:
    """Let gloo's threads let go of their copies before whoever waited for a collective goes on.

    A thread of gloo's does so a moment after it has told that it is done. What it frees after that is hidden from the
    profiler, to which the copies then stay for ever: in twenty gathers up to half of what they took.
    """
    work = dist.distributed_c10d.Work
    real = work.wait

    def wait(self: Any, *given: Any) -> Any:
        done = real(self, *given)
        time.sleep(_LETS_GO_S)
        return done

    work.wait = wait
    try:
        yield
    finally:
        work.wait = real


def _worker(out: Path) -> None:
    world = from_environment()
    device = connect(world)
    torch.set_num_threads(1)
    results = []
    for name, (overrides, sizes) in _CASES.items():
        for stage in _STAGES:
            config = _config(overrides, stage)
            config.vae.path, config.vae.cache_mib = tempfile.mkdtemp(), 0
            save_file(build_vae(config.vae).state_dict(), Path(config.vae.path) / "vae.safetensors")
            gc.collect()
            with _collectives_end(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
                measured = _Run(config, world, device, sizes)
                for _ in range(2):
                    measured.step()
                del measured
            peak = _peak(prof)
            del prof
            run = _Run(config, world, device, sizes)
            run.step()
            traced = trace(config, sizes)
            planned = memory(config, run.parameters, traced, world.size, 1, stage, gloo=True).peak
            rounds = []
            for _ in range(_ROUNDS):
                took = statistics.median(run.step() for _ in range(_STEPS))
                core = measure_cpu()
                rounds.append(
                    (
                        took,
                        step_time(config, run.parameters, traced, world.size, 1, stage, device=core, per_node=8).total,
                    )
                )
            del run
            results.append((name, stage, peak, planned, rounds))
    if world.is_main:
        out.write_text(json.dumps(results))
    disconnect()


def main() -> None:
    """Run two ranks, and write the table."""
    if len(sys.argv) > 1:
        _worker(Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        command = ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "benchmarks.plan_accuracy", str(out)]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
        results = json.loads(out.read_text())
    rows = []
    for name, stage, peak, planned, rounds in results:
        took, seconds, ratio = (
            statistics.median(values)
            for values in (*zip(*rounds, strict=True), [planned / took for took, planned in rounds])
        )
        rows.append((
            f"{name}, ZeRO {stage}",
            f"{peak / 2**20:.1f} MiB", f"{planned / 2**20:.1f} MiB", f"{planned / peak - 1:+.1%}",
            f"{took * 1e3:.0f} ms", f"{seconds * 1e3:.0f} ms", f"{ratio - 1:+.1%}",
        ))  # fmt: skip
    write(
        "What `plan` says against what a run takes",
        f"Two ranks of one CPU thread each; allocator's peak over two steps; CPU time: medians of {_ROUNDS} rounds of "
        f"{_STEPS} steps and a measurement of the core, and of the rounds' errors.",
        ("configuration", "peak", "planned", "error", "step", "planned ", "error "),
        rows,
    )


if __name__ == "__main__":
    main()
