"""What conf/ says of itself: heads of experiments, `--help`, the generated reference."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from sora_train.config.catalogue import MEASURED, PLANNED, group, help_text, read_head
from sora_train.config.hydra import CONF
from sora_train.config.load import known_keys
from sora_train.config.reference import reference

ROOT = Path(__file__).parents[2]


def test_a_head_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(
        "# @package _global_\n# A model: small.\n# It learns.\n#   command:  torchrun a=b\n#   time:     9 minutes\n"
        "#     on two cores\nsteps: 1 # not this\n# nor this\n"
    )
    head = read_head(tmp_path / "x.yaml")
    assert (head.name, head.purpose) == ("x", "A model: small. It learns.")
    assert head.facts == {"command": "torchrun a=b", "time": "9 minutes on two cores"}


def test_every_experiment_says_what_it_is_for_and_help_lists_it() -> None:
    text = help_text("usage", CONF)
    heads = group(CONF, "experiment")
    assert len(heads) >= 5
    for head in heads:
        wanted = PLANNED if "planned" in head.facts else MEASURED
        assert all(head.facts.get(name) for name in wanted), head.name
        assert f"experiment={head.name} " in head.facts["command"] or "quickstart.sh" in head.facts["command"]
    for head in [*heads, *group(CONF, "debug")]:
        assert head.purpose, head.name
        assert any(f"={head.name} " in line and line.split(maxsplit=1)[1] for line in text.splitlines())


def test_help_is_answered_at_once() -> None:
    command = [sys.executable, "-m", "sora_train.train", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=250)
    assert "python -m sora_train.train experiment=demo" in done.stdout
    assert "experiment=demo_vae" in done.stdout and "debug=overfit" in done.stdout and "zero3" in done.stdout


def test_the_reference_is_current_and_whole() -> None:
    page = (ROOT / "docs/config_reference.md").read_text()
    assert page == reference(CONF), "python -m sora_train.config.reference conf > docs/config_reference.md"
    for key in known_keys():
        if key.startswith("flow.tasks."):  # a map whose keys are the user's
            continue
        assert f"`{key.rpartition('.')[2]}`" in page, key
