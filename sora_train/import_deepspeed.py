"""Start a run from a checkpoint written by DeepSpeed's own `engine.save_checkpoint`.

    python -m sora_train.import_deepspeed checkpoint=old/checkpoints run_dir=runs/x [tag=global_step1000] [prefix=...]
        [network=video]

Reads ZeRO 1, 2 and 3 from any number of ranks, and universal checkpoints. fp32 weights, Adam's moments and the step
count become a checkpoint in `run_dir`, under the parameter names without `prefix`, for `network` (vae for an
autoencoder). `sora_train.train` resumes from it at any number of ranks and any stage, and refuses names or sizes that
aren't its network's. DeepSpeed's files hold neither averages nor the position in the data: averages start as the
weights, and the data at its beginning. No code in the files is executed.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sora_train.core.cli import InputError, run
from sora_train.core.options import options
from sora_train.operations.lock import RunLock


@dataclass
class Options:
    """Command-line options."""

    checkpoint: str
    run_dir: str
    tag: str | None = None
    prefix: str = ""
    network: str = "video"


def main() -> int:
    """Read, convert and write the checkpoint."""
    o = options(Options, __doc__)
    folder, run_dir = Path(o.checkpoint), Path(o.run_dir)
    if not folder.is_dir():
        raise InputError(f"checkpoint={folder} is no folder")
    if any((run_dir / "checkpoints").glob("step-*")):
        raise InputError(f"{run_dir} has checkpoints of its own; choose another run_dir")
    from sora_train.core.world import World
    from sora_train.training.engine.process_group import connect, disconnect
    from sora_train.training.report.meter import Totals
    from sora_train.training.state.checkpoint import Checkpoints
    from sora_train.training.state.checkpoint_format import Pieces
    from sora_train.training.state.deepspeed_files import read

    saved = read(folder, o.tag)
    named = {
        kind: {f"{o.network}/{name}": values for name, values in _without(o.prefix, tensors).items()}
        for kind, tensors in saved.tensors.items()
    }
    named["ema"] = named["master"]
    shapes = {name: tuple(values.shape) for name, values in named["master"].items()}
    pieces: Pieces = {
        f"{kind}/{name}": (0, values.reshape(-1)) for kind, tensors in named.items() for name, values in tensors.items()
    }
    state = {
        "step": saved.steps, "applied": saved.applied, "position": (0, 0, 0), "plan_hash": "", "amendments": [],
        "ema_updates": 0, "totals": asdict(Totals()), "shapes": shapes, "left_out": [], "ranks": saved.ranks,
        "stage": saved.stage, "time": time.time(), "imported": f"DeepSpeed {saved.version}",
    }  # fmt: skip
    lock = RunLock(run_dir)
    try:
        connect(World())
        checkpoints = Checkpoints(run_dir / "checkpoints", keep=1)
        checkpoints.save(saved.steps, pieces, state)
        if not checkpoints.wait():
            raise InputError(f"the checkpoint could not be written to {run_dir}; see the error above")
        disconnect()
    finally:
        lock.release()
    values = sum(t.numel() for t in named["master"].values())
    print(f"step {saved.steps}: {len(shapes)} parameters, {values / 1e6:.2f}M values, from {saved.ranks} rank(s) at "
          f"ZeRO stage {saved.stage} of DeepSpeed {saved.version}, in {run_dir}/checkpoints")  # fmt: skip
    return 0


def _without(prefix: str, tensors: Any) -> dict[str, Any]:
    if wrong := [name for name in tensors if not name.startswith(prefix)]:
        raise InputError(f"prefix={prefix!r}: {wrong[0]} doesn't begin so")
    return {name.removeprefix(prefix): values for name, values in tensors.items()}


if __name__ == "__main__":
    run(main)
