"""Checks of the configuration's values: names, and keys that constrain each other; `ranges.py` has the ranges.

Imports neither torch nor deepspeed, so that a mistake is reported within a second and before any process group.
"""

from __future__ import annotations

import re
from typing import Any

from sora_train.config.deepspeed_keys import DEEPSPEED, ZERO
from sora_train.config.ranges import check_ranges
from sora_train.config.registry import AUGMENTATIONS, METHODS
from sora_train.config.schema import (
    DECODERS,
    DERIVED,
    NATIVE,
    SCHEDULES,
    TOKENIZERS,
    WRITERS,
    Config,
    DataConfig,
    TextEncoderConfig,
    VaeConfig,
)
from sora_train.core.cli import InputError, nearest

_FEWEST = 257  # smallest size of a subword vocabulary: all bytes, and the start token of a caption


def check(config: Config) -> None:
    """Check all rules, those of the method last. Raises InputError for the first that is broken."""
    vae, data = config.vae, config.data
    check_ranges(config)
    require(bool(data.sources), "data.sources is empty; name shards, e.g. +data.sources.mine.shards=[my/*.tar]")
    _check_text(config.text_encoder)
    _check_mirror(config.checkpoint.mirror)
    _check_muon(config)
    _check_evaluation(config)
    optim = config.optim
    require(len(optim.betas) == 2, f"optim.betas={list(optim.betas)} must be two numbers, e.g. [0.9, 0.99]")
    require(optim.schedule in SCHEDULES, f"optim.schedule={optim.schedule}; {nearest(optim.schedule, list(SCHEDULES))}")
    lengths = optim.ema_lengths
    require(all(0.0 < length < 0.28 for length in lengths) and len(set(lengths)) == len(lengths),
             f"optim.ema_lengths={lengths} must be different numbers in (0, 0.28), e.g. [0.05, 0.1]")  # fmt: skip
    require(config.epochs is None or not data.stages,
             f"epochs={config.epochs}: a curriculum (data.stages) has its length in steps; set steps")  # fmt: skip
    _check_vae(vae)
    unknown = [name for name in config.logging.writers if name not in WRITERS]
    require(not unknown, f"logging.writers has no {unknown}; known: {', '.join(WRITERS)}")
    profiled = config.logging.profile_steps
    require(not profiled or (len(profiled) == 2 and 0 < profiled[0] <= profiled[1]),
             f"logging.profile_steps={profiled} must be first and last step to trace, e.g. [20, 24]")  # fmt: skip
    _check_data(data)
    _check_deepspeed(config.deepspeed)
    _check_mixing(data)
    _check_packs(config)
    if data.augment:
        AUGMENTATIONS.get(data.augment)
        require(vae.cache_mib == 0, f"vae.cache_mib={vae.cache_mib} keeps the latents of each clip, which "
                f"data.augment={data.augment} makes anew for every visit; set vae.cache_mib=0")  # fmt: skip
    method = METHODS.get(config.method)
    for key in config.method_options:
        known = f"known: {', '.join(method.options)}" if method.options else "it has none"
        require(key in method.options, f"method={config.method} reads no method_options.{key}; {known}")
    method.rules(config)


def _check_vae(vae: VaeConfig) -> None:
    require(vae.class_name is not None or len(vae.widths) == len(vae.blocks) == len(vae.strides) + 1,
             "vae.widths and vae.blocks need one entry per level, vae.strides one less")  # fmt: skip
    weight, files = vae.perceptual.weight, vae.perceptual.files
    require(weight == 0 or bool(files),
             "vae.perceptual.weight needs VGG16 weights; give vae.perceptual.files=[vgg16.pth], or 0")  # fmt: skip


