"""The way from clips to an evaluated model through the commands that the quickstart gives, with tiny networks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import av
import pytest
from PIL import Image

from sora_train.data.index import load_index

ROOT = Path(__file__).parents[2]
TINY_VAE = ("vae.widths=[4,4]", "vae.blocks=[0,0]")
TINY = (
    "model.width=16", "model.depth=1", "model.heads=2", "model.ffn=32", "model.frequencies=16", "text_encoder.width=16",
    "text_encoder.heads=2", "flow.sampling_steps=2", "logging.validate_every=3", "logging.sample_every=3",
    "logging.sample_clips=1", "logging.validation_clips=4", *TINY_VAE,
)  # fmt: skip
STEPS = ("steps=3", "data.max_pixels=576", "data.workers=1", "logging.every_steps=1", "logging.writers=[]")


@pytest.fixture
def call(tmp_path: Path) -> Callable[..., str]:
    """Give a command in the folder of the test, as a user would, and return what it prints."""

    def run(*command: str) -> str:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where torchrun is
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NPROC": "2", "PATH": path}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    return run


def test_from_clips_to_an_evaluated_model(tmp_path: Path, call: Callable[..., str]) -> None:
    python, train = (sys.executable, "-m"), str(ROOT / "launch" / "torchrun.sh")
    call(*python, "data_tools.make_demo", "out=runs/demo_data", "clips=60", "held_out=12", "shard_clips=30")
    vae = ("experiment=demo_vae", "data.max_tokens=720", "logging.validate_every=0", *TINY_VAE)
    call(train, *vae, *STEPS, "run_dir=runs/demo_vae")
    call(*python, "sora_train.export", "run_dir=runs/demo_vae", "out=runs/demo_vae/export", "format=safetensors")
    model = ("experiment=demo", "data.max_tokens=192", *STEPS, *TINY)
    call(*python, "data_tools.encode_latents", *model, "data.validation=[]", "out=runs/latents")
    call(train, *model, "data.sources.demo.shards=[runs/latents/demo/*.tar]", "run_dir=runs/demo")
    call(*python, "sora_train.sample", "run_dir=runs/demo")
    table = call(*python, "sora_train.evaluate", "run_dir=runs/demo", "prompts=8")

    run = tmp_path / "runs" / "demo"
    index = load_index([str(path) for path in sorted((tmp_path / "runs/latents/demo").glob("*.tar"))])
    lines = [line for rank in (0, 1) for line in (run / f"ledger/rank-{rank}.jsonl").read_text().splitlines()]
    ledger = [json.loads(line) for line in lines]
    assert {line["step"] for line in ledger} == {1, 2, 3} and not any(line["refused"] for line in ledger)
    trained = [sample for line in ledger for sample in line["samples"]]
    assert len({int(index.frames[row]) for row in trained}) == 3, "an image and clips of two lengths"
    portrait, landscape = (
        any(sign * (index.height[row] - index.width[row]) > 0 for row in trained) for sign in (1, -1)
    )
    assert portrait and landscape
    assert json.loads((run / "evaluation.json").read_text())["prompts"] == 8 and "colour" in table
    for video in run.rglob("samples/**/*.mp4"):
        with av.open(str(video)) as file:
            assert file.streams.video[0].codec_context.pix_fmt == "yuv420p"
        data = video.read_bytes()
        assert data.index(b"moov") < data.index(b"mdat"), "plays while it loads"
        Image.open(video.with_name(f"{video.stem}-sheet.png")).verify()
    assert len(list(run.rglob("samples/**/*.mp4"))) >= 3
