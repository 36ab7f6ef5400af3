"""Sweeps whose jobs are processes: places, codes, figures, the table, and the launcher under Hydra."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sora_train.operations.sweep import Job, run_jobs, summary

ROOT = Path(__file__).parents[2]

TRAIN = """
import json, os, pathlib, sys, time
run, code, loss = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
(run / "seen").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "none") + f" {time.time()}")
(run / "config.yaml").write_text(f"run_dir: {run}\\noptim: {{lr: {loss}}}\\n")
(run / "metrics.jsonl").write_text(f'{{"step": 1, "loss": 9}}\\n{{"step": 2, "loss": {loss}}}\\n')
time.sleep(0.3)
(run / "exit.json").write_text(json.dumps({"code": code, "reason": "because" if code else "done"}))
sys.exit(bool(code))
"""


class Stub(Job):
    """A job that trains nothing: its overrides are the exit code and the loss it writes."""

    def command(self, ranks: int) -> list[str]:
        return [sys.executable, "-c", TRAIN, str(self.run_dir), *self.overrides]


def test_jobs_run_side_by_side_on_their_own_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    jobs = [Stub(tmp_path / str(n), ["0", str(0.5 + n)]) for n in range(4)]
    results = run_jobs(jobs, ranks=2, together=0, metric="validation_loss")
    assert [(r.code, r.figure) for r in results] == [(0, 0.5), (0, 1.5), (0, 2.5), (0, 3.5)]
    seen = [(job.run_dir / "seen").read_text().split()[0] for job in jobs]
    assert sorted(set(seen)) == ["0,1", "2,3"]  # the fifth has no partner


def test_a_failed_job_is_named_and_the_others_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [Stub(tmp_path / "0-a", ["0", "0.25"]), Stub(tmp_path / "1-b", ["2", "0.1"])]
    results = run_jobs(jobs, ranks=1, together=1, metric="loss")
    assert [r.figure for r in results] == [0.25, math.inf] and results[1].reason == "because"
    summary(tmp_path, jobs, results)
    out, err = capsys.readouterr()
    assert "1-b ended with code 2: because" in err and "give the same command again" in err
    assert "optim.lr" in out and "0.25" in out
    assert "<polyline" in (tmp_path / "sweep.html").read_text()


def test_a_job_is_torchrun_of_the_training_command(tmp_path: Path) -> None:
    command = Job(tmp_path / "0-x", ["experiment=demo", "optim.lr=1e-3"]).command(4)
    assert command[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    assert command[-4:] == ["sora_train.train", "experiment=demo", "optim.lr=1e-3", f"run_dir={tmp_path / '0-x'}"]


@pytest.mark.timeout(280)
def test_the_launcher_under_hydra(tmp_path: Path) -> None:
    """Two jobs without shards: each is refused by itself, named, and the sweep's code is theirs."""
    arguments = ["hydra/launcher=torchrun", "hydra.launcher.nproc=1", "experiment=demo_vae", "optim.lr=1e-3,2e-3"]
    done = subprocess.run(
        [sys.executable, "-m", "sora_train.train", "-m", *arguments, "run_dir=sweep"],
        capture_output=True, text=True, cwd=tmp_path, timeout=270, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    for name in ("0-optim.lr-0.001", "1-optim.lr-0.002"):
        note = json.loads((tmp_path / "sweep" / name / "exit.json").read_text())
        assert note["code"] == 2 and "no shard at" in note["reason"]
        assert f"{name} ended with code 2: no shard" in done.stderr
