"""Wrong configurations, each given to a rank as torchrun would start it: one line, code 2, in three seconds of CPU."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

from sora_train.config.hydra import CONF
from sora_train.config.load import known_keys
from sora_train.core.cli import BAD_INPUT
from tests.load import cpu_s

_LIMIT_S = 3.0
# Overrides that are wrong, and what the one line must hold: the key, and where there is one, the nearest valid choice.
WRONG = (
    (("optim.lr=fast",), "optim.lr"),
    (("steps=abc",), "steps"),
    (("data.slots=1.5",), "data.slots"),
    (("precision=fp8",), "precision"),
    (("data.fit=pad",), "data.fit"),
    (("steps=0",), "steps=0 must be above 0"),
    (("data.fill=1.5",), "data.fill=1.5 must be in (0, 1]"),
    (("checkpoint.every_steps=0",), "checkpoint.every_steps=0 must be above 0"),
    (("guard.spike=-1",), "guard.spike=-1.0 must not be below 0"),
    (("optim.ema_lengths=[0.1,0.3]",), "optim.ema_lengths=[0.1, 0.3]"),
    (("experiment=demoo",), "there is no experiment=demoo; did you mean 'demo"),
    (("deepspeed=zero7",), "there is no deepspeed=zero7; did you mean 'zero"),
    (("deepspeed=zero3",), "an autoencoder runs each size by itself"),
    (("+deepspeed.train_batch_size=8",), "deepspeed.train_batch_size follows from data.slots"),
    (("+deepspeed.zero_optimization.round_robin_gradients=true",), "round_robin_gradients"),
    (("logging.writers=[tensorbord]",), "logging.writers has no ['tensorbord']"),
    (("data.decoders=[decrod]",), "data.decoders has no ['decrod']; did you mean 'decord'"),
    (("checkpoint.mirror=/mnt/x",), "checkpoint.mirror=/mnt/x must be a URL"),
    (("data.sources.demo.shards=[nowhere/*.tar]",), "nowhere/*.tar"),
    (("data.sources.demo.shards=['pipe:cat x']",), "pipe:cat x"),
)
# Runs the module as torchrun's worker would, and says at the end whether torch was ever imported.
_PROBE = (
    "import atexit, runpy, sys\n"
    "atexit.register(lambda: print('torch', 'torch' in sys.modules))\n"
    "runpy.run_module('sora_train.train', run_name='__main__', alter_sys=True)\n"
)


def refused(rng: random.Random, number: int, run_dir: Path) -> tuple[str | None, float]:
    """One trial, two of three with a slip of the hand in a key; returns what was wrong, and the seconds it took."""
    if number % 3 == 2:
        wrong, wanted = WRONG[number // 3 % len(WRONG)]
    else:
        key, slipped = _slip(rng)
        wrong, wanted = (f"+{slipped}=1",), ""
    first = () if any(o.startswith("experiment=") for o in wrong) else ("experiment=demo_vae",)
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x",
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}  # fmt: skip
    began, spent = time.monotonic(), cpu_s()
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, *first, *wrong, f"run_dir={run_dir}"], cwd=CONF.parent, capture_output=True,
        text=True, check=False, env=os.environ | ranks | {"PYTHONPATH": str(CONF.parent), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    seconds, spent = time.monotonic() - began, cpu_s() - spent
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    told = f"{' '.join(wrong)}: code {done.returncode}, {spent:.1f} s of CPU, {done.stdout[-200:]}{done.stderr[-600:]}"
    if done.returncode != BAD_INPUT or len(errors) != 1 or "torch False" not in done.stdout or spent > _LIMIT_S:
        return told, seconds
    if wanted:
        return (None if wanted in errors[0] else told), seconds
    return (None if _named(errors[0], key, slipped) else told), seconds


def _slip(rng: random.Random) -> tuple[str, str]:
    """A key, and the same with one letter too much or another one."""
    keys = [key for key in known_keys() if "." in key and not key.startswith(("data.sources.", "deepspeed."))]
    while True:
        key = rng.choice(keys)
        place = rng.randrange(key.index(".") + 1, len(key))
        slipped = key[:place] + rng.choice("xqz") + key[place + rng.randrange(2) :]
        if slipped not in keys and ".." not in slipped and not slipped.endswith("."):
            return key, slipped


def _named(line: str, key: str, slipped: str) -> bool:
    """Tell whether a line names the wrong key (or the group of it that is wrong), and the right one as the nearest."""
    wrong = re.search(r"there is no key '([\w.]+)'; did you mean '([\w.]+)'", line)
    if wrong is None or not f"{slipped}.".startswith(f"{wrong[1]}."):
        return False
    return wrong[2] in known_keys() and wrong[2].split(".")[0] == key.split(".")[0]
