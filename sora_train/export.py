"""Write a trained network as safetensors or as a diffusers pipeline, to be used or published.

    python -m sora_train.export run_dir=runs/demo_vae out=runs/demo_vae/export format=safetensors
    python -m sora_train.export run_dir=runs/wan out=runs/wan/export format=diffusers

A VAE run becomes `vae.safetensors` and `config.json`, its latents' mean and deviation measured on training clips; a
video model becomes `model.safetensors`, `config.yaml` and a copy of its VAE under `vae/`. In the form of diffusers a
video model becomes `transformer/` (`WanTransformer3DModel`), from which `model.init_from` can start another run. If
it was trained with a released VAE and text encoder, these are copied beside it, and `WanPipeline.from_pretrained`
loads the folder. `format=original` is the transformer in the names of Wan's own repository, which ComfyUI and
`model.init_from` read too. Weights are averaged (EMA); with `ema_length=0.07` the average has that relative length, and
is computed from the run's snapshots (`optim.ema_lengths`).

    python -m sora_train.export run_dir=runs/lora out=runs/lora/export format=adapter

For a run of adapters (`model.lora`), these formats contain the frozen weights with the adapters merged into them.
`format=adapter` writes the adapters alone: `pytorch_lora_weights.safetensors`, which `WanPipeline.load_lora_weights`
reads, or with `layout=original` in the names of Wan's own repository, for ComfyUI and others. `dtype=bf16` halves the
files, `shard_gib=5` splits a diffusers transformer, and `base=FOLDER` is the new path of released weights if moved.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file

from sora_train.config.load import load, to_yaml
from sora_train.config.registry import FAMILIES, METHODS
from sora_train.config.released import folder_of
from sora_train.config.schema import TOKENIZER, VAE_USE, Config, LoraConfig, Prediction
from sora_train.core.cli import InputError, run
from sora_train.core.options import choice, number, options
from sora_train.core.outputs import usable
from sora_train.core.pixels import to_unit
from sora_train.data.loader import Loader
from sora_train.data.order.plan import Position
from sora_train.data.read.pool import Pool
from sora_train.data.shards import Shards
from sora_train.encoding.vae import trained_vae
from sora_train.models.video_model import transformer_weights, whole_weights
from sora_train.models.video_vae.model import VideoVAE, build_vae
from sora_train.operations.inputs import check_inputs
from sora_train.operations.pipeline_files import copy_part, save_pipeline
from sora_train.operations.trained import EXPORTED, trained_weights
from sora_train.training.engine.power_ema import combined

_CLIPS_MEASURED = 512
_VISITS_MEASURED = 4  # visits of each sample to measure, if there are few samples


@dataclass
class Options:
    """Command-line options."""

    run_dir: str
    out: str
    format: str = choice(("safetensors", "diffusers", "original", "adapter"), "safetensors")
    ema_length: float | None = number(None, above=0, below=1)
    layout: str = choice(("diffusers", "original"), "diffusers")  # names in a file of adapters
    dtype: str = choice(("fp32", "bf16", "fp16"), "fp32")
    shard_gib: float = number(10.0, above=0)  # size of a weights file of a diffusers folder
    base: str | None = None  # new path of the released weights that the run was trained from, if they were moved


def main() -> int:
    """Export the newest checkpoint of a run."""
    o = options(Options, __doc__)
    config, out = load(o.run_dir, base=o.base), Path(o.out)
    check_inputs(config, o.run_dir, ", or say where they are: base=FOLDER")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[o.dtype]
    if o.format != "safetensors":
        _check_for_diffusers(config, o)
    weights = trained_weights(o.run_dir) if o.ema_length is None else _of_length(Path(o.run_dir), o.ema_length)
    with usable(out, "out"):
        out.mkdir(parents=True, exist_ok=True)
        _write(o, config, weights, dtype, out)
    print(f"wrote {', '.join(sorted(path.name for path in out.iterdir()))} to {out}")
    return 0


def _write(o: Options, config: Config, weights: dict[str, torch.Tensor], dtype: torch.dtype, out: Path) -> None:
    """Write the weights in the format that the options select."""
    if not METHODS.get(config.method).makes_videos:
        frozen = config.vae.frozen_encoder  # then the checkpoint holds the decoder alone, and the latents are the same
        vae = trained_vae(config.vae) if frozen else build_vae(config.vae)
        vae.load_state_dict(weights, strict=False)  # the statistics are not parameters
        if not frozen:
            _measure(vae, config)
        save_file(vae.state_dict(), out / "vae.safetensors")
        shape = {key: value for key, value in asdict(config.vae).items() if key not in VAE_USE}
        (out / "config.json").write_text(json.dumps(shape, indent=1) + "\n")
    elif o.format == "adapter":
        FAMILIES.get(config.model.family).save_adapters(transformer_weights(weights), config.model, out, o.layout)
    elif o.format == "original":
        whole, family = _cast(whole_weights(config, weights), dtype), FAMILIES.get(config.model.family)
        width = config.text_encoder.width
        family.save(transformer_weights(whole), config.model, width, out, o.shard_gib, layout="original")
    elif o.format == "diffusers":
        _pipeline(_cast(whole_weights(config, weights), dtype), config, out, o.shard_gib)
    else:
        save_file(_cast(whole_weights(config, weights), dtype), out / EXPORTED)
        merged = replace(config, model=replace(config.model, lora=LoraConfig()))
        (out / "config.yaml").write_text(to_yaml(merged))
        if config.tokenizer_file is not None:
            shutil.copy2(config.tokenizer_file, out / TOKENIZER)
        assert config.vae.path is not None
        copy_part(folder_of(config.vae.path, "vae"), out / "vae")


def _of_length(run_dir: Path, length: float) -> dict[str, torch.Tensor]:
    """Compute the weights averaged over any length, from snapshots."""
    weights, step, error = combined(run_dir, length)
    print(f"the average of length {length:g} at step {step}; its weighting is met to {error:.2%}")
    return weights


def _check_for_diffusers(config: Config, o: Options) -> None:
    """Raise InputError if diffusers has no format for the run."""
    if not METHODS.get(config.method).makes_videos:
        raise InputError(f"format={o.format} writes video models; diffusers knows no VAE of ours")
    if config.flow.prediction is not Prediction.velocity:
        raise InputError(f"diffusers reads velocities, and this run has flow.prediction={config.flow.prediction.value}")
    if o.format == "adapter" and config.model.lora.rank == 0:
        raise InputError(f"{o.run_dir} trained no adapters (model.lora.rank=0); format=diffusers or safetensors")
    if o.format == "adapter" and config.model.init_from is None:
        raise InputError(
            "the adapters of this run belong to weights made from its seed (no model.init_from), which nobody else "
            "has; format=diffusers or safetensors writes both together"
        )


def _cast(weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: values.to(dtype) for name, values in weights.items()}


def _pipeline(weights: dict[str, torch.Tensor], config: Config, out: Path, shard_gib: float) -> None:
    """Write the transformer in diffusers' format, as a `WanPipeline` if VAE and text encoder are released ones."""
    family = FAMILIES.get(config.model.family)
    family.save(transformer_weights(weights), config.model, config.text_encoder.width, out / "transformer", shard_gib)
    if config.vae.class_name is None or config.text_encoder.path is None:
        print("a WanPipeline also needs a released VAE and text encoder; this run has its own, so only transformer/")
        return
    save_pipeline(config, out)


@torch.no_grad()
def _measure(vae: VideoVAE, config: Config) -> None:
    """Set the mean and standard deviation of the VAE's latents per channel, measured on training clips."""
    plan = Shards(config).plan(config)
    wanted = min(_CLIPS_MEASURED, _VISITS_MEASURED * int(plan.index.usable.sum()))
    latents: list[torch.Tensor] = []
    with Pool.of(config.data) as pool:
        everything = [list(range(plan.inputs.slots))]
        for step in islice(Loader(plan, pool, everything, Position(), prefetch_steps=4), wanted):
            for clip in step.packs[0].clips:
                mean, _ = vae.encode(to_unit(clip.video_TCHW.transpose(0, 1)).unsqueeze(0))
                latents.append(mean[0].flatten(1))
            if len(latents) >= wanted:
                break
    if not latents:
        raise InputError("no clip of the training shards could be read to measure the latents with")
    values = torch.cat(latents, dim=1)
    std = values.std(1)
    vae.latents_mean.copy_(values.mean(1))
    vae.latents_std.copy_(std.clamp(min=0.1 * std.max()))  # limit the amplification of channels that hardly vary


if __name__ == "__main__":
    run(main)
