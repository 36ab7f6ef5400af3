"""A method of two engines and a model family, each added by registration alone: they train, survive, move, and are
forecast like our own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PLUGS = "plugins=[tests.plugs.distil,tests.plugs.mixer]"


@pytest.mark.timeout(3600)  # half a minute, but not on a busy machine
def test_plugins_train_at_every_stage_and_survive_a_kill(runs: Callable[[str], Any]) -> None:
    found = runs("plugs")
    assert found["kill"] is None, "bitwise, every network's tensors"
    assert found["torn saves"] >= 1
    assert 0 < found["terms"][-1] < 1, "a term of its own is logged; the student begins as its teacher"
    for name, losses in found["losses"].items():
        assert losses == pytest.approx(found["losses"]["distil-1"], rel=1e-5) or name == "mixer-1", name
        assert len(set(losses)) == len(losses) == 4
    kinds = {"master", "exp_avg", "exp_avg_sq"}
    assert found["tensors"] == {"critic": sorted(kinds), "student": sorted({"ema", *kinds})}


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_a_plugin_moves_to_other_ranks_and_stages(runs: Callable[[str], Any]) -> None:
    """2 ranks at stage 1, then 1 at stage 3, then 2 at stage 2: losses to 1e-5."""
    assert runs("moved plugs") == {"kill": None, "move": None}


def test_an_experiments_file_names_the_plugin_of_its_model(python: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mixed.yaml").write_text(
        "# @package _global_\ndefaults: [demo, {override /model: mixer}]\nplugins: [tests.plugs.mixer]\n"
        "model: {width: 32, depth: 1, heads: 2, ffn: 32, sharpness: 3}\n"
    )
    command = [python, "-m", "sora_train.train", "--config-dir", str(tmp_path), "--cfg", "job", "experiment=mixed"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0 and "sharpness: 3" in done.stdout, done.stderr[-800:]


@pytest.mark.parametrize(
    "chosen",
    [pytest.param(("method=distil", "model.depth=1"), marks=pytest.mark.campaign),
     ("model=mixer", "model.sharpness=2", "model.width=32", "model.depth=2", "model.heads=2", "model.ffn=64")],
)  # fmt: skip
def test_plan_forecasts_a_plugin(python: str, chosen: tuple[str, ...]) -> None:
    command = [python, "-m", "sora_train.plan", "experiment=demo", "world_size=2", PLUGS, *chosen]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "ZeRO 3" in done.stdout and "GiB" in done.stdout


def test_an_unknown_name_or_module_is_one_line(python: str) -> None:
    for arguments, message in (
        (("method=distill", PLUGS), "method=distill; did you mean 'distil'?"),
        (("method=distil", PLUGS, "method_options.shares=1"), "reads no method_options.shares; known: share"),
        (("method=distil", PLUGS, "method_options.share=-1"), "method_options.share=-1 must be a number from 0 on"),
        (("method_options.share=1",), "method=diffusion reads no method_options.share; it has none"),
        (("plugins=[tests.plugs.nothing]",), "plugins: tests.plugs.nothing can't be imported"),
        (("model=mixer", PLUGS, "model.sharpness=-1", "model.width=32", "model.depth=1", "model.heads=2",
          "model.ffn=32"), "model.sharpness=-1.0 must be above 0"),
    ):  # fmt: skip
        command = [python, "-m", "sora_train.plan", "experiment=demo", *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2 and message in done.stderr, done.stderr[-800:]
