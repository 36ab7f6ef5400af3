"""The model that generates samples: of a run, of an export, or released weights.

Released weights are the folder of a diffusers pipeline, or a transformer in the layout of Wan's own repository together
with such a folder.
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from sora_train.config.load import build, load
from sora_train.config.released import adapter_file, flow_shift, folder_of, is_released, second_transformer
from sora_train.config.rules import check
from sora_train.config.schema import Config
from sora_train.core.cli import InputError
from sora_train.core.world import World, from_environment
from sora_train.data.read.encoded import weights_hash
from sora_train.generation.options import Options
from sora_train.generation.sampler import Sampler
from sora_train.models.layers import ulysses
from sora_train.models.wan.original import is_original
from sora_train.operations.inputs import check_inputs, tokenizer_hash
from sora_train.operations.trained import EXPORTED, Weights, checkpoint_of, load_sampler

_TI2V_CHANNELS = 48  # of the latents of Wan 2.2's 5B model, which runs at another rate and size than the others
_WAN = {"fps": 16.0, "max_frames": 81, "max_pixels": 480 * 832}
_WAN_TI2V = {"fps": 24.0, "max_frames": 121, "max_pixels": 704 * 1280}


class Source:
    """The model at `run_dir`, loaded when the first sample is made, and its identification for the JSON of samples."""

    def __init__(self, o: Options) -> None:
        """Read the configuration and find the weights. Raises InputError if they are missing or don't fit."""
        self.config = model_config(o)
        self.options = fixed(o)
        self.weights = fingerprint(self.config, self.options)
        self.world = sharing(self.config)

    def open(self) -> Sampler:
        """The sampler of this process; of several ranks, one that shares every clip's tokens with the others."""
        o = self.options
        wanted = Weights(o.checkpoint, o.weights == "raw", o.dtype == "bf16", tuple(map(adapter, o.lora)))
        if self.world.size == 1:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            return load_sampler(self.config, o.run_dir, device, wanted)
        from sora_train.training.engine.process_group import connect  # deepspeed takes seconds to import

        sampler = load_sampler(self.config, o.run_dir, connect(self.world), wanted)
        network: Any = sampler.network
        network.split_sequence(ulysses.sequence_groups(self.world))
        return sampler


def model_config(o: Options) -> Config:
    """Configuration of the model at `run_dir`, with the options that apply to all samples. Raises InputError."""
    of_a_run = {"checkpoint": o.checkpoint is not None, "weights=raw": o.weights == "raw"}
    config = _released(o) if _is_wans(o.run_dir) else load(o.run_dir, o.vae, o.base)
    told = ("vae.path",) if o.vae is not None else ()
    check_inputs(config, o.run_dir, ", or say where they are: base=FOLDER, vae=FOLDER", told)
    given = [key for key, is_given in of_a_run.items() if is_given]
    if given and not (Path(o.run_dir) / "checkpoints").is_dir():
        raise InputError(f"{o.run_dir} is no run, so it has no {given[0]}; leave it out")
    model = copy.copy(config.model)
    for key in ("rope_scaling", "rope_factors"):
        if (value := getattr(o, key)) is not None:
            if not hasattr(model, key):
                raise InputError(f"{key}: models of the family {model.family} have no such key")
            setattr(model, key, value)
    config = replace(config, model=model)
    check(config)
    return config


def adapter(text: str) -> tuple[str, float]:
    """File and weight of one item of `lora=`."""
    path, colon, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if colon and not Path(text).exists() else (text, 1.0)
    except ValueError:
        return text, 1.0


