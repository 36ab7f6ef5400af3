"""Write a trained network as safetensors, to be used or published.

    python -m sora_train.export run_dir=runs/demo_vae out=runs/demo_vae/export format=safetensors

A VAE run becomes `vae.safetensors` and `config.json`, its latents' mean and deviation measured on training clips; a
video model becomes `model.safetensors`, `config.yaml` and a copy of its VAE under `vae/`. Averaged (EMA) weights.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from omegaconf import MISSING
from safetensors.torch import save_file

from sora_train.assemble import Shards
from sora_train.cli import InputError, options, run
from sora_train.config import Config, Method, load
from sora_train.data.loader import Loader
from sora_train.data.plan import Position
from sora_train.data.pool import Pool
from sora_train.data.transforms import to_unit
from sora_train.generation import build_vae, trained_weights
from sora_train.models.vae import VideoVAE

_CLIPS_MEASURED = 512


@dataclass
class Options:
    """Command-line options."""

    run_dir: str = MISSING
    out: str = MISSING
    format: str = "safetensors"


def main() -> int:
    """Export the newest checkpoint of a run."""
    o = options(Options, __doc__)
    if o.format != "safetensors":
        raise InputError(f"format={o.format!r}; known: safetensors")
    config, out = load(o.run_dir), Path(o.out)
    out.mkdir(parents=True, exist_ok=True)
    weights = trained_weights(o.run_dir)
    if config.method is Method.autoencoder:
        vae = build_vae(config.vae)
        vae.load_state_dict(weights, strict=False)  # the statistics are not parameters
        _measure(vae, config)
        save_file(vae.state_dict(), out / "vae.safetensors")
        shape = {key: value for key, value in asdict(config.vae).items() if key not in ("path", "cache_mib")}
        (out / "config.json").write_text(json.dumps(shape, indent=1) + "\n")
    else:
        save_file(weights, out / "model.safetensors")
        shutil.copy(Path(o.run_dir) / "config.yaml", out / "config.yaml")
        assert config.vae.path is not None
        if (out / "vae").resolve() != Path(config.vae.path).resolve():
            shutil.copytree(config.vae.path, out / "vae", dirs_exist_ok=True)
    print(f"wrote {', '.join(sorted(path.name for path in out.iterdir()))} to {out}")
    return 0


@torch.no_grad()
def _measure(vae: VideoVAE, config: Config) -> None:
    """Set the mean and deviation of the latents, per channel, over training clips."""
    plan = Shards(config).plan(config)
    latents: list[torch.Tensor] = []
    with Pool.of(config.data) as pool:
        everything = [list(range(plan.inputs.slots))]
        for step in islice(Loader(plan, pool, everything, Position(), prefetch_steps=4), _CLIPS_MEASURED):
            for clip in step.packs[0].clips:
                mean, _ = vae.encode(to_unit(clip.video_TCHW.transpose(0, 1)).unsqueeze(0))
                latents.append(mean[0].flatten(1))
            if len(latents) >= _CLIPS_MEASURED:
                break
    if not latents:
        raise InputError("no clip of the training shards could be read to measure the latents with")
    values = torch.cat(latents, dim=1)
    vae.latents_mean.copy_(values.mean(1))
    vae.latents_std.copy_(values.std(1))


if __name__ == "__main__":
    run(main)
