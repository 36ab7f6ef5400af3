"""Format of a checkpoint, read and written: safetensors by parameter name, and JSON; nothing is unpickled.

    checkpoints/step-00001000/
        rank-0.safetensors ...   tensors of a rank: `KIND/NETWORK/PARAMETER`, KIND = master, exp_avg, ema, ...
        state.json               step, position, counters, shapes
        manifest.json            size and SHA-256 of every file and of itself, offset of every tensor; written last

A folder is valid only if its manifest exists and all checksums agree. It loads at any number of ranks and any stage.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sora_train.core.cli import InputError
from sora_train.training.engine.fragments import Fragment
from sora_train.training.state.files import Damage, check_file, read_manifest, sha256

Pieces = dict[str, tuple[int, Tensor]]  # by KIND/NETWORK/PARAMETER: offset in the flattened parameter, values


def pieces(
    fragments: Sequence[Fragment],
    ema: Mapping[str, Tensor],
    split: tuple[int, int] | None,
    more: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Pieces:
    """Tensors that this rank saves: master weights, optimizer state and averages.

    Args:
        fragments: This rank's fragments.
        ema: Averages by fragment name.
        split: See `shares`.
        more: Further averages, by kind and fragment name.
    """
    own: dict[str, dict[str, Tensor]] = {"master": {f.name: f.master for f in fragments}}
    for f in fragments:
        for kind, values in f.states.items():
            own.setdefault(kind, {})[f.name] = values
    return shares(fragments, {**own, "ema": ema, **(more or {})}, split)


def shares(
    fragments: Sequence[Fragment], kinds: Mapping[str, Mapping[str, Tensor]], split: tuple[int, int] | None
) -> Pieces:
    """Collect tensors by `KIND/NETWORK/PARAMETER`.

    `split` = (rank, ranks) takes this rank's equal share of each, for stage 0, where every rank holds all of them.
    """
    mine: Pieces = {}
    for f in fragments:
        for kind, tensors in kinds.items():
            if f.name not in tensors:  # the network has no average
                continue
            values = tensors[f.name]
            start, stop = 0, values.numel()
            if split is not None:
                start, stop = (stop * split[0] // split[1], stop * (split[0] + 1) // split[1])
            if stop > start:
                mine[f"{kind}/{f.name}"] = (f.start + start, values[start:stop])
    return mine


def write_pieces(path: Path, staged: Pieces) -> dict[str, Any]:
    """Write a rank's file, through to the disk; returns its record in the manifest."""
    save_file({key: values.contiguous() for key, (_, values) in staged.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    places = {key: (start, values.numel()) for key, (start, values) in staged.items()}
    return {"file": path.name, "size": path.stat().st_size, "sha256": sha256(path), "pieces": places}


def read_state(path: Path) -> dict[str, Any]:
    """Read the state.json of a checkpoint."""
    return json.loads((path / "state.json").read_text())


def load_into(path: Path, targets: Pieces) -> None:
    """Fill target tensors (by name: offset, 1-D tensor) from a verified checkpoint, however it was partitioned.

    Raises InputError if the checkpoint doesn't cover a target, e.g. because the model has other parameters.
    """
    manifest = json.loads((path / "manifest.json").read_text())
    where: dict[str, list[tuple[int, int, str]]] = {}
    for file, record in manifest["files"].items():
        for key, (start, numel) in record.get("pieces", {}).items():
            where.setdefault(key, []).append((start, numel, file))
    with _Files(path) as files:
        for key, (first, target) in targets.items():
            done = 0
            for start, numel, file in where.get(key, []):
                low, high = max(first, start), min(first + target.numel(), start + numel)
                if low < high:
                    target[low - first : high - first].copy_(files[file].get_slice(key)[low - start : high - start])
                    done += high - low
            if done != target.numel():
                raise InputError(
                    f"{path.name} holds {done} of {target.numel()} values of {key}; was it another model's?"
                )


def kinds_of(path: Path, network: str | None = None) -> list[str]:
    """Kinds of tensors (ema, exp_avg, master, ...) that a checkpoint has of a network (default: the first), sorted."""
    files = json.loads((path / "manifest.json").read_text())["files"].values()
    keys = [key.split("/") for record in files for key in record.get("pieces", {})]
    wanted = network or networks_of(path)[0]
    return sorted({kind for kind, of, *_ in keys if of == wanted})


def networks_of(path: Path) -> list[str]:
    """Names of the trained networks of a checkpoint, the run's main one first."""
    return list(dict.fromkeys(name.split("/", 1)[0] for name in read_state(path)["shapes"]))


def load_full(path: Path, kind: str, network: str | None = None) -> dict[str, Tensor]:
    """Load all tensors of a kind for use outside a run.

    Args:
        path: Folder of the checkpoint.
        kind: Kind of the tensors, e.g. `master` or `ema`.
        network: Name of the network; default: the first.

    Returns:
        Full tensors by parameter name.
    """
    prefix = f"{network or networks_of(path)[0]}/"
    shapes = {name: shape for name, shape in read_state(path)["shapes"].items() if name.startswith(prefix)}
    full = {name: torch.empty(torch.Size(shape).numel()) for name, shape in shapes.items()}
    load_into(path, {f"{kind}/{name}": (0, values) for name, values in full.items()})
    return {name.removeprefix(prefix): values.view(shapes[name]) for name, values in full.items()}


def latest_intact(folder: Path) -> Path:
    """Find the newest intact checkpoint in a folder, in a single process. Raises InputError if there is none."""
    for path in reversed(checkpoint_folders(folder)):
        if verify(path) is None:
            return path
    raise InputError(f"no intact checkpoint in {folder}; train first")


def verify(path: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """Verify a checkpoint. Returns a description of the damage, or None if it is intact.

    With several ranks, each rank checks the hashes of its share of the files.
    """
    try:
        manifest = read_manifest(path)
        for number, (name, record) in enumerate(sorted(manifest["files"].items())):
            check_file(path / name, record, hashed=number % ranks == rank)
            if "pieces" in record:
                with safe_open(path / name, "pt") as tensors:  # safetensors, whatever the file's extension
                    if set(tensors.keys()) != set(record["pieces"]):
                        return f"{name} doesn't hold the tensors that manifest.json names"
    except Damage as damage:
        return str(damage)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def checkpoint_folders(folder: Path) -> list[Path]:
    """Checkpoint folders of a run, intact or not, oldest first. Other entries are ignored."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdigit())


class _Files:
    """Context manager of a checkpoint's safetensors files, which are opened on first use."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.open: dict[str, Any] = {}

    def __enter__(self) -> _Files:
        return self

    def __getitem__(self, name: str) -> Any:
        if name not in self.open:
            self.open[name] = safe_open(self.path / name, "pt").__enter__()
        return self.open[name]

    def __exit__(self, *_: object) -> None:
        for file in self.open.values():
            file.__exit__(None, None, None)
