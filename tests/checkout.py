"""A folder like a fresh checkout, in which every network is tiny and a run has three steps, so that commands can be
given as they stand in the docs.

`conf/` is a copy with one file more, which is merged behind the experiment. The environment is the one at hand, laid
out as `launch/setup.sh` would have made it; `python` and `torchrun` in it may be the fork server's.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.documented import ROOT

LINKED = (
    "sora_train", "data_tools", "hydra_plugins", "launch", "tests", "pyproject.toml", "constraints.txt", "mkdocs.yml",
)  # fmt: skip
COPIED = ("conf", "docs", "benchmarks", "README.md")  # which commands write to
SMALL = """# @package _global_
steps: 3
threads: 1
model: {width: 16, depth: 1, heads: 2, ffn: 32, frequencies: 16}
text_encoder: {width: 16, heads: 2}
vae: {widths: [4, 4], blocks: [0, 0]}
data: {max_pixels: 576, workers: 1}
flow: {sampling_steps: 2}
logging:
  {every_steps: 1, validate_every: 3, validation_clips: 4, sample_every: 3, sample_clips: 1, evaluate_clips: 4,
   peak_tflops: 1}
"""
# As Slurm: the job runs here, on one node.
PROGRAMS = {
    "sbatch": """while [[ $1 == --* ]]; do shift; done
export SLURM_JOB_ID=42 SLURM_JOB_NUM_NODES=1 SLURM_JOB_NODELIST=localhost SLURM_SUBMIT_DIR=$PWD
exec bash "$@"
""",
    "srun": 'while [[ $1 == --* ]]; do [[ $1 == *=* ]] || shift; shift; done\nexec "$@"\n',
    "scontrol": "echo localhost\n",
}


class Checkout:
    """The folder. `small=False` leaves the configuration as it is; `python` stands for the interpreter."""

    def __init__(self, folder: Path, small: bool = True, python: str = "") -> None:
        self.folder, self.python = folder.resolve(), python
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in LINKED:
            (self.folder / name).symlink_to(ROOT / name)
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, self.folder / name)
        if small:
            (self.folder / "conf/small.yaml").write_text(SMALL)
            train = self.folder / "conf/train.yaml"
            train.write_text(re.sub(r"^( *)- debug: null\n", r"\g<0>\1- small\n", train.read_text(), flags=re.M))
        self._environment()
        for name, text in PROGRAMS.items():
            path = self.folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"#!/usr/bin/env bash\n{text}")
            path.chmod(0o755)

    def _environment(self) -> None:
        venv = self.folder / ".venv"
        venv.mkdir()
        for path in Path(sys.prefix).iterdir():
            if not path.name.startswith(".sora") and path.name != "bin":
                (venv / path.name).symlink_to(path)
        (venv / "bin").mkdir()
        for path in (Path(sys.prefix) / "bin").iterdir():
            (venv / "bin" / path.name).symlink_to(path)
        if self.python:
            for name, text in (("python", '"$@"'), ("torchrun", '-m torch.distributed.run "$@"')):
                (venv / "bin" / name).unlink()
                (venv / "bin" / name).write_text(f"#!/bin/sh\nexec {self.python} {text}\n")
                (venv / "bin" / name).chmod(0o755)
        made_from = '(echo "$PWD $PWD/.venv" && cat pyproject.toml constraints.txt) | sha256sum >.venv/.sora-setup'
        subprocess.run(["bash", "-c", made_from], cwd=self.folder, check=True)

    def copy(self, folder: Path) -> Checkout:
        """The same with all that was made in it, to be changed."""
        twin = Checkout(folder, python=self.python)
        for path in self.folder.iterdir():
            to = twin.folder / path.name
            if path.name in (*LINKED, *COPIED, ".venv", "bin"):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.copytree(path, to, symlinks=True)
            else:
                shutil.copy(path, to, follow_symlinks=False)
        return twin

    def give(self, line: str, timeout: float = 900) -> str:
        """Give a line in the shell, assert that it ends with 0, and return what it prints."""
        done = subprocess.run(
            ["bash", "-c", line], cwd=self.folder, env=self.settings(), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=timeout,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\ncode {done.returncode}\n{done.stdout[-6000:]}"
        return done.stdout

    def settings(self) -> dict[str, str]:
        """The environment of a command: neither checkout nor environment are those of the test."""
        inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        path = f"{self.folder / 'bin'}:{self.folder / '.venv/bin'}:{os.environ['PATH']}"
        return inherited | {"PATH": path, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
