"""Small files of settings, read with an error of one line that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from sora_train.core.cli import InputError


def read_yaml(path: Path, advice: str = "") -> DictConfig:
    """Read a YAML file of keys and values.

    Raises InputError, with `advice` at its end, for a file that is unreadable, not UTF-8, damaged, empty, or no map.
    """
    try:
        tree = OmegaConf.load(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} can't be read: {reason(error)}{advice}") from error
    if not isinstance(tree, DictConfig) or not tree:
        raise InputError(f"{path} must hold keys with values, such as steps: 100{advice}")
    return tree


def read_json(path: Path, advice: str = "") -> dict[str, Any]:
    """Read a JSON file that holds a map. Raises InputError as `read_yaml` does."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read: {reason(error)}{advice}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} must hold a map of keys, not {str(found)[:40]!r}{advice}")
    return found


def reason(error: Exception) -> str:
    """What is wrong with a file, in one line; with the line of the file for YAML."""
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark):
        return f"line {mark.line + 1}: {error.problem or error.context}"
    return " ".join(str(error).split())
