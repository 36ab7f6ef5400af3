"""Plugins that a command line names. They register config choices, so they load before Hydra composes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from omegaconf import OmegaConf

from sora_train.config.files import read_yaml
from sora_train.core.cli import InputError

_CONFIG_DIR = ("--config-dir", "-cd")  # Hydra's flags of a further folder of configuration files


def named_plugins(arguments: Sequence[str], conf: Path) -> list[str]:
    """Modules of the `plugins` key on the command line, or else of the files of the chosen experiments.

    `load.build` loads those of any other file, whose families are then unknown to Hydra.

    Args:
        arguments: The command line.
        conf: The project's folder of configuration files.

    Raises:
        InputError: An experiment's file can't be read, or its `plugins` are no list.
    """
    given = [argument.partition("=")[::2] for argument in arguments]
    if listed := [value for key, value in given if key == "plugins"]:
        return [name for value in listed for name in _items(value)]
    folders = [conf, *(Path(folder) for flag, folder in pairwise(arguments) if flag in _CONFIG_DIR)]
    chosen = [name for key, value in given if key.lstrip("+") == "experiment" for name in _items(value)]
    files = [folder / "experiment" / f"{name}.yaml" for folder in folders for name in chosen]
    return [name for file in files if file.is_file() for name in _plugins_of(file)]


def _items(value: str) -> list[str]:
    return [name.strip() for name in value.strip("[]").split(",") if name.strip()]


def _plugins_of(file: Path) -> list[str]:
    plugins = OmegaConf.to_container(read_yaml(file)).get("plugins") or []  # type: ignore[union-attr]
    if not isinstance(plugins, list):
        raise InputError(f"{file}: plugins: {plugins} must be a list, e.g. [{plugins}]")
    return [str(name) for name in plugins]
