"""Geometry and cost of a configuration, as defined by its method, and the measured cost in the file `data.cost`."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path

from sora_train.config.registry import METHODS
from sora_train.config.schema import Config
from sora_train.core.cli import InputError
from sora_train.core.cost import TEXT_TOKENS, AdapterCost, Cost, Geometry, Seconds, Shapes

KEPT = "cost.json"  # in the run folder: copy of the file `data.cost`, made at the run's first start
_SECOND = 10**15  # femtoseconds


def geometry(config: Config) -> Geometry:
    """Strides and patch side of a run, from which token grids follow."""
    return METHODS.get(config.method).geometry(config)


def cost(config: Config) -> Cost:
    """Forward FLOPs of a clip in the trained network, adapters excluded."""
    return METHODS.get(config.method).cost(config)


def balancing_cost(config: Config) -> Cost | Seconds:
    """Cost by which packs are balanced: measured seconds if `data.cost` names a file, else FLOPs.

    A started run uses its own copy of the file, so a new fit doesn't change its plan.
    """
    if config.data.cost is None:
        return cost(config)
    kept = Path(config.run_dir) / KEPT
    return read_seconds(kept if kept.is_file() else Path(config.data.cost), config)


def keep_cost(config: Config) -> None:
    """Copy the file that `data.cost` names into the run folder, if there is none yet. Called by the main rank."""
    kept = Path(config.run_dir) / KEPT
    if config.data.cost is not None and not kept.is_file():
        part = kept.with_suffix(".part")
        part.write_bytes(Path(config.data.cost).read_bytes())
        part.replace(kept)


def read_seconds(path: Path, config: Config) -> Seconds:
    """Read a measured cost. Raises InputError if it is missing or broken, or belongs to another model."""
    again = "measure it again with python -m sora_train.calibrate"
    try:
        found = json.loads(path.read_text())
        values = {f.name: float(found["seconds"][f.name]) for f in fields(Seconds)}
        measured = found["flops"]
    except FileNotFoundError as error:
        raise InputError(f"data.cost: {path} doesn't exist; {again}") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"data.cost: {path} is no measured cost ({type(error).__name__}: {error}); {again}") from error
    if not all(0.0 <= value < 1e3 for value in values.values()) or not values["per_token"] + values["per_pair"]:
        raise InputError(f"data.cost: {path} has times below 0 or above 1000 s; {again}")
    if measured != asdict(cost(config)):
        raise InputError(f"data.cost: {path} was measured with another model; {again}")
    return Seconds(**{name: round(value * _SECOND) for name, value in values.items()})


def training_cost(config: Config) -> Cost | AdapterCost:
    """FLOPs of the forward and backward pass, for MFU and forecasts."""
    return METHODS.get(config.method).training_cost(config)


def shapes(config: Config) -> Shapes:
    """Input and output sizes of the diffusion transformer."""
    text = config.text_encoder
    return Shapes(config.vae.channels * config.model.patch**2, text.width, text.pad_to or TEXT_TOKENS)
