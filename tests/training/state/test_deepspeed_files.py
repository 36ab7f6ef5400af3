"""What in a checkpoint of DeepSpeed's can't be read is refused by one line, and nothing in it is executed."""

from __future__ import annotations

import collections
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from sora_train.core.cli import InputError
from sora_train.training.state import deepspeed_files
from sora_train.training.state.deepspeed_files import read

SHAPES = {"a": (2, 3), "b": (5,)}


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


def whole(kind: int) -> dict[str, torch.Tensor]:
    return {name: kind * 100 + torch.arange(float(torch.Size(s).numel())).view(s) for name, s in SHAPES.items()}


def save_stage_3(folder: Path, ranks: int = 2, **more: Any) -> Path:
    """As DeepSpeed lays it out: each parameter cut into equal parts, the last padded, end to end."""
    place = folder / "global_step7"
    place.mkdir(parents=True)
    for rank in range(ranks):
        flats = []
        for kind in range(3):
            parts = []
            for values in whole(kind).values():
                share = -(-values.numel() // ranks)
                padded = torch.cat((values.view(-1), torch.full((share * ranks - values.numel(),), -1.0)))
                parts.append(padded[rank * share : (rank + 1) * share])
            flats.append(torch.cat(parts))
        state = {0: {"step": torch.tensor(7.0), "exp_avg": flats[1], "exp_avg_sq": flats[2]}}
        part = {
            "zero_stage": 3, "partition_count": ranks, "fp32_flat_groups": [flats[0]],
            "optimizer_state_dict": {"state": state, "param_groups": []},
        }  # fmt: skip
        torch.save({"optimizer_state_dict": part, **more}, place / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        shapes = [collections.OrderedDict((name, torch.Size(s)) for name, s in SHAPES.items())]
        model = {"param_shapes": shapes, "global_steps": 7, "skipped_steps": 1, "ds_version": "0.19.8"}
        torch.save(model, place / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    (folder / "latest").write_text("global_step7")
    return place


@pytest.mark.parametrize("ranks", [1, 2, 3, 12])
def test_parts_of_any_number_of_ranks_make_the_whole(tmp_path: Path, ranks: int) -> None:
    """Twelve ranks are more than some parameters have values, and rank 10 comes after rank 9."""
    save_stage_3(tmp_path, ranks)
    saved = read(tmp_path)
    assert (saved.steps, saved.applied, saved.ranks, saved.stage, saved.version) == (7, 6, ranks, 3, "0.19.8")
    for number, kind in enumerate(("master", "exp_avg", "exp_avg_sq")):
        assert saved.tensors[kind].keys() == SHAPES.keys()
        assert all(torch.equal(saved.tensors[kind][name], values) for name, values in whole(number).items())


def test_a_universal_checkpoint_is_read(tmp_path: Path) -> None:
    place = save_stage_3(tmp_path)
    for name in SHAPES:
        (place / "zero" / name).mkdir(parents=True)
        for number, file in enumerate(("fp32", "exp_avg", "exp_avg_sq")):
            torch.save({"param": 1000 + whole(number)[name]}, place / "zero" / name / f"{file}.pt")
        torch.save(7, place / "zero" / name / "step.pt")
    saved = read(tmp_path, "global_step7")
    assert saved.stage == 0 and torch.equal(saved.tensors["exp_avg"]["a"], 1000 + whole(1)["a"])


def test_nothing_in_the_files_is_executed(tmp_path: Path) -> None:
    place = save_stage_3(tmp_path, more=Payload(tmp_path / "executed"))
    with pytest.raises(InputError, match=r"optim_states.pt isn't read: \S+ in it is neither a tensor nor"):
        read(tmp_path)
    for path in place.glob("*model_states.pt"):
        path.write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    with pytest.raises(InputError, match=r"model_states.pt isn't read"):
        read(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_the_stand_ins_can_do_nothing() -> None:
    for stand_in, name in deepspeed_files._ALLOWED:
        if stand_in is deepspeed_files._member:  # tested below
            assert name.endswith(".getattr")
            continue
        assert name.startswith("deepspeed.")
        assert vars(stand_in).keys() <= {"__module__", "__doc__", "__dict__", "__weakref__", "NAMES"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("rank", "was saved by 2 ranks and holds the files of 1; a rank's is missing"),
        ("model", r"holds no \*_model_states.pt"),
        ("cut", "optim_states.pt isn't read: it is damaged"),
        ("no zero", "it was saved without ZeRO"),
        ("no moments", "was it saved before a step"),
        ("tag", "there is no checkpoint 'global_step8'"),
        ("tensor parallel", "with tensor or pipeline parallelism"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(tmp_path: Path, damage: str, message: str) -> None:
    place = save_stage_3(tmp_path)
    optim = sorted(place.glob("*_optim_states.pt"))
    if damage == "rank":
        optim[1].unlink()
    elif damage == "model":
        for path in place.glob("*_model_states.pt"):
            path.unlink()
    elif damage == "cut":
        optim[0].write_bytes(optim[0].read_bytes()[:-100])
    elif damage == "no zero":
        for path in optim:
            path.unlink()
    elif damage == "no moments":
        for path in optim:
            held = torch.load(path)
            held["optimizer_state_dict"]["optimizer_state_dict"]["state"] = {}
            torch.save(held, path)
    elif damage == "tag":
        (tmp_path / "latest").write_text("global_step8")
    else:
        torch.save({}, place / "zero_pp_rank_0_mp_rank_01_model_states.pt")
    with pytest.raises(InputError, match=message):
        read(tmp_path)


class ByName:
    """Pickled as early Python 3.11 does with a member of an enumeration."""

    def __init__(self, owner: type, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return getattr, (self.owner, self.name)


def test_a_stage_pickled_by_name_is_read_and_no_other_attribute(tmp_path: Path) -> None:
    place = save_stage_3(tmp_path)
    for path in place.glob("*optim_states.pt"):
        saved = torch.load(path)
        saved["optimizer_state_dict"]["zero_stage"] = ByName(ZeroStageEnum, "weights")
        torch.save(saved, path)
    assert read(tmp_path).stage == 3
    for wrong in (ByName(ZeroStageEnum, "__class__"), ByName(torch.Tensor, "numpy")):
        saved["optimizer_state_dict"]["zero_stage"] = wrong
        torch.save(saved, path)
        with pytest.raises(InputError, match=r"optim_states.pt isn't read: "):
            read(tmp_path)
