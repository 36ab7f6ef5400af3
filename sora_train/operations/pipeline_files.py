"""A trained transformer as a whole diffusers pipeline, with the released VAE and text encoder it was trained with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from sora_train.config.files import read_json
from sora_train.config.released import expands_timesteps, folder_of, is_released
from sora_train.config.schema import Config

_EULER = "FlowMapEulerDiscreteScheduler"  # whose steps are evenly spaced before the shift and end at 0, as ours are
_ENCODERS = {"umt5": "UMT5EncoderModel", "t5": "T5EncoderModel"}  # transformers' classes by model_type
_TOKENIZER = ("tokenizer", "special_tokens", "added_tokens", "spiece", "sentencepiece", "vocab", "merges")  # beginnings


def save_pipeline(config: Config, out: Path) -> None:
    """Write everything of a `WanPipeline` but `transformer/`, which is there already.

    Says where the pipeline's schedule can't be that of `sample`.
    """
    flow = config.flow
    if flow.solver != "euler" or flow.shift_tokens:
        other = f"flow.solver={flow.solver}" if flow.solver != "euler" else f"flow.shift_tokens={flow.shift_tokens}"
        print(f"diffusers has no {other}: the pipeline samples by Euler with shift {flow.shift:g} at every size")
    text, vae = str(config.text_encoder.path), str(config.vae.path)
    copy_part(folder_of(vae, "vae"), out / "vae")
    copy_part(folder_of(text, "text_encoder"), out / "text_encoder", leave_out=() if is_released(text) else _TOKENIZER)
    _copy_tokenizer(text, out / "tokenizer")
    classes = {
        "scheduler": ["diffusers", _EULER],
        "text_encoder": ["transformers", _encoder_class(out / "text_encoder")],
        "tokenizer": ["transformers", _tokenizer_class(out / "tokenizer")],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", config.vae.class_name],
    }
    per_token = config.model.init_from is not None and expands_timesteps(config.model.init_from)
    index = {"_class_name": "WanPipeline", "boundary_ratio": None, "expand_timesteps": per_token, **classes}
    scheduler = {"_class_name": _EULER, "num_train_timesteps": 1000, "shift": config.flow.shift}
    (out / "scheduler").mkdir(exist_ok=True)
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def copy_part(source: Path, target: Path, leave_out: tuple[str, ...] = ()) -> None:
    """Copy the files of one part of a pipeline, without those whose names begin with one of `leave_out`."""
    if source.resolve() == target.resolve():
        return
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(leave_out):
            shutil.copy2(path, target / path.name)


def _copy_tokenizer(source: str, target: Path) -> None:
    """Copy the tokenizer's files. In the folder of a text encoder alone they are among its weights."""
    if is_released(source):
        copy_part(folder_of(source, "tokenizer"), target)
        return
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(Path(source).iterdir()):
        if path.is_file() and path.name.startswith(_TOKENIZER):
            shutil.copy2(path, target / path.name)


def _encoder_class(folder: Path) -> str:
    """The encoder alone, also where the folder's weights are those of encoder and decoder."""
    return _ENCODERS[str(_read(folder / "config.json")["model_type"])]


def _tokenizer_class(folder: Path) -> str:
    return str(_read(folder / "tokenizer_config.json")["tokenizer_class"])


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, "; a pipeline needs it")
