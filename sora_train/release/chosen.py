"""The safeguards that options choose: those of a release folder, or none where there is no folder."""

from __future__ import annotations

from sora_train.core.cli import InputError
from sora_train.generation.safeguards import NO_SAFEGUARDS, Safeguards
from sora_train.release.folder import find


def safeguards_for(
    named: str | None, *, sign: bool = True, mark: bool = True, guard: bool = True, closed: bool = False
) -> Safeguards:
    """The safeguards of `release=FOLDER|off` or of the default folder, without those that are switched off.

    With `closed` a guard that doesn't answer refuses, whatever the settings say. Raises InputError where the folder or
    a library is missing.
    """
    folder = find(named)
    if folder is None:
        return NO_SAFEGUARDS
    try:
        from sora_train.release.safeguards import Released  # c2pa is an extra
    except ImportError as error:
        raise InputError(
            f"{folder.path} asks for {error.name}: pip install 'sora_train[release]', or release=off"
        ) from error
    if closed:
        folder.settings.guard_fails = "closed"
    return Released(folder, sign=sign, mark=mark, guard=guard)
