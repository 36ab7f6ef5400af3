"""Fingerprints of the weights and validation shards that a run reads by path, to detect that they were replaced.

They are kept in run_dir/inputs.json. The order of the training data has its own hash, in every checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from sora_train.config.files import read_json
from sora_train.config.released import folder_of
from sora_train.config.schema import Config
from sora_train.core.cli import InputError
from sora_train.data.read.encoded import weights_hash

INPUTS = "inputs.json"
_UNCOMPARED = "; delete it to go on without comparing weights and validation shards with those of the last start"
_VALIDATION = "data.validation"


def check_inputs(config: Config, run_dir: str | Path, instead: str, told: Sequence[str] = ()) -> None:
    """Raise InputError if a path of the configuration contains other weights than those the run was trained with.

    Args:
        config: Configuration of the run.
        run_dir: Its folder; nothing is checked if it has no inputs.json.
        instead: Alternative for the user, appended to the message.
        told: Keys whose paths the user gave on this command line; their weights may differ.
    """
    path = Path(run_dir) / INPUTS
    if not path.is_file() or not any((Path(run_dir) / "checkpoints").glob("step-*")):
        return
    known = read_json(path, _UNCOMPARED)
    for key, (where, found) in _weights(config).items():
        if key not in told and known.get(key, found) != found:
            raise InputError(
                f"{key}={where} holds other weights than those that the checkpoints in {run_dir} were trained with; "
                f"put those back{instead}"
            )


def note_inputs(config: Config, validation: str) -> list[str]:
    """Record what a run reads now; returns a line if its validation shards have changed since the last start.

    `validation` is the fingerprint of their index. Called by the main rank.
    """
    path = Path(config.run_dir) / INPUTS
    before = read_json(path, _UNCOMPARED) if path.is_file() else {}
    now = {key: found for key, (_, found) in _weights(config).items()} | {_VALIDATION: validation}
    path.write_text(json.dumps(now, indent=1) + "\n")
    if before.get(_VALIDATION, validation) == validation:
        return []
    return [
        "warning: the validation shards are others than at the last start; validation losses before and after differ"
    ]


def _weights(config: Config) -> dict[str, tuple[str, str]]:
    """Path and hash of frozen weights by key.

    They include the base of adapters, but not the weights that a training of all weights starts from.
    """
    paths = {"vae.path": (config.vae.path, "vae"), "text_encoder.path": (config.text_encoder.path, "text_encoder")}
    if config.model.lora.rank:
        paths["model.init_from"] = (config.model.init_from, "transformer")
    found = {
        key: (path, weights_hash(folder_of(path, part))) for key, (path, part) in paths.items() if path is not None
    }
    if (file := config.tokenizer_file) is not None:
        found["text_encoder.tokenizer"] = (file, tokenizer_hash(file))
    return found


def tokenizer_hash(file: str) -> str:
    """SHA-256 of the file of a tokenizer, 16 hex digits. Raises InputError if it is missing."""
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    except FileNotFoundError as error:
        raise InputError(f"{file} is missing, the tokenizer that the model was trained with; put it back") from error
