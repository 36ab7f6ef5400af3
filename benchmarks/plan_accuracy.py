"""What `plan` predicts against what a run takes: most bytes of tensors, and CPU time of a step.

    python -m benchmarks.plan_accuracy

Three small configurations at three ZeRO stages on two ranks with one thread each. Bytes are those of torch's own
allocator, as its profiler records them from before the network is built to after the second step. Time is CPU time of
rank 0, because other work on the machine doesn't show in it, against `hardware=cpu` measured in the same process.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile

from benchmarks.report import write
from sora_train import config as configuration
from sora_train.batch import Pack
from sora_train.compose import CONF
from sora_train.config import Config
from sora_train.generation import build_vae
from sora_train.methods import METHODS, untrained
from sora_train.operations.footprint import memory
from sora_train.operations.hardware import measure_cpu
from sora_train.operations.timing import step_time
from sora_train.operations.trace import Size, clip_of, trace
from sora_train.training.ema import Ema
from sora_train.training.optim import adamw
from sora_train.training.zero import Engine, connect, disconnect
from sora_train.world import World, from_environment

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
_BUCKET = 1_000_000  # DeepSpeed's default of half a billion elements would hide everything else


def _config(overrides: list[str], stage: int) -> Config:
    bucket = [f"++deepspeed.zero_optimization.reduce_bucket_size={_BUCKET}"] if stage else []
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        tree = compose("train", ["experiment=demo", "run_dir=x", f"deepspeed=zero{stage}", *overrides, *bucket])
    return configuration.build(tree, need_vae=False)


def _train(
    config: Config, world: World, device: torch.device, sizes: list[Size], steps: int
) -> tuple[list[float], int]:
    """CPU times of real steps, and the number of parameters."""
    torch.manual_seed(0)
    method = METHODS[config.method](config, device)
    parameters = sum(p.numel() for p in method.network.parameters())
    optimizer = adamw(method.groups, config.optim)
    engine = Engine(method.network, optimizer, config.precision, 1, config.optim.clip, config.deepspeed)
    ema = Ema(engine.fragments, config.optim.ema_decay)
    times = []
    for _ in range(steps):
        pack = Pack([clip_of(number, size) for number, size in enumerate(sizes)])
        start = time.process_time()
        engine.backward(method.task.loss(engine, pack, device).sum, method.task.weight(pack) * world.size)
        engine.step(1.0)
        ema.update()
        times.append(time.process_time() - start)
    return times, parameters


def _peak(prof: profile) -> int:
    """Most bytes allocated at once while the profiler ran."""
    live = peak = 0
    found = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(found, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def _worker(out: Path) -> None:
    world = from_environment()
    device = connect(world)
    torch.set_num_threads(1)
    hardware = measure_cpu()
    results = []
    for name, (overrides, sizes) in _CASES.items():
        for stage in _STAGES:
            config = _config(overrides, stage)
            config.vae.path, config.vae.cache_mib = tempfile.mkdtemp(), 0
            save_file(build_vae(config.vae).state_dict(), Path(config.vae.path) / "vae.safetensors")
            gc.collect()
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
                _, parameters = _train(config, world, device, sizes, 2)
            peak = _peak(prof)
            del prof
            times, _ = _train(config, world, device, sizes, 5)
            traced = trace(config, sizes, untrained)
            planned = memory(config, parameters, traced, world.size, 1, stage, gloo=True).peak
            seconds = step_time(config, parameters, traced, world.size, 1, stage, hardware, 8).total
            results.append((name, stage, peak, planned, statistics.median(times[1:]), seconds))
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
    rows = [
        (
            f"{name}, ZeRO {stage}",
            f"{peak / 2**20:.1f} MiB", f"{planned / 2**20:.1f} MiB", f"{planned / peak - 1:+.1%}",
            f"{took * 1e3:.0f} ms", f"{seconds * 1e3:.0f} ms", f"{seconds / took - 1:+.1%}",
        )
        for name, stage, peak, planned, took, seconds in results
    ]  # fmt: skip
    write(
        "What `plan` says against what a run takes",
        "Two ranks of one CPU thread each; allocator's peak over two steps, CPU time of a step (median of four).",
        ("configuration", "peak", "planned", "error", "step", "planned ", "error "),
        rows,
    )


if __name__ == "__main__":
    main()
