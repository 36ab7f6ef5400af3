"""Allowed ranges of the configuration's numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from sora_train.config.schema import Config
from sora_train.core.cli import InputError
from sora_train.core.options import MAX_SEED

_ABOVE_0 = (
    "steps", "epochs", "threads",
    "vae.tile.frames", "vae.tile.pixels", "vae.channels", "vae.patch", "vae.widths", "vae.strides",
    "text_encoder.width", "text_encoder.depth", "text_encoder.heads", "text_encoder.max_tokens",
    "data.slots", "data.max_frames", "data.max_pixels", "data.max_tokens", "data.pack_slots", "data.window",
    "data.workers", "data.prefetch_steps", "data.decode_timeout_s", "data.decode_memory_gib",
    "data.limits.pixels", "data.limits.frames", "data.limits.bytes", "data.cache.gib",
    "flow.std", "flow.shift", "flow.sampling_steps", "flow.sampling_aspect", "optim.lr", "optim.eps", "optim.clip",
    "parallel.accumulation", "parallel.sequence", "checkpoint.every_steps", "checkpoint.keep",
    "checkpoint.snapshot_every", "checkpoint.snapshots", "guard.max_bad_steps", "guard.spike_steps",
    "guard.spike_window", "guard.timeout_s", "guard.slow_timeout_s", "logging.every_steps", "logging.evaluate_clips",
    "logging.wandb_finish_s",
    "logging.peak_tflops",
)  # fmt: skip
_AT_LEAST_0 = (
    "data.decoded_mib", "vae.cache_mib", "vae.tile.overlap", "vae.perceptual.weight", "vae.blocks", "vae.mse_weight",
    "vae.kl_weight",
    "text_encoder.pad_to", "flow.shift_tokens", "flow.guidance", "optim.text_lr_scale", "optim.rates",
    "optim.weight_decay", "optim.base_width", "optim.muon.weight_decay", "optim.warmup_steps", "checkpoint.keep_every",
    "guard.spike",
    "guard.leave_out_before", "guard.max_rollbacks", "guard.hash_every", "guard.max_futile_restarts",
    "logging.evaluate_every",
    "logging.validate_every", "logging.validation_clips", "logging.sample_every", "logging.sample_clips",
)  # fmt: skip
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    **dict.fromkeys(_ABOVE_0, ("must be above 0", lambda value: value > 0)),
    **dict.fromkeys(_AT_LEAST_0, ("must not be below 0", lambda value: value >= 0)),
    **dict.fromkeys(
        ("flow.caption_dropout", "flow.per_frame_noise", "flow.guidance_rescale", "optim.decay_fraction",
         "optim.end_rate"),
        ("must be in [0, 1]", lambda value: 0 <= value <= 1),
    ),
    **dict.fromkeys(("optim.betas", "optim.ema_decay"), ("must be in [0, 1)", lambda value: 0 <= value < 1)),
    **dict.fromkeys(("data.fill", "data.max_bad_fraction"), ("must be in (0, 1]", lambda value: 0 < value <= 1)),
    "flow.mean": ("must be a number", lambda value: True),
    "text_encoder.buckets": ("must be above 1", lambda value: value > 1),
    "logging.prometheus_port": ("must be a port, 0 to 65535", lambda value: 0 <= value <= 65535),
    "seed": (f"must be 0 to {MAX_SEED}", lambda value: 0 <= value <= MAX_SEED),
}  # fmt: skip


def check_ranges(config: Config) -> None:
    """Check every number, also those in lists and maps. Null values are skipped. Raises InputError."""
    for key, (wanted, is_within) in _RANGES.items():
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        for number in _numbers(value):
            if not math.isfinite(number) or not is_within(number):
                raise InputError(f"{key}={value} {wanted}")
    for name, source in config.data.sources.items():
        if not (math.isfinite(source.repeat) and source.repeat >= 0):
            raise InputError(f"data.sources.{name}.repeat={source.repeat} must not be below 0")


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [number for item in value for number in _numbers(item)]
    return [] if value is None else [value]
