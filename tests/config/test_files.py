"""Small files of settings that are damaged: one line that names the file, wherever they are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from data_tools.curation.trained_on import checkpoints_that_saw
from sora_train.config.files import read_json, read_yaml
from sora_train.config.load import build, load
from sora_train.config.released import expands_timesteps, flow_shift, second_transformer
from sora_train.core.cli import InputError
from sora_train.operations.inputs import INPUTS, check_inputs, note_inputs
from sora_train.operations.preflight import changes
from sora_train.operations.records import read

DAMAGED = {
    "cut short": b'{"a": [1,', "no UTF-8": b'{"a": "caf\xe9"}', "empty": b"", "a list": b"[1, 2]", "zeros": b"\0" * 40,
}  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_one_line_names_the_file_and_gives_the_advice(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "settings"
    path.write_bytes(content)
    for reader in (read_yaml, read_json):
        with pytest.raises(InputError) as caught:
            reader(path, "; delete it")
        line = str(caught.value)
        assert line.startswith(str(path)) and line.endswith("; delete it") and "\n" not in line


def test_a_damaged_configuration_of_a_run_is_named(tmp_path: Path, compose_tree: Callable[..., DictConfig]) -> None:
    config = build(compose_tree("experiment=demo", f"run_dir={tmp_path}"), need_vae=False)
    (tmp_path / "checkpoints/step-00000010").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("steps: 3\nmodel: {width: [")
    for reader in (load, read, lambda run: checkpoints_that_saw(str(run), [Path("a.tar")], ["a"])):
        with pytest.raises(InputError, match=r"config.yaml can't be read: line 2: "):
            reader(tmp_path)
    with pytest.raises(InputError, match="delete it to resume without comparing"):
        changes(config)
    (tmp_path / INPUTS).write_text('{"vae.path": ')
    for check in (lambda: check_inputs(config, tmp_path, ""), lambda: note_inputs(config, "")):
        with pytest.raises(InputError, match=f"{INPUTS} can't be read: .*; delete it"):
            check()


def test_damaged_files_of_models_are_named(tmp_path: Path, compose_tree: Callable[..., DictConfig]) -> None:
    (tmp_path / "config.json").write_text('{"widths": [4,')
    with pytest.raises(InputError, match="config.json can't be read"):
        build(compose_tree("experiment=demo", f"vae.path={tmp_path}"))
    for name, reader in (
        ("model_index.json", expands_timesteps), ("model_index.json", second_transformer),
        ("scheduler/scheduler_config.json", flow_shift),
    ):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"shift": ')
        with pytest.raises(InputError, match=f"{path.name} can't be read"):
            reader(tmp_path)
