"""A real run whose ranks share the tokens of a pack: the losses of one rank, also when resumed, and previews."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sora_train.config.schema import VAE_USE, VaeConfig
from sora_train.core.media import read_mp4
from sora_train.models.video_vae.model import build_vae

SMALL = (
    "model.width=32", "model.depth=2", "model.heads=2", "model.ffn=64", "text_encoder.width=32", "data.max_tokens=256",
    "data.max_pixels=1024", "data.workers=1", "vae.cache_mib=0", "logging.every_steps=1", "logging.sample_clips=1",
    "logging.validation_clips=4", "logging.writers=[]", "flow.sampling_steps=2", "threads=1", "deepspeed=zero2",
    "flow.tasks.extension_backwards=0.5", "flow.tasks.frames=0.5", "flow.per_frame_noise=0.5",
)  # fmt: skip


def train(run_dir: Path, ranks: int, *overrides: str) -> None:
    launch("sora_train.train", ranks, "experiment=demo", f"run_dir={run_dir}", *SMALL, *overrides)


def launch(module: str, ranks: int, *arguments: str) -> None:
    command = [sys.executable, "-m", module]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [sys.executable, *launcher, *command[1:]]
    done = subprocess.run(
        [*command, *arguments],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=500,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def figures(run_dir: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_two_ranks_that_share_the_tokens_train_as_one(tmp_path: Path, corpus: list[str]) -> None:
    torch.manual_seed(0)
    config = VaeConfig(widths=[8, 8], blocks=[0, 1], channels=4, patch=4, strides=[[4, 1]])
    (tmp_path / "vae").mkdir()
    save_file(build_vae(config).state_dict(), tmp_path / "vae" / "vae.safetensors")
    shape = {key: value for key, value in asdict(config).items() if key not in VAE_USE}
    (tmp_path / "vae" / "config.json").write_text(json.dumps(shape))
    data = (f"data.sources.demo.shards=[{','.join(corpus)}]", f"data.validation=[{corpus[2]}]",
            f"vae.path={tmp_path / 'vae'}")  # fmt: skip
    at = ("logging.validate_every=2", "logging.sample_every=4", "checkpoint.every_steps=2")
    train(tmp_path / "one", 1, *data, *at, "steps=4", "optim.decay_fraction=0")
    for steps in (2, 4):  # a run and its resumption
        train(tmp_path / "two", 2, *data, *at, f"steps={steps}", "optim.decay_fraction=0", "parallel.sequence=2")
    for name in ("loss", "validation_loss", "grad_norm"):
        one, two = (figures(tmp_path / run, name) for run in ("one", "two"))
        assert len(one) >= 2 and two == pytest.approx(one, rel=1e-5), name
    assert figures(tmp_path / "one", "samples") == figures(tmp_path / "two", "samples")
    (one,), (two,) = (list((tmp_path / run / "samples" / "step-000004").glob("00.mp4")) for run in ("one", "two"))
    assert np.abs(read_mp4(one)[0].astype(int) - read_mp4(two)[0]).max() <= 2, "the same seed, the same preview"
    prompt = ("prompt=a block of light", "seed=3", "seconds=5", "overlap=1")
    for ranks in (1, 2):
        launch("sora_train.sample", ranks, f"run_dir={tmp_path / 'one'}", *prompt, f"out={tmp_path / str(ranks)}.mp4")
    one, two = (read_mp4(tmp_path / f"{ranks}.mp4")[0].astype(int) for ranks in (1, 2))
    assert one.shape == two.shape and len(one) > 9 and np.abs(one - two).max() <= 2, "in pieces, on two ranks"
