"""Forward passes of both methods on a device that isn't the host: an operation that mixes the two fails.

    python -m tests.methods.one_device

No GPU is needed: all tensors are torch's fake ones, which have a shape and a device and no data, and the device is a
stand-in that torch lets Python register. So kernels, the backward pass and whatever asks for a CUDA device by name go
unseen. A process of its own, because the device stays registered.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from hydra import compose, initialize_config_dir
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from sora_train.config.hydra import CONF
from sora_train.config.load import build
from sora_train.core.batch import Pack
from sora_train.encoding.captions import planned_tokenizer
from sora_train.encoding.vae import FrozenVae
from sora_train.forecast.trace import _fresh_caches, clip_of
from sora_train.methods.autoencoder.learner import AutoencoderLearner
from sora_train.methods.base import precision_of
from sora_train.methods.diffusion.learner import _learner
from sora_train.models.video_model import planned_model
from sora_train.models.video_vae.model import build_vae

CASES = (
    ["experiment=demo", "precision=fp32"],
    ["experiment=demo", "precision=bf16", "model.activation=relu2"],
    ["experiment=demo_vae", "precision=fp32"],
)
SIZES = ((17, 48, 96), (9, 48, 48), (1, 96, 48), (9, 48, 48))


def moved(module: Any, device: torch.device) -> Any:
    """The module with parameters and buffers on another device; fake ones can't be moved by `to`."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    there = torch.empty_like(tensor.detach(), device=device)
                    tensors[name] = nn.Parameter(there, requires_grad=False) if tensors is part._parameters else there
    return module


def loss_of(*overrides: str, device: torch.device) -> torch.Tensor:
    """Loss of a pack of four clips: the VAE's encoder, captions, noise, the transformer, the objective; or the VAE."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = build(compose("train", overrides=["run_dir=x", *overrides]), need_vae=False)
    with _fresh_caches(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        pack = Pack([clip_of(number, size) for number, size in enumerate(SIZES)])
        vae = moved(build_vae(config.vae), device)
        if config.method == "autoencoder":
            return AutoencoderLearner(config, vae, None, device).loss(vae, pack).sum
        with precision_of(config):
            network = moved(planned_model(config), device)
        frozen = FrozenVae(config.vae, vae, device)
        return (
            _learner(config, network, frozen, planned_tokenizer(config, device), cache_bytes=0).loss(network, pack).sum
        )


def main() -> None:
    """Print the device of each loss."""
    _setup_privateuseone_for_python_backend("gpu")
    device = torch.device("gpu", 0)
    # memory can't be pinned for a stand-in, and small constants would be made on it for real
    with (
        patch.object(torch.Tensor, "pin_memory", lambda x, *_: x),
        patch.object(FakeTensorMode, "may_turn_const", lambda *_: False),
    ):
        for overrides in CASES:
            print(*overrides, "on", loss_of(*overrides, device=device).device)


if __name__ == "__main__":
    main()
