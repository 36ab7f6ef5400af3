"""The GPU benchmark's small form: every case is a row, and a back end that computes something else is found out."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_step

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def test_sdpa_equals_the_formula_and_the_rest_says_why_it_is_not_here() -> None:
    rows = [gpu_step.attempt("attention", case, work) for case, work in gpu_step.attention_cases(CPU, True)]
    assert len(rows) == 9
    for row in rows:
        if row.case.startswith("sdpa"):
            assert not row.failed and row.error is not None and row.error < 2e-2
        else:
            assert "needs a CUDA GPU" in row.failed and row.error is None


def test_another_formula_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = gpu_step.packed_attention
    monkeypatch.setattr(gpu_step, "packed_attention", lambda q, *rest: real(q * 1.5, *rest))
    rows = [gpu_step.attempt("attention", case, work) for case, work in gpu_step.attention_cases(CPU, True)]
    assert any("off by more than" in row.failed for row in rows)


def test_steps_have_figures_and_what_does_not_fit_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = list(gpu_step.step_cases(CPU, True))
    assert len(cases) == 18
    eager = next(work for case, work in cases if case == "14b, 2 blocks, 8k, eager")
    row = gpu_step.attempt("step", "one", eager)
    assert not row.failed and row.tokens_per_s and row.tflops and row.mfu

    def full() -> gpu_step.Row:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    assert gpu_step.attempt("step", "other", full).failed == "out of memory"


def test_without_a_gpu_the_whole_is_refused(python: str, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [python, "-m", "benchmarks.gpu_step", f"out={tmp_path}/figures.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "tiny=true" in done.stderr


@pytest.mark.campaign
def test_the_small_form_runs_whole(python: str, tmp_path: Path) -> None:
    command = [python, "-m", "benchmarks.gpu_step", "tiny=true", f"out={tmp_path}/figures.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "figures.json").read_text())
    assert {row["part"] for row in rows} == {"attention", "step", "trainer"}
    assert not [row for row in rows if row["failed"] and "needs a CUDA GPU" not in row["failed"]], rows
    assert all(0 <= row["data_wait"] < 1 for row in rows if row["part"] == "trainer")
