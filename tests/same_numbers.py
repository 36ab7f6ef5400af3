"""Record what training and sampling compute, to show that a change of the code leaves the numbers alone.

    python -m tests.same_numbers record FOLDER      make data and runs in FOLDER, write FOLDER/numbers.json
    python -m tests.same_numbers compare A B        exit code 1 and a list where two records differ

Thirty steps of both methods at ZeRO 0 to 3 on one and two ranks in fp32 and bf16, with accumulation, adapters and
sequence parallelism, and samples of three tasks. Of each run: loss and gradient norm of every step, the samples of
every step, and a hash of every tensor in the last checkpoint. Only the commands of the README are used, so that records
of different versions can be compared; the network's name within a tensor's name (`KIND/NETWORK/PARAMETER`) is ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors import safe_open

from sora_train.core.media import read_mp4
from tests.conftest import sample, write_shard

ROOT = Path(__file__).parents[1]
COMMON = (
    "steps=30", "seed=3", "threads=1", "data.slots=4", "data.workers=1", "logging.every_steps=1",
    "logging.validate_every=15", "logging.validation_clips=4", "logging.sample_every=0", "logging.writers=[]",
    "logging.peak_tflops=1", "checkpoint.every_steps=30", "optim.warmup_steps=5", "data.max_pixels=2304",
)  # fmt: skip
VAE = ("experiment=demo_vae", "vae.widths=[8,8]", "vae.blocks=[0,1]", "vae.channels=4", "data.max_tokens=512")
MODEL = (
    "experiment=demo", "model.width=32", "model.depth=2", "model.heads=2", "model.ffn=64", "text_encoder.width=32",
    "data.max_tokens=96", "vae.cache_mib=0", "flow.sampling_steps=4", "flow.per_frame_noise=0.3",
    "flow.tasks={text_to_video: 0.5, image_to_video: 0.2, extension: 0.2, interpolation: 0.1}",
    "optim.ema_lengths=[0.1]", "checkpoint.snapshot_every=15",
)  # fmt: skip


def cases() -> dict[str, tuple[int, tuple[str, ...]]]:
    """Ranks and overrides of each run, by name; the first one's VAE is what the others encode with."""
    found: dict[str, tuple[int, tuple[str, ...]]] = {}
    for method, stages in ((VAE, range(3)), (MODEL, range(4))):
        name = "autoencoder" if method is VAE else "diffusion"
        for stage in stages:
            for ranks in (1, 2):
                for precision in ("fp32", "bf16"):
                    overrides = (*method, f"deepspeed=zero{stage}", f"precision={precision}")
                    found[f"{name}-zero{stage}-{ranks}-{precision}"] = ranks, overrides
    found["diffusion-accumulation"] = 2, (*MODEL, "deepspeed=zero2", "parallel.accumulation=1")
    for stage in (0, 3):
        lora = ("model.lora.rank=4", "model.lora.targets=[q,v,mlp.2,out.project]")
        found[f"diffusion-lora-zero{stage}"] = 2, (*MODEL, *lora, f"deepspeed=zero{stage}")
    found["diffusion-sequence"] = 2, (*MODEL, "deepspeed=zero2", "parallel.sequence=2")
    return found


def record(folder: Path) -> dict[str, Any]:
    """Make the data and all runs; what is there from before is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    train = write_shard(folder / "train-000000.tar", [sample(n) for n in range(20)])
    held_out = write_shard(folder / "val-000000.tar", [sample(n) for n in range(20, 24)])
    data = (f"data.sources.demo.shards=[{train}]", f"data.validation=[{held_out}]")
    numbers: dict[str, Any] = {}
    for name, (ranks, overrides) in cases().items():
        run_dir = folder / name
        vae = (f"vae.path={folder / 'vae'}",) if name.startswith("diffusion") else ()
        _give(ranks, "sora_train.train", *overrides, *COMMON, *data, *vae, f"run_dir={run_dir}")
        numbers[name] = _run(run_dir)
        if name == "autoencoder-zero0-1-fp32":
            _give(1, "sora_train.export", f"run_dir={run_dir}", f"out={folder / 'vae'}")
        print(name, flush=True)
    run_dir, picture, video = folder / "diffusion-zero1-2-fp32", folder / "image.png", folder / "text.mp4"
    picture.write_bytes(sample(0)["png"])  # type: ignore[arg-type]
    asked = {
        "text": ("seconds=1",),
        "image": (f"image={picture}", "seconds=1"),
        "extension": (f"video={video}", "seconds=2"),
    }
    for name, more in asked.items():
        out = folder / f"{name}.mp4"
        _give(1, "sora_train.sample", f"run_dir={run_dir}", "prompt=block 3", "seed=5", f"out={out}", *more)
        numbers[f"sample-{name}"] = hashlib.sha256(read_mp4(out)[0].tobytes()).hexdigest()
    (folder / "numbers.json").write_text(json.dumps(numbers, indent=1, sort_keys=True) + "\n")
    return numbers


def _give(ranks: int, module: str, *arguments: str) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def _run(run_dir: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    kept = ("loss", "grad_norm", "validation_loss", "samples", "tokens")
    figures = [{key: line[key] for key in ("step", *kept) if key in line} for line in lines]
    ledger = sorted(line for path in (run_dir / "ledger").glob("*.jsonl") for line in path.read_text().splitlines())
    tensors = {}
    for path in sorted((run_dir / "checkpoints" / "step-00000030").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no dict)
                kind, *_, parameter = key.split("/")
                values = file.get_tensor(key).numpy().tobytes()
                tensors[f"{path.stem}/{kind}/{parameter}"] = hashlib.sha256(values).hexdigest()
    return {"figures": figures, "ledger": hashlib.sha256("\n".join(ledger).encode()).hexdigest(), "tensors": tensors}


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of the records that differ, with the first difference of each."""
    wrong = [f"{name} is in one record only" for name in sorted(set(before) ^ set(after))]
    for name in sorted(set(before) & set(after)):
        if before[name] == after[name]:
            continue
        if isinstance(before[name], str):
            wrong.append(f"{name}: other pixels")
            continue
        parts = [part for part in before[name] if before[name][part] != after[name][part]]
        wrong.append(f"{name}: {', '.join(parts)}")
    return wrong


def main() -> int:
    match sys.argv[1:]:
        case ["record", folder]:
            record(Path(folder))
            return 0
        case ["compare", before, after]:
            records = [json.loads(Path(path).read_text()) for path in (before, after)]
            wrong = compare(*records)
            runs = [value for value in records[0].values() if isinstance(value, dict)]
            tensors = sum(len(run["tensors"]) for run in runs)
            print("\n".join(wrong) or f"{len(runs)} runs with {tensors} tensors, and 3 samples: bit for bit the same")
            return bool(wrong)
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
