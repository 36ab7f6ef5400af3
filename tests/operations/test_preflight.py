"""What changed since the last start, who differs from whom, futile restarts, and what to do when memory runs out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import save_file

from sora_train.config.load import build, to_yaml
from sora_train.config.schema import Config
from sora_train.core.cli import InputError
from sora_train.core.world import World
from sora_train.forecast.out_of_memory import advice, is_out_of_memory, peak_bytes, suggestion
from sora_train.operations.inputs import check_inputs, note_inputs
from sora_train.operations.memory import out_of_memory
from sora_train.operations.preflight import changes, code_hash, count_restart, differences, done_already, facts
from sora_train.training.parts import Place

Make = Callable[..., Config]
LEAST = ("data.max_tokens=400", "model.activation_checkpointing=block", "deepspeed=zero3")  # no change to trace is left


@pytest.fixture
def make(compose_tree: Callable[..., DictConfig], tmp_path: Path) -> Make:
    """A configuration of a run in tmp_path."""

    def config(*overrides: str) -> Config:
        tree = compose_tree("experiment=demo", "vae.path=nowhere", "data.sources.demo.shards=[x]", *overrides)
        tree.run_dir = str(tmp_path)
        return build(tree, need_vae=False)

    return config


@pytest.fixture
def started(make: Make, tmp_path: Path) -> Path:
    """A run with a checkpoint."""
    (tmp_path / "config.yaml").write_text(to_yaml(make()))
    (tmp_path / "checkpoints/step-00000010").mkdir(parents=True)
    return tmp_path


def test_a_new_run_and_the_same_command_again_have_no_changes(make: Make, tmp_path: Path) -> None:
    assert changes(make()) == []
    (tmp_path / "config.yaml").write_text(to_yaml(make("model.width=64")))
    assert changes(make()) == [], "nothing was trained yet"


def test_changes_are_shown(make: Make, started: Path) -> None:
    before = make()
    assert changes(before) == []
    assert changes(make("optim.lr=0.5", "data.slots=3", "model.activation_checkpointing=block")) == [
        f"data.slots: {before.data.slots} -> 3", "model.activation_checkpointing: none -> block",
        f"optim.lr: {before.optim.lr} -> 0.5",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "override", ["model.width=64", "vae.path=other", "vae.channels=7", "text_encoder.width=64", "method=autoencoder"]
)
def test_dangerous_changes_are_refused_unless_forced(make: Make, started: Path, override: str) -> None:
    key, _, value = override.partition("=")
    with pytest.raises(InputError, match=f"{key}: .* -> {value}; .*guard.accept_changes=true"):
        changes(make(override))
    assert any(line.startswith(f"{key}: ") for line in changes(make(override, "guard.accept_changes=true")))


def test_a_vae_does_not_mind_another_video_model(make: Make, tmp_path: Path, started: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(make("method=autoencoder")))
    assert [line.split(":")[0] for line in changes(make("method=autoencoder", "model.width=64"))] == ["model.width"]
    with pytest.raises(InputError, match="vae.channels"):
        changes(make("method=autoencoder", "vae.channels=7"))


def test_weights_and_validation_shards_that_are_replaced_under_their_paths_are_noticed(
    make: Make, started: Path, tmp_path: Path
) -> None:
    vae = tmp_path / "vae"
    vae.mkdir()
    save_file({"a": torch.zeros(3)}, vae / "vae.safetensors")
    config = make()
    config.vae.path = str(vae)
    assert note_inputs(config, "first") == [] and note_inputs(config, "first") == []
    check_inputs(config, started, "")
    assert ["validation shards are others" in line for line in note_inputs(config, "second")] == [True]
    save_file({"a": torch.ones(3)}, vae / "vae.safetensors")
    with pytest.raises(InputError, match=r"vae.path=.* holds other weights than those .* put those back, or not"):
        check_inputs(config, started, ", or not")
    shutil.rmtree(started / "checkpoints")
    check_inputs(config, started, "")  # nothing was trained yet


def test_a_run_with_all_its_steps_is_known(make: Make, started: Path) -> None:
    assert done_already(make("steps=10")) and done_already(make("steps=9")) and not done_already(make("steps=11"))


def test_restarts_without_progress_end_and_a_start_by_hand_begins_anew(make: Make, started: Path) -> None:
    config = make("guard.max_futile_restarts=2")
    count_restart(config, World())
    for restart in (1, 2):
        count_restart(config, World(restarts=restart))
    (started / "checkpoints/step-00000020").mkdir()
    for restart in (3, 4, 5):
        count_restart(config, World(restarts=restart))
    with pytest.raises(InputError, match="2 restarts in a row brought no new checkpoint after 'step-00000020'"):
        count_restart(config, World(restarts=6))
    count_restart(config, World())
    count_restart(config, World(restarts=1))


def test_the_differing_rank_and_thing_are_named() -> None:
    same = {"python": "3.11", "package torch": "2.13"}
    assert differences([same, same, same]) == []
    assert differences([same, {**same, "package torch": "2.12"}, same]) == [
        "rank 1 has package torch = '2.12', others '2.13'"
    ]
    assert differences([same, same, {"python": "3.11"}]) == ["rank 2 has package torch = 'absent', others '2.13'"]


def test_facts_cover_versions_code_data_and_every_key(make: Make) -> None:
    mine = facts(make("optim.lr=0.003"), "cpu", "abc")
    assert mine["package torch"] == torch.__version__ and mine["data set index"] == "abc"
    assert (mine["code"], mine["device"], mine["key optim.lr"]) == (code_hash(), "cpu", "0.003")
    assert differences([mine, facts(make("optim.lr=0.5"), "cpu", "abc")]) == [
        "rank 1 has key optim.lr = '0.5', others '0.003'"
    ]


def test_out_of_memory_is_known_by_its_kinds() -> None:
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"))
    assert not is_out_of_memory(RuntimeError("shape mismatch")) and not is_out_of_memory(KeyError("x"))


@pytest.mark.campaign
def test_the_suggestion_for_too_little_memory_fits(make: Make) -> None:
    config = make("model=20m", "model.depth=2", "data.slots=16", "parallel.accumulation=1", "deepspeed=zero1")
    available = int(1.1 * peak_bytes(config, 8))  # the forecast was wrong
    line = suggestion(config, 8, available)
    overrides = line.split("; try ")[1].split(" (about")[0].split()
    assert overrides[0] == "parallel.accumulation=2"
    better = make("model=20m", "model.depth=2", "deepspeed=zero1", *_last(["data.slots=16", *overrides]))
    assert peak_bytes(better, 8) < 0.7 * available
    assert config.parallel.accumulation == 1, "the run's own configuration is left alone"
    small = make("model=20m", "model.depth=1", "data.max_tokens=600")
    assert "nothing that keeps the model makes it fit" in suggestion(small, 1, 1 << 20)


def test_advice_is_that_of_the_phase(make: Make) -> None:
    config = make("model=demo", "data.slots=2", *LEAST)
    assert "data.prefetch_steps" in advice("data", config, 1, 1 << 40)
    assert "logging.sample_clips" in advice("samples", config, 1, 1 << 40)
    assert advice("forward and backward", config, 1, 1 << 40) == suggestion(config, 1, 1 << 40)


def test_a_gpu_that_is_full_leaves_a_snapshot(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: what torch would be asked to write, and what is said."""
    config = make(f"run_dir={tmp_path}", *LEAST)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_text("blocks"))
    path = tmp_path / "logs" / "rank-3.memory.pickle"
    with pytest.raises(InputError) as caught, out_of_memory(config, World(rank=3, size=4)) as known:
        known.where = lambda: Place(7, "forward and backward", "a pack of 9 tokens")
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert str(caught.value).startswith("out of memory in phase 'forward and backward' after step 7, on a pack of 9")
    assert str(caught.value).endswith(f"; memory snapshot: {path}") and path.read_text() == "blocks"

    path.unlink()
    with pytest.raises(InputError, match="'start' after step 0") as caught, out_of_memory(config, World(3, 4)):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    assert "snapshot" not in str(caught.value) and not path.exists()  # that is the host's memory

    with pytest.raises(RuntimeError, match="shape"), out_of_memory(config, World()):
        raise RuntimeError("shape mismatch")


def _last(overrides: list[str]) -> list[str]:
    return list({o.partition("=")[0]: o for o in overrides}.values())
