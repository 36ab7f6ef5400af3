"""Checks at the start of a run: changes since the last start, useless restarts, and agreement of all ranks.

`changes` and `count_restart` need no torch and run before any process group.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from collections import Counter
from pathlib import Path

from omegaconf import OmegaConf

from sora_train.config.files import read_yaml
from sora_train.config.load import to_dict
from sora_train.config.registry import METHODS
from sora_train.config.schema import Config
from sora_train.core.cli import InputError
from sora_train.core.world import World
from sora_train.operations.records import flat

_UNCOMPARED = "; delete it to resume without comparing the configuration with that of the last start"
_PACKAGES = ("torch", "deepspeed", "numpy", "safetensors", "decord", "av", "webdataset", "hydra-core", "omegaconf")
_VARIABLES = ("NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NCCL_PROTO", "WORLD_SIZE")
_OWN = ("run_dir", "guard.accept_changes")  # keys that aren't compared
_FREE = ("model.activation_checkpointing", "vae.cache_mib")  # keys of fixed sections that don't affect the weights


def changes(config: Config) -> list[str]:
    """Changes of the configuration since the last start in this folder, a line each; empty for a new run.

    Raises InputError if a key that the method declares as fixed changed, unless guard.accept_changes is set.
    """
    run_dir = Path(config.run_dir)
    if not (run_dir / "config.yaml").is_file() or not any((run_dir / "checkpoints").glob("step-*")):
        return []
    old = flat(OmegaConf.to_container(read_yaml(run_dir / "config.yaml", _UNCOMPARED)))
    new = flat(to_dict(config))
    own = (*_OWN, "steps") if config.epochs is not None else _OWN  # then steps aren't known yet
    keys = [key for key in sorted(old.keys() & new.keys()) if old[key] != new[key] and key not in own]
    differing = {key: f"{key}: {old[key]} -> {new[key]}" for key in keys}
    fixed = METHODS.get(config.method).fixed
    dangerous = [key for key in keys if key.split(".")[0] in fixed and key not in _FREE]
    if dangerous and not config.guard.accept_changes:
        raise InputError(
            f"the checkpoints in {run_dir} were trained with another {'; '.join(differing[key] for key in dangerous)}; "
            "take the change back, choose another run_dir, or set guard.accept_changes=true"
        )
    return list(differing.values())


def done_already(config: Config) -> bool:
    """Tell whether a run has a checkpoint of its last step (or a later one), so that nothing is left to train."""
    steps = [path.name.removeprefix("step-") for path in (Path(config.run_dir) / "checkpoints").glob("step-*")]
    return any(step.isdigit() and int(step) >= config.steps for step in steps)


def count_restart(config: Config, world: World) -> None:
    """Count consecutive automatic restarts without a new checkpoint. Raises InputError if there are too many.

    A manual start resets the count. Called by the main rank.
    """
    run_dir, limit = Path(config.run_dir), config.guard.max_futile_restarts
    path = run_dir / "starts.json"
    newest = max((p.name for p in (run_dir / "checkpoints").glob("step-*")), default="none")
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):
        before = {}
    futile = before.get("futile", 0) + 1 if world.restarts and before.get("newest") == newest else 0
    path.write_text(json.dumps({"newest": newest, "futile": futile}) + "\n")
    if futile > limit:
        raise InputError(
            f"{limit} restarts in a row brought no new checkpoint after {newest!r} (guard.max_futile_restarts); "
            f"see {run_dir}/logs, mend the cause, and start it by hand"
        )


def surroundings() -> dict[str, str]:
    """Facts that must be the same on all ranks of any run, by name: versions, this package's code, variables."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[f"package {name}"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[f"package {name}"] = "not installed"
    return {
        "python": platform.python_version(),
        **packages,
        "code": code_hash(),
        **{f"variable {name}": os.environ.get(name, "") for name in _VARIABLES},
    }


def facts(config: Config, device: str, fingerprint: str) -> dict[str, str]:
    """Everything that must be the same on all ranks, by name; `fingerprint` identifies the data set's index."""
    return {
        **surroundings(),
        "device": device,
        "data set index": fingerprint,
        **{f"key {key}": str(value) for key, value in flat(to_dict(config)).items()},
    }


def require_agreement(mine: dict[str, str]) -> None:
    """Compare the facts of all ranks. Collective; raises InputError on all ranks if one differs."""
    import torch.distributed as dist

    ranks = dist.get_world_size()
    if ranks == 1:
        return
    digests: list[str] = [""] * ranks
    dist.all_gather_object(digests, hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    everyone: list[dict[str, str]] = [{}] * ranks
    dist.all_gather_object(everyone, mine)
    raise InputError("the ranks don't agree: " + "; ".join(differences(everyone)[:5]))


def differences(everyone: list[dict[str, str]]) -> list[str]:
    """Differences of ranks from the majority, a line each."""
    lines = []
    for name in sorted(set().union(*everyone)):
        values = [facts.get(name, "absent") for facts in everyone]
        usual = Counter(values).most_common(1)[0][0]
        odd = [(rank, value) for rank, value in enumerate(values) if value != usual]
        lines += [f"rank {rank} has {name} = {value!r}, others {usual!r}" for rank, value in odd]
    return lines


def code_hash() -> str:
    """SHA-256 over the source files of sora_train, 16 hex digits."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
