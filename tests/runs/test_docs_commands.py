"""Every command of README and docs is given, as it stands there, in a folder with small clips, networks and few steps.

What trains gets overrides appended that make it small, and placeholders get a value; nothing else is changed. Commands
that other tests give, or that need what no test has, stand in `ELSEWHERE` with the place or the reason.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sora_train.media import encode_mp4
from tests.conftest import picture
from tests.test_docs import commands

ROOT = Path(__file__).parents[2]
ELSEWHERE = {
    "./launch/quickstart.sh": "tests/runs/test_whole.py gives its steps; the script itself takes a quarter of an hour",
    "./launch/setup.sh": "tests/test_launch.py; every installation begins with it",
    "./launch/test.sh": "runs the tests",
    "NNODES=2 ": "tests/runs/test_two_machines.py",
    "sbatch ": "tests/runs/test_two_machines.py gives the script to a stand-in for Slurm",
    "python -m benchmarks.": "minutes to hours alone on a machine; RESULTS.md has what they printed",
    "python -m sora_train.train run_dir=runs/wan ": "released weights; tests/models/test_released.py has random ones",
    "python -m sora_train.export run_dir=runs/wan ": "tests/models/test_wan.py",
    "python -m sora_train.train run_dir=runs/lora ": "released weights; tests/runs/test_adapters.py has random ones",
    "python -m sora_train.export run_dir=runs/lora ": "tests/models/test_lora.py",
    "python -m sora_train.train -m hydra/": "tests/operations/test_sweep.py",
}
PLACEHOLDERS = {  # what stands for something in the docs, and what this test puts there
    "SHARDS...": "shards/*.tar", "videos=DIR": "videos=my_videos", "out=DIR": "out=made", "[captions=FILE]": "",
    "[format=json]": "format=json", "[run_dir=RUN]": "run_dir=runs/a", "FOLDER": "folder", "RUN RUN": "runs/a runs/b",
    "RUN": "runs/a",
}  # fmt: skip
MENTIONED = ("sora_train.plan", "data_tools.lint", "sora_train.compare")  # without arguments, for their name alone
VAE = ("vae.widths=[4,4]", "vae.blocks=[0,0]", "data.max_pixels=576", "data.max_frames=5", "data.workers=1")
STEPS = ("steps=2", "threads=1", "logging.every_steps=1", "logging.writers=[]", "logging.peak_tflops=1")
MODEL = (
    "model.width=16", "model.depth=1", "model.heads=2", "model.ffn=32", "model.frequencies=16", "text_encoder.width=16",
    "text_encoder.heads=2", "flow.sampling_steps=2", "logging.sample_clips=1", "logging.validation_clips=4",
    "optim.ema_lengths=[0.05,0.1]", "checkpoint.snapshot_every=1",
)  # fmt: skip
DEMO = ("clips=60", "held_out=12", "shard_clips=30")


def small(command: str) -> str:
    """What is appended to a command so that it takes seconds."""
    if "--help" in command or "--cfg" in command:
        return ""
    if "make_demo" in command:
        return " ".join(DEMO)
    if "sora_train.evaluate" in command:
        return "prompts=8"
    if not any(name in command for name in ("sora_train.train", "launch/torchrun.sh", "encode_latents")):
        return ""
    network = () if "_vae" in command.partition("run_dir")[0] else MODEL
    tokens = "data.max_tokens=720" if "_vae" in command else "data.max_tokens=192"
    return " ".join(f"'{o}'" for o in (*VAE, *STEPS, *network, tokens))


class Workplace:
    """A folder to give commands in, with what they take for granted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "my_videos").mkdir()
        for number in range(4):
            clip = picture(number, 9, 48, 64)
            (folder / f"my_videos/{number}.mp4").write_bytes(encode_mp4(clip, 4.0))
            (folder / f"my_videos/{number}.txt").write_text(f"block number {number}")
        (folder / "conf").symlink_to(ROOT / "conf")
        (folder / "docs").mkdir()
        self.give("python -m data_tools.make_demo out=runs/demo_data")
        self.give("python -m data_tools.build_shards videos=my_videos out=runs/own")
        mine, demo = "'data.sources.mine.shards=[runs/own/*.tar]'", "experiment=demo"
        self.give("python -m sora_train.train experiment=demo_vae run_dir=runs/demo_vae")
        self.give("python -m sora_train.export run_dir=runs/demo_vae out=runs/demo_vae/export")
        self.give(f"python -m sora_train.train experiment=own_vae run_dir=runs/own_vae {mine}")
        self.give("python -m sora_train.export run_dir=runs/own_vae out=runs/own_vae/export")
        self.give(f"python -m sora_train.train experiment=own run_dir=runs/own_model {mine}")
        self.give(f"python -m data_tools.encode_latents {demo} 'data.validation=[]' out=runs/demo_latents")
        self.give(f"python -m sora_train.train {demo} run_dir=runs/demo")
        for run in ("a", "b", "x"):
            shutil.copytree(folder / "runs/demo", folder / "runs" / run)
        for shards in ("shards", "my"):
            shutil.copytree(folder / "runs/own", folder / shards)
        shutil.copytree(folder / "runs/demo_vae/export", folder / "vae")

    def give(self, command: str) -> None:
        """Give a command as a user would, in bash; it must end with 0."""
        line = command
        for placeholder, value in PLACEHOLDERS.items():
            line = line.replace(placeholder, value)
        line = re.sub(r"\./launch/", f"{ROOT}/launch/", line)
        before, arrow, after = line.partition(" > ")
        if before.split()[-1] in MENTIONED:
            before += " --help"
        if run := re.search(r"(?:sora_train\.train|torchrun\.sh) .*run_dir=(\S+)", line):
            shutil.rmtree(self.folder / run[1], ignore_errors=True)  # others of the docs use it too
        line = f"{before} {small(line)} {arrow}{after}"
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "NPROC": "1",
            "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline",
        }  # fmt: skip
        done = subprocess.run(
            ["bash", "-c", line], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("docs"))


def test_what_stands_elsewhere_is_still_in_the_docs() -> None:
    for beginning, reason in ELSEWHERE.items():
        assert any(command.startswith(beginning) for command in commands()), beginning
        for path in re.findall(r"tests/[\w/]+\.py", reason):
            assert (ROOT / path).is_file(), path


@pytest.mark.campaign
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("command", [c for c in commands() if not c.startswith(tuple(ELSEWHERE))])
def test_a_command_of_the_docs_does_its_work(command: str, workplace: Workplace) -> None:
    workplace.give(command)