def fixed(o: Options) -> Options:
    """Options with `checkpoint` set (to the newest one if none is given) and absolute paths of adapters.

    Raises InputError if one of them is missing.
    """
    for path, _ in map(adapter, o.lora):
        if not Path(path).exists():
            raise InputError(f"lora={path}: there is no such file or folder")
    lora = [f"{Path(path).absolute()}:{factor:g}" for path, factor in map(adapter, o.lora)]
    if _is_wans(o.run_dir) or (Path(o.run_dir) / EXPORTED).is_file():
        return replace(o, lora=lora)
    step = int(checkpoint_of(o.run_dir, o.checkpoint).name.removeprefix("step-"))
    return replace(o, checkpoint=step, lora=lora)


def fingerprint(config: Config, o: Options) -> str:
    """Hashes of all trained weights, in one line. A sample's JSON identifies its weights by it."""
    if is_released(o.run_dir):
        parts = [weights_hash(Path(o.run_dir) / "transformer")]
    elif is_original(o.run_dir) or (Path(o.run_dir) / EXPORTED).is_file():
        parts = [weights_hash(Path(o.run_dir))]
    else:
        manifest = checkpoint_of(o.run_dir, o.checkpoint) / "manifest.json"
        parts = [str(json.loads(manifest.read_text())["sha256"])[:16]]
    parts.append(weights_hash(folder_of(config.vae.path or "", "vae")))
    if config.text_encoder.path is not None:
        parts.append(weights_hash(folder_of(config.text_encoder.path, "text_encoder")))
    if config.tokenizer_file is not None:
        parts.append(tokenizer_hash(config.tokenizer_file))
    for path, _ in map(adapter, o.lora):
        with adapter_file(path).open("rb") as file:
            parts.append(hashlib.file_digest(file, "sha256").hexdigest()[:16])
    return " ".join(parts)


def sharing(config: Config) -> World:
    """World in which all ranks share the tokens of each clip. Raises InputError for more ranks than heads."""
    world = from_environment()
    if config.model.heads < world.size:
        raise InputError(f"{world.size} ranks can't share {config.model.heads} heads (model.heads); start fewer")
    return world.with_sequence(world.size)


def _is_wans(path: str) -> bool:
    """Tell whether a path names released weights of Wan: a pipeline, or a transformer in their own layout."""
    return is_released(path) or is_original(path)


def _released(o: Options) -> Config:
    """Configuration of a text-to-video or TI2V model of Wan. Raises InputError for another one.

    A transformer in the layout of Wan's own repository is combined with VAE and text encoder of the pipeline `base`.
    """
    folder = o.run_dir
    others = folder if is_released(folder) else o.base
    if others is None or not is_released(others):
        raise InputError(
            f"{folder} is in the layout of Wan's own repository, of which the transformer alone is read: say where a "
            f"-Diffusers release with its VAE and text encoder is, base=FOLDER{f' (not {others})' if others else ''}"
        )
    if Path(folder).is_file() and o.out is None:
        raise InputError(f"run_dir={folder} is a file, in which no samples can be put; say where they go: out=...")
    if second_transformer(folder):
        raise InputError(
            f"{folder} has two transformers, one for each half of the noise; only one is sampled with here"
        )
    tree = {
        "run_dir": folder, "steps": 1, "vae": {"path": o.vae or others}, "model": {"init_from": folder},
        "text_encoder": {"path": others, "max_tokens": 512, "pad_to": 512},
        "flow": {
            "guidance": 5.0, "sampling_steps": 50, "sampling_aspect": [480, 832],
            "shift": flow_shift(others) or 1.0, "shift_tokens": 0,
        },
        "data": {**_WAN, "sources": {"none": {"shards": []}}},
    }  # fmt: skip
    missing = {"width": 1, "depth": 1, "heads": 1, "ffn": 1}  # the folder's shape replaces them
    tree["model"] = {**missing, "init_from": folder}
    config = build(OmegaConf.create(tree))
    if config.vae.channels == _TI2V_CHANNELS:
        flow = replace(config.flow, sampling_aspect=(704, 1280))
        config = replace(config, flow=flow, data=replace(config.data, **_WAN_TI2V))  # type: ignore[arg-type]
    return config
