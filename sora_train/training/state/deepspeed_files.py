"""Reader of checkpoints written by DeepSpeed's own `engine.save_checkpoint`: full fp32 weights and Adam's moments.

    FOLDER/latest                                          tag of the newest checkpoint
    FOLDER/TAG/*mp_rank_00_model_states.pt                 step counts, names and shapes of parameters in order
    FOLDER/TAG/*zero_pp_rank_N_mp_rank_00_optim_states.pt  rank N's part of weights and moments, ZeRO 1 to 3
    FOLDER/TAG/zero/NAME/fp32.pt, exp_avg.pt, ...          instead, in a universal checkpoint (ds_to_universal.py)

The files are pickles. They are read by torch's restricted unpickler, with plain stand-ins for DeepSpeed's classes, so
that no code in them is executed; a file with other objects is refused. The layouts are those of DeepSpeed 0.19. Tensor,
pipeline and expert parallelism aren't supported.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sora_train.core.cli import InputError

KINDS = {"master": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}  # our names to DeepSpeed's


class _Record:
    """Stand-in for DeepSpeed's classes: has the fields of an unpickled object and no behaviour."""


class _Stage(int):
    """Stand-in for DeepSpeed's enumeration of stages, whose members early Python 3.11 pickles by name."""

    NAMES = ("disabled", "optimizer_states", "gradients", "weights")


def _member(owner: Any, name: str) -> _Stage:
    """Restricted getattr for unpickling: looks up a ZeRO stage by name, and refuses everything else."""
    if owner is not _Stage or name not in _Stage.NAMES:
        raise pickle.UnpicklingError(f"GLOBAL getattr of {name!r}")
    return _Stage(_Stage.NAMES.index(name))


