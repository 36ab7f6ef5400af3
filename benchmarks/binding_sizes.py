"""BindingBench by model size and CPU seconds: how soon models of the demo's recipe learn to bind.

    python -m benchmarks.binding_sizes shards=[runs/demo_latents/demo/*.tar] vae=runs/demo_vae/export out=DIR
        [seconds=[30,90]] [each=4] [write=true]

Each size is trained by `experiment=demo` in one process at a constant learning rate. It is told to stop at so many
seconds of CPU time (its decoders' included), judged on the prompts of BindingBench, and trained further. Given again,
the command goes on.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.report import command, write
from sora_train.core.cli import STOPPED, number, options, run
from sora_train.demo_world.binding import CATEGORIES
from sora_train.evaluation.results import write_json
from sora_train.training.state.checkpoint import latest_intact, read_state

SIZES = {
    "width 64, depth 1": ("model.width=64", "model.depth=1", "model.heads=2", "model.ffn=256"),
    "width 128, depth 2": (),
    "width 192, depth 4": ("model.width=192", "model.depth=4", "model.heads=6", "model.ffn=768"),
}
TRAINED = (
    "experiment=demo", "steps=100000", "data.validation=[]", "optim.decay_fraction=0", "threads=1",
    "logging.writers=[]", "logging.validate_every=0", "logging.sample_every=0", "logging.evaluate_every=0",
    "checkpoint.every_steps=100000",
)  # fmt: skip
_EVERY_S = 0.2


@dataclass
class Options:
    """Command-line options."""

    shards: list[str]
    vae: str
    out: str
    seconds: list[int] = number([30, 90], least=5)
    each: int = number(4, least=1)
    write: bool = False


def main() -> int:
    """Train, judge, and print the table."""
    o = options(Options, __doc__)
    out = Path(o.out)
    prompts = out / "binding" / "prompts.jsonl"
    if not prompts.is_file():
        _give("sora_train.evaluate", f"binding={prompts.parent}", f"each={o.each}")
    found = {
        (place, after): _judged(out / f"size-{place}", overrides, after, o, prompts)
        for after in sorted(o.seconds)  # all sizes for a short time first
        for place, overrides in enumerate(SIZES.values())
    }
    names = list(SIZES)
    rows = [_row(names[place], found[place, after]) for place, after in sorted(found)]
    header = ["model", "parameters", "CPU s", "steps", "all right", *CATEGORIES]
    about = (
        f"`{command()}`. Percent of the prompts whose video is right in everything, with a 95% interval for all of "
        f"them; {o.each} prompts of each category and degree. CPU seconds of training, without VAE and encoding."
    )
    if o.write:
        write("BindingBench by model size and CPU seconds", about, header, rows)
    else:
        print(about, *(" | ".join(row) for row in [header, *rows]), sep="\n")
    return 0


def _judged(folder: Path, size: tuple[str, ...], after: int, o: Options, prompts: Path) -> dict[str, Any]:
    """What the run in `folder` reaches after so many seconds of CPU time; kept in a file."""
    done = folder / f"after-{after}.json"
    if done.is_file():
        return dict(json.loads(done.read_text()))
    spent_path = folder / "cpu_seconds.json"
    spent = float(json.loads(spent_path.read_text())) if spent_path.is_file() else 0.0
    data = (f"data.sources.demo.shards=[{','.join(o.shards)}]", f"vae.path={o.vae}", f"run_dir={folder}")
    spent += _trained((*TRAINED, *size, *data), after - spent)
    write_json(spent_path, spent)
    _give("sora_train.evaluate", f"run_dir={folder}", f"prompts={prompts}", "metrics=[binding,scene]")
    state = read_state(latest_intact(folder / "checkpoints"))
    found = {
        "cpu_s": spent, "step": state["step"], "parameters": sum(map(math.prod, state["shapes"].values())),
        "figures": json.loads((folder / "evaluation" / "prompts.json").read_text())["figures"],
    }  # fmt: skip
    write_json(done, found)
    return found


def _trained(overrides: tuple[str, ...], seconds: float) -> float:
    """Train until that much CPU time was used; returns what was. The time that starting takes counts too."""
    child = psutil.Popen([sys.executable, "-m", "sora_train.train", *overrides], env=_environment())
    spent = told = 0.0
    while child.poll() is None:
        with suppress(psutil.Error):
            every = [child, *child.children(recursive=True)]
            spent = max(spent, sum(sum(one.cpu_times()[:2]) for one in every))
            if spent >= seconds and not told:
                child.send_signal(signal.SIGTERM)
                told = spent
        with suppress(psutil.TimeoutExpired):
            child.wait(_EVERY_S)
    if child.returncode != STOPPED:
        raise RuntimeError(f"training ended with {child.returncode}")
    return told


def _row(name: str, found: dict[str, Any]) -> list[str]:
    figures = {key: value["columns"]["samples"] for key, value in found["figures"].items()}
    whole = figures["binding"]
    cells = [f"{figures[f'binding_{category}']['value']:.0%}" for category in CATEGORIES]
    total = f"{whole['value']:.1%} ({whole['low']:.0%} to {whole['high']:.0%}, n={whole['n']})"
    size = f"{found['parameters'] / 1e6:.2f}M"
    return [name, size, f"{found['cpu_s']:.0f}", str(found["step"]), total, *cells]


def _give(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True, env=_environment())


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    run(main)