def _check_mirror(mirror: str | None) -> None:
    if mirror is None:
        return
    found = re.fullmatch(r"([a-z][a-z0-9+.-]*)://([^/]*)(/?.*)", mirror)
    require(
        found is not None and bool(found[2] + found[3].strip("/")),
        f"checkpoint.mirror={mirror} must be a URL such as s3://bucket/runs/x or file:///mnt/backup/x, or null",
    )
    assert found is not None
    require(found[1] not in ("http", "https"), f"checkpoint.mirror={mirror}: nothing can be written to http")
    require(":" not in found[2].rpartition("@")[0],
             "checkpoint.mirror holds a password; give it by the environment or data.storage")  # fmt: skip


def _check_text(text: TextEncoderConfig) -> None:
    require(text.path is not None or text.width % text.heads == 0,
             f"text_encoder.width={text.width} must be a multiple of its heads")  # fmt: skip
    require(text.tokenizer in TOKENIZERS,
             f"text_encoder.tokenizer={text.tokenizer}; {nearest(text.tokenizer, list(TOKENIZERS))}")  # fmt: skip
    require(
        text.tokenizer != "bpe" or text.buckets >= _FEWEST,
        f"text_encoder.buckets={text.buckets} must be at least {_FEWEST} with tokenizer=bpe: each byte is a token",
    )
    require(text.tokenizer_path is None or text.tokenizer == "bpe",
             "text_encoder.tokenizer_path is for text_encoder.tokenizer=bpe; set that, or leave it out")  # fmt: skip
    require(
        text.path is not None or text.pad_to == 0,
        "text_encoder.pad_to is for a released encoder: set text_encoder.path too, or text_encoder.pad_to=0",
    )
    require(
        text.pad_to == 0 or text.pad_to >= text.max_tokens,
        f"text_encoder.pad_to={text.pad_to} must be 0 or at least text_encoder.max_tokens={text.max_tokens}",
    )


def _check_rate(key: str, rate: float | str) -> None:
    if rate != NATIVE:
        require(not isinstance(rate, str), f"{key}={rate}: give frames a second, or {NATIVE} for each video's own")
        require(float(rate) > 0, f"{key}={rate} must be above 0")


def _check_data(data: DataConfig) -> None:
    _check_rate("data.fps", data.fps)
    unknown = [name for name in data.decoders if name not in DECODERS]
    require(not unknown, f"data.decoders has no {unknown[:1]}; {nearest(str((unknown or [''])[0]), list(DECODERS))}")
    require(bool(data.decoders) and len(set(data.decoders)) == len(data.decoders),
             f"data.decoders={data.decoders}: name at least one, and each once")  # fmt: skip
    strange = [name for name in data.commands if not re.fullmatch(r"[\w./+-]+", name)]
    require(not strange, f"data.commands={strange[:1]} must be names of programs, without arguments, e.g. [rclone]")
    wrong = [kind for kind, options in data.storage.items() if not isinstance(options, dict)]
    require(not wrong, f"data.storage.{(wrong or [''])[0]} must be a map of options, e.g. +data.storage.s3.anon=true")


def _check_deepspeed(options: dict[str, Any]) -> None:
    for key, ours in DERIVED.items():
        require(key not in options, f"deepspeed.{key} follows from {ours}; set that instead")
    for key, value in options.items():
        require(key in DEEPSPEED, f"DeepSpeed knows no deepspeed.{key}; {nearest(key, list(DEEPSPEED))}")
        require(value is not None, f"deepspeed.{key} is null; take it out with ~deepspeed.{key}, or give its value")
    zero = options.get("zero_optimization", {})
    require(isinstance(zero, dict), f"deepspeed.zero_optimization={zero} must be a map, e.g. {{stage: 2}}")
    for key in zero:
        require(key in ZERO, f"DeepSpeed knows no deepspeed.zero_optimization.{key}; {nearest(key, list(ZERO))}")
    stage = zero.get("stage", 0)
    require(
        stage in (0, 1, 2, 3) and not isinstance(stage, bool),
        f"deepspeed.zero_optimization.stage={stage}; known: 0, 1, 2, 3",
    )
    require(
        not zero.get("round_robin_gradients"),
        "deepspeed.zero_optimization.round_robin_gradients breaks the fragment mapping; turn it off",
    )


