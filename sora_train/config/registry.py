"""Methods and model families by name: the built-in ones, and those that a plugin registers.

An entry of ours is the place of an object (`module:NAME`) and is imported when it is first asked for. A plugin is a
module named by the key `plugins`; importing it calls `METHODS.register` or `FAMILIES.register`. The contracts are in
`methods/base.py` and `models/base.py`. Imports neither torch nor deepspeed.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from sora_train.core.cli import InputError, nearest


class Registry:
    """Objects by the name that a configuration key gives."""

    def __init__(self, key: str, built_in: Mapping[str, str]) -> None:
        self.key = key
        self._entries: dict[str, Any] = dict(built_in)

    def register(self, name: str, entry: Any) -> None:
        """Add an object, or the place of one (`module:NAME`); a name registered before is replaced."""
        self._entries[name] = entry

    def get(self, name: str) -> Any:
        """The object of this name.

        Raises:
            InputError: for an unknown name; it says the nearest.
        """
        if name not in self._entries:
            raise InputError(f"{self.key}={name}; {nearest(name, list(self._entries))}")
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = self._entries[name] = getattr(importlib.import_module(module), attribute)
        return entry

    def names(self) -> list[str]:
        """All names, in the order in which they were added."""
        return list(self._entries)


METHODS = Registry(
    "method",
    {
        "diffusion": "sora_train.methods.diffusion.method:DIFFUSION",
        "autoencoder": "sora_train.methods.autoencoder.method:AUTOENCODER",
    },
)


FAMILIES = Registry("model.family", {"wan": "sora_train.models.wan.family:WAN"})


def load_plugins(modules: Sequence[str]) -> None:
    """Import modules that register methods or families.

    Raises:
        InputError: where one can't be imported.
    """
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise InputError(f"plugins: {name} can't be imported ({error}); is its folder on PYTHONPATH?") from error
