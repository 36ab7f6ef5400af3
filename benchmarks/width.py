"""Does a learning rate tuned at one width suit another? Runs at several widths and rates, with and without muP.

    python -m benchmarks.width shards=runs/demo_latents/demo/*.tar [widths=[64,128,256]] [steps=200] [base=64]

Each run is `experiment=demo` with AdamW from latents (`data_tools.encode_latents`), in a process of its own; the table
has the loss on the val split at its end. Without `optim.base_width` the best rate falls as the width grows.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.report import command, write
from sora_train.core.cli import run
from sora_train.core.options import number, options

_HEAD = 32  # width of an attention head, the demo's


@dataclass
class Options:
    """Options of the benchmark; see the head of this file."""

    shards: str = "runs/demo_latents/demo/*.tar"
    widths: list[int] = field(default_factory=lambda: [64, 128, 256])
    rates: list[float] = field(default_factory=lambda: [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2])
    steps: int = number(200, least=10)
    base: int = number(64, least=_HEAD)


def main() -> int:
    """Make every run, and write the table."""
    o = options(Options, __doc__)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for transfer in (False, True):
            for width in o.widths:
                losses = {rate: _loss(o, width, rate, transfer, Path(folder)) for rate in o.rates}
                best = min(losses, key=lambda rate: losses[rate])
                cells = (f"{loss:.4f}" for loss in losses.values())
                rows.append(
                    [f"optim.base_width={o.base}" if transfer else "as they are", str(width), *cells, f"{best:g}"]
                )
                print(" | ".join(rows[-1]), flush=True)
    about = f"`{command()}`. Loss on the val split after {o.steps} steps, by learning rate; one seed."
    header = ["learning rates", "width", *(f"{rate:g}" for rate in o.rates), "best"]
    write("Learning rates over widths", about, header, rows)
    return 0


def _loss(o: Options, width: int, rate: float, transfer: bool, folder: Path) -> float:
    """The last validation loss of a run."""
    run_dir = folder / f"{width}-{rate:g}-{transfer}"
    arguments = [
        "experiment=demo", f"run_dir={run_dir}", f"data.sources.demo.shards=[{o.shards}]", f"steps={o.steps}",
        f"model.width={width}", f"model.heads={width // _HEAD}", f"model.ffn={4 * width}",
        "optim.matrices=adamw", f"optim.lr={rate}", f"optim.base_width={o.base if transfer else 0}",
        f"logging.validate_every={o.steps}", "logging.sample_every=0", "logging.evaluate_every=0",
        "logging.writers=[]", f"checkpoint.every_steps={o.steps}", "deepspeed.zero_optimization.stage=0",
    ]  # fmt: skip
    subprocess.run([sys.executable, "-m", "sora_train.train", *arguments], check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return float([line["validation_loss"] for line in lines if "validation_loss" in line][-1])


if __name__ == "__main__":
    run(main)
