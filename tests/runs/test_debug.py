"""The files of conf/debug do what their heads say, and a rank that runs out of memory says where: one start."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sora_train.forecast.out_of_memory import is_out_of_memory

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(3600)]


def test_debug_groups_and_a_rank_without_memory(runs: Callable[[str], Any], tmp_path: Path) -> None:
    found = runs("debugs")
    assert found["codes"] == [0, 1, 2], found["output"]  # of the last runs; those before them ended with 0

    limit = found["limit"]
    assert limit["exit"]["code"] == 0 and list(limit["losses"]) == ["1", "5", "10", "15", "20"]
    files = " ".join(limit["files"])
    for part in ("checkpoints/step-00000010/", "checkpoints/step-00000020/", "samples/step-000010/00.mp4",
                 "samples/step-000020/00.mp4", "tensorboard/events", "report.html"):  # fmt: skip
        assert part in files
    assert "validation_loss" in (tmp_path / "bed/limit/metrics.jsonl").read_text()

    overfit = found["overfit"]
    assert overfit["exit"]["code"] == 0
    assert 1 <= overfit["samples"] <= 6 < limit["samples"]  # what lies first in each of the shards
    # the first 16 samples of the corpus are for training: what is learnt by heart is shown, not what is held out
    assert all(int(key) < 16 for key in previewed(tmp_path / "bed/overfit"))
    assert all(int(key) >= 16 for key in previewed(tmp_path / "bed/limit"))

    assert found["profile"]["exit"]["code"] == 0
    for rank in (0, 1):
        trace = json.loads((tmp_path / f"bed/profile/profile/rank-{rank}-steps-6-9.json").read_text())
        names = [str(event.get("name")) for event in trace["traceEvents"]]
        for phase in ("data", "agreement", "forward and backward", "optimizer step"):
            # what the ranks agree about the next step is heard behind the last step of the trace
            assert names.count(phase) == (3 if phase == "agreement" else 4)
    assert not [file for file in found["profile"]["files"] if file.startswith(("samples", "tensorboard"))]

    memory = found["memory"]
    assert memory["exit"]["code"] == 2 and list(memory["losses"]) == ["1", "2"]
    reason = memory["exit"]["reason"]  # left by rank 1; rank 0 only saw it go
    assert reason.startswith("out of memory in phase 'forward and backward' after step 2, on a pack of 6 tokens, 2 cl")
    assert "GiB per rank" in reason and "snapshot" not in reason and is_out_of_memory(RuntimeError(reason))
    assert f"error: {reason}" in (tmp_path / "bed/profile.out").read_text()  # both ranks' output


def previewed(run_dir: Path) -> list[str]:
    """Keys of the clips whose captions a run sampled."""
    found = [str(json.loads(path.read_text())["clip"]) for path in run_dir.glob("samples/step-*/*.json")]
    assert found
    return found
