"""Build the typed configuration from a composed tree or a run folder, and write it with secrets masked."""

from __future__ import annotations

import re
from dataclasses import is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from sora_train.config.files import read_json, read_yaml
from sora_train.config.registry import FAMILIES, load_plugins
from sora_train.config.released import original_config, text_width, vae_shape
from sora_train.config.rules import check, require
from sora_train.config.schema import TOKENIZER, VAE_USE, Config, VaeConfig
from sora_train.core.cli import InputError, nearest

_SECRET = re.compile(r"(?i)(api_?key|secret|password|access_?token|credential|^key$|^token$|account_?key)")


def build(tree: DictConfig, need_vae: bool = True) -> Config:
    """Build and check the typed configuration of a composed tree.

    If `vae.path` names a VAE, its shape replaces the tree's values of the `vae` section.

    Args:
        tree: Values of all keys; keys that are missing get the schema's defaults.
        need_vae: Raise if there is no VAE at `vae.path`, or no released model at another path. If False, the shapes in
            the tree are used instead.

    Raises:
        InputError: One line about the first mistake.
    """
    try:
        if tree.get("epochs") is not None:
            # placeholder until the shards are indexed and `with_length` computes the steps
            tree = DictConfig(OmegaConf.merge(tree, {"steps": 1}))
        merged = OmegaConf.merge(schema_of(tree), OmegaConf.create(OmegaConf.to_container(tree)))
        assert isinstance(merged, DictConfig)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise InputError(f"{missing[0]} has no value; give {missing[0]}=... or choose an experiment=...")
        config = OmegaConf.to_object(merged)
    except (ConfigKeyError, ValidationError, OmegaConfBaseException) as error:
        raise InputError(_explain(error)) from error
    assert isinstance(config, Config)
    checkpointing = config.model.activation_checkpointing
    config.model.activation_checkpointing = {"False": "none", "True": "block"}.get(checkpointing, checkpointing)
    _take_released_shapes(config, need_vae)
    if config.vae.path is not None and config.vae.class_name is None:
        shape = Path(config.vae.path) / "config.json"
        if shape.is_file():
            config.vae = VaeConfig(**read_json(shape) | {name: getattr(config.vae, name) for name in VAE_USE})
        elif need_vae:
            raise InputError(
                f"no VAE at vae.path={config.vae.path}; train one (experiment=demo_vae) and export it there"
            )
    check(config)
    return config


def schema_of(tree: DictConfig) -> DictConfig:
    """Schema with defaults for a tree; `model` has the keys of the tree's model family. Loads the tree's plugins.

    The result is cached and shared by all callers, which must not modify it.
    """
    load_plugins(tree.get("plugins") or [])
    model = tree.get("model") or {}
    return _schema_with(FAMILIES.get(model.get("family") or "wan").settings)


@cache
def _schema_with(model: type) -> DictConfig:
    schema = OmegaConf.structured(Config)
    schema.model = OmegaConf.structured(model)
    assert isinstance(schema, DictConfig)
    return schema


def _take_released_shapes(config: Config, needed: bool) -> None:
    """Replace shapes in the configuration by those of the released models it names, and check that they match.

    A missing folder raises InputError if `needed`; otherwise the shape in the configuration is kept.
    """
    missing = [] if needed else absent(config)
    if config.vae.path is not None:
        for key, value in (vae_shape(config.vae.path) or {}).items():
            setattr(config.vae, key, value)
    text = config.text_encoder
    if text.path is not None and "text_encoder.path" not in missing:
        text.width = text_width(text.path)
    if config.model.init_from is None or "model.init_from" in missing:
        return
    shape = FAMILIES.get(config.model.family).released_shape(config.model.init_from)
    channels, width = shape.pop("channels"), shape.pop("text_width")
    for key, value in shape.items():
        setattr(config.model, key, value)
    require(
        channels == config.vae.channels,
        f"model.init_from has {channels} latent channels, the VAE {config.vae.channels}; set vae.path to its VAE",
    )
    require(
        width == text.width,
        f"model.init_from reads text {width} wide, the text encoder gives {text.width}; set text_encoder.path",
    )


