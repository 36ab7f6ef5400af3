"""The SkyPilot file: its keys are those of the published schema, and its commands start what they should."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig

from sora_train.config.load import build
from tests.test_launch import Sandbox

ROOT = Path(__file__).parents[1]
TASK: dict[str, Any] = yaml.safe_load((ROOT / "launch/skypilot.yaml").read_text())
# The keys that we use, with their types, written down by hand from SkyPilot's schema (sky/utils/schemas.py), which
# allows no others.
KEYS = {"name": str, "num_nodes": int, "workdir": str, "resources": dict, "envs": dict, "setup": str, "run": str}
RESOURCES = {"accelerators": str, "use_spot": bool, "disk_size": int, "job_recovery": dict}
RECOVERY = {"max_restarts_on_errors": int, "recover_on_exit_codes": list}


@pytest.mark.parametrize(
    ("part", "keys"),
    [(TASK, KEYS), (TASK["resources"], RESOURCES), (TASK["resources"]["job_recovery"], RECOVERY)],
    ids=["task", "resources", "job_recovery"],
)
def test_its_keys_are_those_of_the_schema(part: dict[str, Any], keys: dict[str, type]) -> None:
    assert {key: type(value) for key, value in part.items()} == keys


def test_what_may_be_started_again_is() -> None:
    recovery = TASK["resources"]["job_recovery"]
    assert recovery == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75]}
    assert all(isinstance(value, str) for value in TASK["envs"].values())  # numbers are refused


def test_its_setup_names_what_is_there() -> None:
    first, second = (shlex.split(line) for line in TASK["setup"].splitlines())
    assert (ROOT / first[0]).is_file() and second[-1] == ".[storage]"
    assert "storage = [" in (ROOT / "pyproject.toml").read_text()


def test_its_command_starts_every_node(tmp_path: Path, compose_tree: Callable[..., DictConfig]) -> None:
    box = Sandbox(tmp_path)
    box.stand_in("torchrun", '#!/usr/bin/env bash\nprintf "%s\\n" "$@" >>"$CALLS"\n')
    sky = {
        "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.9", "SKYPILOT_TASK_ID": "sky-1",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_RANK": "1",
    }  # fmt: skip
    environment = box.environment | TASK["envs"] | sky
    subprocess.run(["bash", "-c", TASK["run"]], cwd=tmp_path, env=environment, check=True, timeout=250)
    said = box.calls()
    assert said[said.index("--nnodes") + 1] == "2" and said[said.index("--nproc-per-node") + 1] == "8"
    assert said[said.index("--rdzv-endpoint") + 1].startswith("10.0.0.7:2")
    assert said[said.index("--rdzv-id") + 1] == "sky-1" and said[said.index("--max-restarts") + 1] == "3"
    arguments = said[said.index("sora_train.train") + 1 :]
    config = build(compose_tree(*arguments), need_vae=False)
    assert config.checkpoint.mirror == "s3://my-bucket/runs/first-try" and config.run_dir == "runs/first-try"
