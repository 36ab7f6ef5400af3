"""The method `diffusion`: rectified flow on the latents of a frozen VAE."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sora_train.config.cost import shapes
from sora_train.config.registry import FAMILIES
from sora_train.config.released import adapter_file
from sora_train.config.rules import require
from sora_train.config.schema import SOLVERS, TASKS, Config, DataConfig, FlowConfig
from sora_train.core.cli import nearest
from sora_train.core.cost import AdapterCost, Cost, Geometry

if TYPE_CHECKING:
    import torch

    from sora_train.methods.base import Learner


class Diffusion:
    """Trains the transformer of the section `model`, and our own text encoder unless a released one is configured.

    See `methods.base.Method`.
    """

    fixed = ("method", "model", "vae", "text_encoder")
    options: tuple[str, ...] = ()
    highest_stage = 3
    splits_sequence = recomputes = reads_latents = reads_captions = makes_videos = True

    def rules(self, config: Config) -> None:
        """Check the sections `model` and `flow`, and the adapters."""
        model = config.model
        for name in ("width", "depth", "heads", "ffn", "patch"):
            require(getattr(model, name) > 0, f"model.{name}={getattr(model, name)} must be above 0")
        require(
            model.width % model.heads == 0 and model.width // model.heads % 2 == 0,
            f"model.width={model.width} must be an even multiple of model.heads={model.heads}",
        )
        require(
            not config.vae.frozen_encoder, "vae.frozen_encoder is for method=autoencoder; here the VAE is frozen anyway"
        )
        require(
            config.vae.path is not None, "vae.path is not set; train a VAE (experiment=demo_vae) and export it first"
        )
        for name, chosen, known in (
            ("activation_checkpointing", model.activation_checkpointing, ("none", "block", "selective")),
            ("attention", model.attention, ("auto", "sdpa", "varlen", "flex")),
        ):
            require(chosen in known, f"model.{name}={chosen}; {nearest(chosen, list(known))}")
        require(model.mlp_chunk >= 0, f"model.mlp_chunk={model.mlp_chunk} tokens; must be 0 (all at once) or more")
        require(
            not (model.mlp_chunk and model.compile),
            "model.mlp_chunk and model.compile: a block would be compiled anew for each number of chunks; "
            "set one of them to 0 or false",
        )
        base, head = config.optim.base_width, model.width // model.heads
        require(
            base % head == 0,
            f"optim.base_width={base} must be a multiple of the size of a head, model.width / model.heads={head}",
        )
        require(
            not (base and model.lora.rank),
            f"optim.base_width={base} transfers the learning rates of whole matrices; set it to 0 to train adapters",
        )
        FAMILIES.get(model.family).rules(config)
        _check_flow(config.flow, config.data)
        _check_adapters(config)

    def geometry(self, config: Config) -> Geometry:
        """Geometry in which a token is a patch of latents."""
        return Geometry(config.vae.temporal_stride, config.vae.spatial_stride, config.model.patch)

    def cost(self, config: Config) -> Cost:
        """Forward FLOPs of the transformer, adapters excluded."""
        return FAMILIES.get(config.model.family).cost(config.model, shapes(config))

    def training_cost(self, config: Config) -> Cost | AdapterCost:
        """FLOPs of training all weights, or adapters alone with `model.lora`."""
        if config.model.lora.rank:
            return FAMILIES.get(config.model.family).adapter_cost(config.model, shapes(config))
        return self.cost(config)

    def learner(self, config: Config, device: torch.device) -> Learner:
        """Build the learner of a run."""
        from sora_train.methods.diffusion.learner import start

        return start(config, device)

    def planned(self, config: Config) -> Learner:
        """Build the learner for a forecast."""
        from sora_train.methods.diffusion.learner import planned

        return planned(config)


def _check_adapters(config: Config) -> None:
    lora = config.model.lora
    require(lora.rank >= 0, f"model.lora.rank={lora.rank} must not be below 0")
    start = lora.init_from
    require(
        start is None or lora.rank > 0, f"model.lora.init_from={start} needs model.lora.rank, of the file or higher"
    )
    require(start is None or adapter_file(start).is_file(), f"model.lora.init_from={start}: there is no such file")
    if lora.rank == 0:
        return
    known = FAMILIES.get(config.model.family).adapter_targets
    require(lora.alpha > 0, f"model.lora.alpha={lora.alpha} must be above 0")
    require(bool(lora.targets), f"model.lora.targets is empty; known: {', '.join(known)}")
    for name in lora.targets:
        require(name in known, f"model.lora.targets has no layer [{name!r}]; {nearest(name, list(known))}")
    require(
        config.model.init_from is None or config.text_encoder.path is not None,
        "model.lora trains adapters of the transformer alone, and our own text encoder would stay at random beside "
        "model.init_from; set text_encoder.path to the encoder that those weights were trained with",
    )


def _check_flow(flow: FlowConfig, data: DataConfig) -> None:
    staged = {f"data.stages[{n}].tasks": stage.tasks for n, stage in enumerate(data.stages) if stage.tasks}
    for key, tasks in {"flow.tasks": flow.tasks, **staged}.items():
        unknown = [task for task in tasks if task not in TASKS]
        require(not unknown, f"{key} has no {unknown[:1]}; {nearest(unknown[0], list(TASKS)) if unknown else ''}")
        require(
            min(tasks.values(), default=0) >= 0 and sum(tasks.values()) > 0,
            f"{key}: no weight may be below 0, and one must be above",
        )
    require(flow.solver in SOLVERS, f"flow.solver={flow.solver!r}; {nearest(flow.solver, list(SOLVERS))}")
    interval = list(flow.guidance_interval)
    require(
        len(interval) == 2 and 0.0 <= interval[0] <= interval[-1] <= 1.0,
        f"flow.guidance_interval={interval} must be two timesteps, the lower one first",
    )


DIFFUSION = Diffusion()