_ALLOWED: Sequence[tuple[Any, str]] = (
    (_member, "__builtin__.getattr"),
    (_member, "builtins.getattr"),
    (_Record, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_Record, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Record, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Stage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
)


@dataclass(frozen=True)
class Saved:
    """Contents of a DeepSpeed checkpoint."""

    tensors: Mapping[str, Mapping[str, Tensor]]  # full fp32 tensors by our kind, then by parameter name
    steps: int  # optimizer steps, including skipped ones
    applied: int  # optimizer steps that changed the weights
    ranks: int
    stage: int  # ZeRO stage; 0 for a universal checkpoint
    version: str


def read(folder: Path, tag: str | None = None) -> Saved:
    """Read the checkpoint of a tag, by default the newest. Raises InputError if it can't be read."""
    place = _tagged(folder, tag)
    models = _numbered(place, "*mp_rank_*_model_states.pt")
    if not models:
        raise InputError(f"{place} holds no *_model_states.pt; name the folder that engine.save_checkpoint was given")
    if any("mp_rank_00" not in path.name for path in models):
        raise InputError(f"{place} was saved with tensor or pipeline parallelism, which can't be read")
    model = _load(models[0])
    if (place / "zero").is_dir():
        tensors, ranks, stage = _universal(place / "zero"), int(model.get("dp_world_size") or 1), 0
    else:
        tensors, ranks, stage = _of_ranks(place, model)
    counts = {kind: len(tensors[kind]) for kind in KINDS}
    if len(set(counts.values())) > 1 or not counts["master"]:
        raise InputError(f"{place} holds weights and moments of {counts} parameters; was it saved before a step?")
    steps, skipped = int(model.get("global_steps", 0)), int(model.get("skipped_steps", 0))
    return Saved(tensors, steps, steps - skipped, ranks, stage, str(model.get("ds_version", "unknown")))


def _of_ranks(place: Path, model: dict[str, Any]) -> tuple[dict[str, dict[str, Tensor]], int, int]:
    """Read the files of all ranks: tensors by kind and parameter, number of ranks, ZeRO stage."""
    files = _numbered(place, "*zero_pp_rank_*_mp_rank_00_optim_states.pt")
    if not files:
        raise InputError(f"{place} holds no *_optim_states.pt: it was saved without ZeRO, whose moments have no names")
    parts = [_load(path).get("optimizer_state_dict") or {} for path in files]
    counts = parts[0].get("partition_count", 0)
    ranks = max(counts) if isinstance(counts, list) else int(counts)
    if ranks != len(files):
        raise InputError(f"{place} was saved by {ranks} ranks and holds the files of {len(files)}; a rank's is missing")
    stage = int(parts[0].get("zero_stage", 1))  # BF16_Optimizer, a stage 1, doesn't store it
    pieces: dict[str, dict[str, list[Tensor]]] = {kind: {} for kind in KINDS}
    for rank, part in enumerate(parts):
        places = _places_3(part, model, rank, ranks) if stage == 3 else _places(part)
        for name, group, start, numel in places:
            for kind, flat in _flats(part, stage, group).items():
                pieces[kind].setdefault(name, []).append(flat[start : start + numel].float())
    shapes = {name: tuple(shape) for group in model["param_shapes"] for name, shape in group.items()}
    full = {kind: {n: _whole(torch.cat(p), shapes, n) for n, p in named.items()} for kind, named in pieces.items()}
    if missing := sorted(shapes.keys() - full["master"].keys()):
        raise InputError(f"{place}: no rank holds {missing[0]} ({len(missing)} parameters are missing)")
    return full, ranks, stage


def _places(part: dict[str, Any]) -> Iterator[tuple[str, int, int, int]]:
    """Yield parameter, group, offset and length in a rank's flat tensor of the group, for stages 1 and 2."""
    for group, named in enumerate(part["param_slice_mappings"]):
        for name, address in named.items():
            yield name, group, int(address.start), int(address.numel)


def _places_3(
    part: dict[str, Any], model: dict[str, Any], rank: int, ranks: int
) -> Iterator[tuple[str, int, int, int]]:
    """Yield the same as `_places` for stage 3, where every rank has an equal part of each parameter, padded at the end.

    Lengths exclude the padding.
    """
    if len(model["param_shapes"]) != len(part["fp32_flat_groups"]):
        raise InputError("its files differ in their parameter groups; make a universal checkpoint of it")
    for group, named in enumerate(model["param_shapes"]):
        start = 0
        for name, shape in named.items():
            share = -(-prod(shape) // ranks)
            yield name, group, start, max(0, min(share, prod(shape) - rank * share))
            start += share


def _flats(part: dict[str, Any], stage: int, group: int) -> dict[str, Tensor]:
    """A rank's flat tensors of a group, by our kind."""
    if stage == 3:
        flat, state = part["fp32_flat_groups"][group], part["optimizer_state_dict"]["state"].get(group, {})
    else:
        flat, base = part["single_partition_of_fp32_groups"][group], part["base_optimizer_state"]
        state = base[group] if isinstance(base, list) else base["state"].get(group, {})
    found = {"master": flat, **{kind: state[kind] for kind in ("exp_avg", "exp_avg_sq") if kind in state}}
    return {kind: values.detach().view(-1) for kind, values in found.items()}


def _universal(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Read a universal checkpoint: a folder per parameter, with a file per kind."""
    found: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
    for path in sorted(folder.iterdir()):
        for kind, file in KINDS.items():
            if (path / f"{file}.pt").is_file():
                held = _load(path / f"{file}.pt")
                found[kind][path.name] = (held["param"] if isinstance(held, dict) else held).float()
    return found


def _whole(flat: Tensor, shapes: Mapping[str, tuple[int, ...]], name: str) -> Tensor:
    shape = shapes.get(name)
    if shape is None or prod(shape) != flat.numel():
        raise InputError(f"{name} has {flat.numel()} values in the ranks' files, and the shape {shape}")
    return flat.view(shape)


def _tagged(folder: Path, tag: str | None) -> Path:
    if tag is None and (folder / "latest").is_file():
        tag = (folder / "latest").read_text().strip()
    place = folder / tag if tag else folder
    if not place.is_dir() or (tag and Path(tag).name != tag):
        raise InputError(f"there is no checkpoint {tag!r} in {folder}; name another tag=")
    return place


def _numbered(place: Path, pattern: str) -> list[Path]:
    """Files sorted by the numbers in their names, so that rank 10 comes after rank 9."""
    return sorted(place.glob(pattern), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])


def _load(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(list(_ALLOWED)):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, OSError) as error:
        told = re.search(r"GLOBAL (\S+)", str(error))
        what = "it is damaged or too old"
        if told:
            what = f"{told[1]} in it is neither a tensor nor a record of DeepSpeed's"
        raise InputError(f"{path} isn't read: {what}") from error