_PATHS = ("vae.path", "text_encoder.path", "model.init_from")


def absent(config: Config) -> list[str]:
    """Keys with the path of a trained or released model (`_PATHS`) that doesn't exist."""
    paths = dict(zip(_PATHS, (config.vae.path, config.text_encoder.path, config.model.init_from), strict=True))
    return [key for key, path in paths.items() if path is not None and not Path(path).exists()]


def load(run_dir: str | Path, vae: str | None = None, base: str | None = None) -> Config:
    """Read the configuration of a run or of an export from its folder.

    Args:
        run_dir: Folder of the run or export.
        vae: New path of its VAE, if it has been moved.
        base: New path of the folder `model.init_from`, if it has been moved; used for VAE and text encoder too, if
            they have the same path.

    Raises:
        InputError: The folder contains no run, or the configuration is wrong.
    """
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        if original_config(run_dir) is not None:
            raise InputError(
                f"{run_dir} is a transformer alone, in the layout of Wan's own repository: train from it "
                "(model.init_from), or sample from the same release in the layout of diffusers (-Diffusers)"
            )
        raise InputError(f"{run_dir} holds no run (there is no {path}); check run_dir")
    tree = read_yaml(path)
    if base is not None:
        moved = OmegaConf.select(tree, "model.init_from")
        if moved is None:
            raise InputError(f"base={base}: {run_dir} was not trained from released weights (model.init_from)")
        for key in (key for key in _PATHS if OmegaConf.select(tree, key) == moved):
            OmegaConf.update(tree, key, base)
    for key in _PATHS:
        if (value := OmegaConf.select(tree, key)) is not None:
            OmegaConf.update(tree, key, _where(str(value), Path(run_dir)))
    start = OmegaConf.select(tree, "model.init_from")
    if start is not None and not OmegaConf.select(tree, "model.lora.rank") and not Path(start).exists():
        OmegaConf.update(
            tree, "model.init_from", None
        )  # not needed: without adapters all its weights were trained, and are in the checkpoints
    if (path.parent / "vae").is_dir():  # an export, which is self-contained
        OmegaConf.update(tree, "vae.path", str(path.parent / "vae"))
        OmegaConf.update(tree, "model.init_from", None)
    if vae is not None:
        OmegaConf.update(tree, "vae.path", vae)
    if OmegaConf.select(tree, "text_encoder.tokenizer") == "bpe":
        OmegaConf.update(tree, "text_encoder.tokenizer_path", str(path.parent / TOKENIZER))
    return build(tree)


def _where(path: str, run_dir: Path) -> str:
    """Resolve a path of a run's configuration: as it is if it exists, else relative to the nearest folder above."""
    if Path(path).is_absolute() or Path(path).exists():
        return path
    above = (folder / path for folder in run_dir.resolve().parents)
    return str(next((place for place in above if place.exists()), path))


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, secrets masked."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain values; values of keys that look like secrets are masked."""
    return {key: _plain(key, value) for key, value in vars(config).items()}


def _plain(key: object, value: Any) -> Any:
    if value and _SECRET.search(str(key)):
        return "***"
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {k: _plain(k, v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain("", v) for v in value]
    return value.name if isinstance(value, Enum) else value


def known_keys(tree: Any = None, prefix: str = "") -> list[str]:
    """Every dotted key of the configuration."""
    tree = schema_of(OmegaConf.create()) if tree is None else tree
    keys: list[str] = []
    for key in tree:
        keys.append(prefix + str(key))
        if not OmegaConf.is_missing(tree, key) and isinstance(tree[key], DictConfig):
            keys += known_keys(tree[key], f"{prefix}{key}.")
    return keys


def _explain(error: Exception) -> str:
    """Reduce an OmegaConf error to one line: the full key and the mistake, or the nearest key if it is unknown."""
    key = str(getattr(error, "full_key", "") or "")
    if isinstance(error, ConfigKeyError):
        return f"there is no key {key!r}; {nearest(key, known_keys())}"
    return f"{key}: {str(error).splitlines()[0]}"
