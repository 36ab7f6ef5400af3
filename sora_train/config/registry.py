"""Registries of training methods, model families and augmentations, by the name that the configuration uses.

Built-in entries are import paths (`module:NAME`) and are imported on first use. A plugin is a module listed in the key
`plugins`; when it is imported, it calls `register` of one of them. The contracts are in `methods/base.py`,
`models/base.py` and `data/augment.py`. Imports neither torch nor deepspeed.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from sora_train.core.cli import InputError, nearest


class Registry:
    """Objects by name; `key` is the configuration key that names one, for error messages."""

    def __init__(self, key: str, built_in: Mapping[str, str]) -> None:
        self.key = key
        self._entries: dict[str, Any] = dict(built_in)

    def register(self, name: str, entry: Any) -> None:
        """Add an object, or the import path of one (`module:NAME`). Replaces an entry of the same name."""
        self._entries[name] = entry

    def get(self, name: str) -> Any:
        """Look an object up, and import it if its entry is an import path.

        Raises:
            InputError: The name is unknown; the message suggests the nearest.
        """
        if name not in self._entries:
            raise InputError(f"{self.key}={name}; {nearest(name, list(self._entries))}")
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = self._entries[name] = getattr(importlib.import_module(module), attribute)
        return entry

    def names(self) -> list[str]:
        """All names in order of registration."""
        return list(self._entries)


METHODS = Registry(
    "method",
    {
        "diffusion": "sora_train.methods.diffusion.method:DIFFUSION",
        "autoencoder": "sora_train.methods.autoencoder.method:AUTOENCODER",
    },
)


AUGMENTATIONS = Registry("data.augment", {"mirror": "sora_train.data.augment:mirror"})


FAMILIES = Registry("model.family", {"wan": "sora_train.models.wan.family:WAN"})


def load_plugins(modules: Sequence[str]) -> None:
    """Import modules that register methods, families or augmentations.

    Raises:
        InputError: A module can't be imported.
    """
    for name in modules:
        try:
            importlib.import_module(name)
        except (ImportError, SyntaxError) as error:
            raise InputError(f"plugins: {name} can't be imported ({error}); is its folder on PYTHONPATH?") from error
