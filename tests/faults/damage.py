"""Damage to checkpoints on the disk, of twelve kinds: the older one must be loaded, and nothing executed."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sora_train.training.state.checkpoint_format import latest_intact
from sora_train.training.state.files import digest_of, sha256, write_json
from tests.faults.bed import Bed, Job, differences, outcome
from tests.faults.trials import stage_for, tail

DAMAGES = (
    "flip", "truncate", "delete", "empty", "swapped", "stale", "manifest flip", "no manifest", "pointer to nothing",
    "half deleted", "pickle", "pickle with manifest",
)  # fmt: skip


def loader(source: Path, target: Path, rng: random.Random, kind: str) -> str | None:
    """Damage the newest of two checkpoints of two ranks; the loader must choose the older one."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    older = damage(target, rng, kind)
    chosen = latest_intact(target)
    if (target / "executed").exists():
        return f"{kind}: the payload ran"
    return None if chosen == older else f"{kind}: {chosen.name} was chosen"


def start(bed: Bed, name: str, reference: str, rng: random.Random, kind: str, wanted: dict[str, Any]) -> str | None:
    """Damage the last checkpoint of a run that has ended, and start it: it must go on from the one before, say what is
    wrong with the newest, and end to the bit where it had ended."""
    shutil.copytree(bed.run_dir(reference), bed.run_dir(name), dirs_exist_ok=True)
    folder = bed.run_dir(name) / "checkpoints"
    newest = max(folder.glob("step-*")).name
    older = damage(folder, rng, kind)
    config = bed.config(name, *stage_for(2))
    job = Job(config, 2)
    if code := job.wait():
        return f"{kind}: ended with {code}: {tail(config)}"
    if (folder / "executed").exists():
        return f"{kind}: the payload ran"
    text = job.log.read_text()
    told = kind == "pointer to nothing" or f"checkpoint {newest} is damaged" in text  # no folder, nothing to tell
    if f"resumed {older.name}" not in text or not told:
        return f"{kind}: not resumed from {older.name}: {tail(config)}"
    differing = differences(wanted, outcome(bed.run_dir(name)))
    return f"{kind}: differs in {', '.join(differing)}" if differing else None


def damage(folder: Path, rng: random.Random, kind: str) -> Path:
    """Damage the newest of the checkpoints in a folder; returns the one before it."""
    older, newest = sorted(folder.glob("step-*"))[-2:]
    files = sorted(p for p in newest.iterdir() if p.name != "manifest.json")
    victim = rng.choice(files)
    payload = pickle.dumps(_Payload(folder / "executed"))
    if kind in ("flip", "manifest flip"):
        victim = newest / "manifest.json" if kind == "manifest flip" else victim
        data = bytearray(victim.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        victim.write_bytes(data)
    elif kind == "truncate":
        victim.write_bytes(victim.read_bytes()[: rng.randrange(victim.stat().st_size)])
    elif kind == "delete":
        victim.unlink()
    elif kind == "empty":
        victim.write_bytes(b"")
    elif kind == "swapped":
        a, b = newest / "rank-0.safetensors", newest / "rank-1.safetensors"
        data = a.read_bytes()
        a.write_bytes(b.read_bytes())
        b.write_bytes(data)
    elif kind == "stale":
        shutil.copy(older / "rank-1.safetensors", newest)
    elif kind == "no manifest":
        (newest / "manifest.json").unlink()
    elif kind == "pointer to nothing":
        shutil.rmtree(newest)
        rng.choice(_POINTERS)(newest)
    elif kind == "half deleted":
        for file in rng.sample(files, 2):
            file.unlink()
    else:
        _plant(newest, payload, with_manifest=kind == "pickle with manifest")
    return older


# What may stand where the newest checkpoint is looked for, beside a folder with something wrong in it. There is no file
# that points to the newest one; what other programs leave as such (`latest`) must not be looked at.
_POINTERS: tuple[Callable[[Path], object], ...] = (
    lambda newest: newest.symlink_to(newest.parent / "gone"),
    lambda newest: newest.symlink_to(newest),
    lambda newest: newest.write_bytes(b""),
    lambda newest: newest.mkdir(),
    lambda newest: (newest.parent / "latest").write_text("step-99999999"),
    lambda newest: (newest.parent / "latest").symlink_to(newest.parent / "step-99999999"),
)


def _plant(newest: Path, payload: bytes, with_manifest: bool) -> None:
    """Put a pickle in the place of a rank's tensors; with a manifest that somebody made who knows how."""
    victim = newest / "rank-0.safetensors"
    victim.write_bytes(payload)
    if with_manifest:
        manifest = json.loads((newest / "manifest.json").read_text())
        del manifest["sha256"]
        manifest["files"][victim.name] |= {"size": len(payload), "sha256": sha256(victim)}
        write_json(newest / "manifest.json", manifest | {"sha256": digest_of(manifest)})


class _Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)
