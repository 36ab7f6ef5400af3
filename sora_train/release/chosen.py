"""Choice of the safeguards by the options: those of a release folder, or none if there is no folder."""

from __future__ import annotations

from sora_train.core.cli import InputError
from sora_train.generation.safeguards import NO_SAFEGUARDS, Safeguards
from sora_train.release.folder import find


def safeguards_for(
    named: str | None, *, sign: bool = True, mark: bool = True, guard: bool = True, closed: bool = False
) -> Safeguards:
    """Load the safeguards of a release folder.

    Args:
        named: Value of `release=`: a folder, `off`, or None for the default folder.
        sign: Sign, if the settings do.
        mark: Embed marks, if the settings do.
        guard: Check prompts and frames, if the settings do.
        closed: Treat a guard that doesn't answer as a refusal, whatever the settings say.

    Returns:
        The safeguards; NO_SAFEGUARDS with `off`, or if no folder is named and the default one doesn't exist.

    Raises:
        InputError: The named folder or a library is missing.
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
