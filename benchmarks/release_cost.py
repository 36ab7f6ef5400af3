"""Share of sampling's time that guard, mark and signature take: the same samples in turns with and without.

    python -m benchmarks.release_cost run_dir=RUN [count=4] [rounds=5] [steps=20]

CPU time of one process with one thread, from the options to the finished files. Loading the model is part of it,
imports aren't. Every round has another seed.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sora_train import sample
from sora_train.core.cli import run
from sora_train.core.options import number, options
from sora_train.release import __main__ as release


@dataclass
class Options:
    """Command-line options."""

    run_dir: str
    count: int = number(4, least=1)
    rounds: int = number(5, least=3)
    steps: int | None = number(None, least=1)


def main() -> int:
    """Print seconds without and with, and by how much the second are more."""
    o = options(Options, __doc__)
    torch.set_num_threads(1)
    taken: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sys.argv = ["release", "init", f"release={folder / 'release'}", "provider=Benchmark"]
        release.main()
        _seconds(o, folder, 0, guarded=True)  # imports, and what is cached
        for seed in range(1, o.rounds + 1):
            for guarded in (False, True) if seed % 2 else (True, False):
                taken[guarded].append(_seconds(o, folder, 100 * seed, guarded))
    plain, whole = (np.array(taken[guarded]) for guarded in (False, True))
    more = whole / plain - 1
    low, high = np.quantile(more, (0.25, 0.75))
    print(
        f"{o.count} samples: {np.median(plain):.2f} s without, {np.median(whole):.2f} s with guard, mark and signature"
    )
    print(f"{np.median(more):+.1%} (middle half {low:+.1%} to {high:+.1%}) over {o.rounds} rounds")
    return 0


def _seconds(o: Options, folder: Path, seed: int, guarded: bool) -> float:
    chosen = folder / "release" if guarded else "off"
    arguments = [f"run_dir={o.run_dir}", "prompt=a small red ring drifts left", f"seed={seed}", f"count={o.count}"]
    steps = [] if o.steps is None else [f"steps={o.steps}"]
    sys.argv = ["sample", *arguments, *steps, f"out={folder / f'{seed}-{guarded}.mp4'}", f"release={chosen}"]
    began = time.process_time()
    if code := sample.main():
        raise RuntimeError(f"sample ended with {code}")
    return time.process_time() - began


if __name__ == "__main__":
    run(main)
