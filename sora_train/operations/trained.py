"""Loading of trained weights, from a run's checkpoint or an export, for a sampler or another run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sora_train.config.registry import METHODS
from sora_train.config.schema import Config
from sora_train.core.cli import InputError
from sora_train.encoding.vae import FrozenVae
from sora_train.generation.sampler import Sampler
from sora_train.methods.base import Network, trained
from sora_train.models.video_model import build_video_model, whole_weights
from sora_train.training.state.checkpoint import latest_intact, load_full, networks_of


def trained_weights(run_dir: str | Path, network: str | None = None) -> dict[str, Tensor]:
    """Load the averaged weights of a network (default: the main one) from a run's newest intact checkpoint."""
    return load_full(latest_intact(Path(run_dir) / "checkpoints"), "ema", network)


def load_sampler(config: Config, run_dir: str | Path, device: torch.device) -> Sampler:
    """Build a sampler with a run's averaged weights. Raises InputError if the run trained no video model."""
    if not METHODS.get(config.method).makes_videos:
        raise InputError(f"{run_dir} holds a {config.method} run; samples come from a video model (experiment=demo)")
    network = build_video_model(config)
    network.load_state_dict(whole_weights(config, trained_weights(run_dir)))
    network.to(device).eval().requires_grad_(False)
    return Sampler(config, network, FrozenVae.load(config.vae, device), device)


def load_starting_weights(networks: Mapping[str, Network], source: str) -> None:
    """Copy the averaged weights of a run folder, or the weights of an export, into trained networks.

    Networks of a run are matched by name; an export holds the main network. Parameter names and shapes must agree;
    data and resolution may differ.

    Raises:
        InputError: `source` is neither, or parameters are missing, superfluous or of another shape.
    """
    names = [name for name, _ in trained(networks)]
    for name, weights in _weights_by_network(Path(source), names).items():
        _copy(weights, networks[name].module, f"init_from={source}, network {name}")


def _weights_by_network(source: Path, names: list[str]) -> dict[str, dict[str, Tensor]]:
    if (source / "checkpoints").is_dir():
        newest = latest_intact(source / "checkpoints")
        there = [name for name in networks_of(newest) if name in names]
        if not there:
            raise InputError(f"init_from={source} trained {networks_of(newest)}, this run trains {names}")
        return {name: load_full(newest, "ema", name) for name in there}
    for file in ("model.safetensors", "vae.safetensors"):
        if (source / file).is_file():
            return {names[0]: load_file(source / file)}
    raise InputError(
        f"init_from={source} is neither a run folder nor an export (no checkpoints/, no model.safetensors); "
        "released weights go to model.init_from"
    )


def _copy(weights: Mapping[str, Tensor], module: nn.Module, what: str) -> None:
    own = {name: p for name, p in module.state_dict().items() if name in dict(module.named_parameters())}
    missing, surplus = sorted(own.keys() - weights.keys()), sorted(weights.keys() - module.state_dict().keys())
    shapes = [f"{name} {tuple(weights[name].shape)}" for name in own.keys() & weights.keys()
              if own[name].shape != weights[name].shape]  # fmt: skip
    for says, found in (("misses", missing), ("has a surplus of", surplus), ("has other shapes:", sorted(shapes))):
        if found:
            raise InputError(f"{what} {says} {len(found)} tensor(s): {', '.join(found[:3])}")
    module.load_state_dict(dict(weights), strict=False)
