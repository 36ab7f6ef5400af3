"""Loading of trained weights, from a run's checkpoint or an export, for a sampler or another run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sora_train.config.registry import FAMILIES, METHODS
from sora_train.config.released import is_released
from sora_train.config.schema import Config
from sora_train.core.cli import InputError
from sora_train.data.read.encoded import weights_hash
from sora_train.encoding.vae import FrozenVae
from sora_train.generation.sampler import Sampler
from sora_train.methods.base import Network, trained
from sora_train.models.video_model import build_video_model, whole_weights
from sora_train.models.wan.original import is_original
from sora_train.training.state.checkpoint_format import latest_intact, load_full, networks_of, verify

EXPORTED = "model.safetensors"  # what `export` writes a video model's weights to


@dataclass(frozen=True)
class Weights:
    """Choice of the weights of a run or a folder to sample with, and their precision."""

    checkpoint: int | None = None  # its step; None: the newest intact one
    raw: bool = False  # the trained weights themselves instead of their moving average
    bf16: bool = False
    adapters: tuple[tuple[str, float], ...] = ()  # files of adapters, each with the weight it is added with


AVERAGED = Weights()


def trained_weights(run_dir: str | Path, network: str | None = None, weights: Weights = AVERAGED) -> dict[str, Tensor]:
    """Weights by parameter of a network (the main one) in a run's checkpoint: averages, or live ones with `raw`."""
    return load_full(checkpoint_of(run_dir, weights.checkpoint), "master" if weights.raw else "ema", network)


def checkpoint_of(run_dir: str | Path, step: int | None) -> Path:
    """The newest intact checkpoint of a run, or that of a step. Raises InputError if it is missing or incomplete."""
    folder = Path(run_dir) / "checkpoints"
    if step is None:
        return latest_intact(folder)
    path = folder / f"step-{step:08d}"
    if not path.is_dir():
        there = ", ".join(str(int(p.name.removeprefix("step-"))) for p in sorted(folder.glob("step-*"))) or "none"
        raise InputError(f"{run_dir} has no checkpoint={step}; it has {there}")
    if fault := verify(path):
        raise InputError(f"checkpoint={step} of {run_dir} is damaged ({fault}); choose another step")
    return path


def named_weights(run_dir: str | Path) -> str:
    """A name of the weights that `load_sampler` takes by itself: the newest checkpoint's, or an export's hash."""
    if (Path(run_dir) / EXPORTED).is_file():
        return f"export-{weights_hash(Path(run_dir))}"
    return checkpoint_of(run_dir, None).name


def load_sampler(config: Config, run_dir: str | Path, device: torch.device, weights: Weights = AVERAGED) -> Sampler:
    """A sampler of a run, of an export, or of released weights.

    Raises InputError for a run that isn't a video model's, and for weights that aren't there.
    """
    if not METHODS.get(config.method).makes_videos:
        raise InputError(f"{run_dir} holds a {config.method} run; samples come from a video model (experiment=demo)")
    family, exported = FAMILIES.get(config.model.family), Path(run_dir) / EXPORTED
    network = build_video_model(config)
    if is_released(run_dir) or is_original(run_dir):
        family.load(network.dit, str(run_dir))
    elif exported.is_file():
        _load_exported(network, exported)
    else:
        network.load_state_dict(whole_weights(config, trained_weights(run_dir, weights=weights)))
    for path, factor in weights.adapters:
        family.add_adapter_file(network.dit, path, factor)
    network.to(device, torch.bfloat16 if weights.bf16 else torch.float32).eval().requires_grad_(False)
    return Sampler(config, network, FrozenVae.load(config.vae, device), device)


def _load_exported(network: nn.Module, path: Path) -> None:
    try:
        network.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise InputError(f"{path} doesn't hold this model: {' '.join(str(error).split())[:200]}") from error


def load_starting_weights(networks: Mapping[str, Network], source: str) -> None:
    """Copy the averaged weights of a run folder, or the weights of an export, into trained networks.

    Networks of a run are matched by name; an export contains the main network. Parameter names and shapes must agree;
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
    for file in (EXPORTED, "vae.safetensors"):
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