def _check_mixing(data: DataConfig) -> None:
    weights = {name: source.weight for name, source in data.sources.items() if source.weight is not None}
    require(not weights or len(weights) == len(data.sources),
             f"data.sources: {sorted(weights)} have a weight and others none; give it to all or none")  # fmt: skip
    require(not weights or all(data.sources[name].repeat == 1.0 for name in weights),
             "data.sources: a source has a weight or a repeat, not both")  # fmt: skip
    named = [("data.captions", data.captions)] if data.captions else []
    named += [("data.sources.*.weight", weights)] if weights else []
    last = 0
    for number, stage in enumerate(data.stages):
        key = f"data.stages[{number}]"
        named += [(f"{key}.weights", stage.weights)] if stage.weights else []
        unknown = sorted(set(stage.weights) - set(data.sources))
        require(not unknown, f"{key}.weights: there is no source {unknown[:1]}; "
                              + (nearest(unknown[0], list(data.sources)) if unknown else ""))  # fmt: skip
        is_last = number == len(data.stages) - 1
        require((stage.until_step is None) == is_last,
                 f"{key}.until_step={stage.until_step}: the last stage alone has none (null)")  # fmt: skip
        require(is_last or (stage.until_step or 0) > last,
                 f"{key}.until_step={stage.until_step} must be above {last}, where the stage begins")  # fmt: skip
        last = stage.until_step or last
        if stage.fps is not None:
            _check_rate(f"{key}.fps", stage.fps)
        for name in ("max_frames", "max_pixels"):
            value = getattr(stage, name)
            require(value is None or value > 0, f"{key}.{name}={value} must be above 0")
    for key, values in named:
        require(min(values.values()) >= 0 and sum(values.values()) > 0,
                 f"{key}: no weight may be below 0, and one must be above")  # fmt: skip


def _check_packs(config: Config) -> None:
    most, slots, parallel = config.data.pack_slots, config.data.slots, config.parallel
    if most == 1:
        return
    name = f"data.pack_slots={most}"
    require(most & (most - 1) == 0, f"{name} must be a power of two: 1, 2, 4, 8, ...")
    require(most <= slots, f"{name}: a step has only data.slots={slots}; lower it to {1 << slots.bit_length() - 1}")
    require(
        parallel.sequence == 1,
        f"{name} has the plan say how many ranks share a pack, parallel.sequence={parallel.sequence} has all packs "
        "shared by as many; set one of them to 1",
    )
    require(
        parallel.accumulation is None,
        f"{name} needs a forward pass per slot, since packs that run together must have the same ranks; leave "
        f"parallel.accumulation={parallel.accumulation} out",
    )
    require(
        METHODS.get(config.method).splits_sequence, f"{name}: method={config.method} has no sequence to share; set 1"
    )


def _check_evaluation(config: Config) -> None:
    every, best = config.logging.evaluate_every, config.checkpoint.best
    require(best is None or every > 0, f"checkpoint.best={best} needs evaluations; set logging.evaluate_every")
    require(every == 0 or bool(config.logging.metrics), "logging.evaluate_every needs logging.metrics, e.g. [quick]")


def require(condition: bool, message: str) -> None:
    """Raise InputError with `message` unless the condition holds."""
    if not condition:
        raise InputError(message)


def _check_muon(config: Config) -> None:
    optim = config.optim
    known = ["adamw", "muon"]
    require(optim.matrices in known, f"optim.matrices={optim.matrices}; {nearest(optim.matrices, known)}")
    if optim.matrices == "adamw":
        return
    require(optim.muon.lr > 0, f"optim.muon.lr={optim.muon.lr} must be above 0")
    require(0.0 <= optim.muon.momentum < 1.0, f"optim.muon.momentum={optim.muon.momentum} must be in [0, 1)")
    offload = (config.deepspeed.get("zero_optimization") or {}).get("offload_optimizer", {})
    require(
        offload.get("device", "none") in ("none", "cpu"),
        "optim.matrices=muon needs the optimizer's state in memory; take offload_optimizer.device=nvme out",
    )
