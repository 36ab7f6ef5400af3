"""Checkpoints that load at any number of ranks and any ZeRO stage: safetensors by parameter name, and JSON.

    checkpoints/step-00001000/
        rank-0.safetensors ...   tensors of a rank: `KIND/NETWORK/PARAMETER`, KIND = master, exp_avg, ema, ...
        state.json               step, position, counters, shapes
        manifest.json            size and SHA-256 of every file and of itself, offset of every tensor; written last

A checkpoint is written in the background from a copy, into a temporary folder that is renamed when it is complete.
Tensors in host memory are copied in the background too: they don't change before the next optimizer step, which waits
for the copy (`settle`). A folder is valid only if its manifest exists and all checksums agree. The newest that is valid
on every rank is loaded; there is no file that points to it, and nothing is unpickled. Longer than most files, because
writing and reading share the format.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sora_train.core.cli import InputError
from sora_train.training.engine.zero import Fragment
from sora_train.training.state.files import (
    VERSION,
    Damage,
    check_file,
    digest_of,
    read_manifest,
    remove_folder,
    sha256,
    surplus,
    sync_folder,
    write_json,
)
from sora_train.training.state.mirror import Mirror

_SPARE = 16 << 20  # bytes that must stay free in addition to a checkpoint: for JSON, logs and other writers
_log = logging.getLogger(__name__)

Pieces = dict[str, tuple[int, Tensor]]  # by KIND/NETWORK/PARAMETER: offset in the flattened parameter, values


def pieces(
    fragments: Sequence[Fragment],
    ema: Mapping[str, Tensor],
    split: tuple[int, int] | None,
    more: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Pieces:
    """Tensors that this rank saves: master weights, optimizer state and averages.

    Args:
        fragments: This rank's fragments.
        ema: Averages by fragment name.
        split: See `shares`.
        more: Further averages, by kind and fragment name.
    """
    own: dict[str, dict[str, Tensor]] = {"master": {f.name: f.master for f in fragments}}
    for f in fragments:
        for kind, values in f.states.items():
            own.setdefault(kind, {})[f.name] = values
    return shares(fragments, {**own, "ema": ema, **(more or {})}, split)


def shares(
    fragments: Sequence[Fragment], kinds: Mapping[str, Mapping[str, Tensor]], split: tuple[int, int] | None
) -> Pieces:
    """Collect tensors by `KIND/NETWORK/PARAMETER`.

    `split` = (rank, ranks) takes this rank's equal share of each, for stage 0, where every rank holds all of them.
    """
    mine: Pieces = {}
    for f in fragments:
        for kind, tensors in kinds.items():
            if f.name not in tensors:  # the network has no average
                continue
            values = tensors[f.name]
            start, stop = 0, values.numel()
            if split is not None:
                start, stop = (stop * split[0] // split[1], stop * (split[0] + 1) // split[1])
            if stop > start:
                mine[f"{kind}/{f.name}"] = (f.start + start, values[start:stop])
    return mine


class Checkpoints:
    """The checkpoint folder of a run. All methods are collective."""

    def __init__(self, folder: Path, keep: int, keep_every: int = 0, mirror: Mirror | None = None) -> None:
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self.mirror = mirror  # on the main rank, if configured
        self.best: str | None = None  # name of the best checkpoint, which is kept
        self.failed = 0  # number of saves that could not be written
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        # the writer thread has a group of its own, as collectives of two threads must not mix; None after a failure
        self._group: Any = dist.new_group(backend="gloo")
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._staging: dict[str, Tensor] = {}  # copies of the last save, overwritten by the next
        self._copied = threading.Event()  # set when the save under way no longer needs the live tensors
        self._copied.set()
        if self.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".tmp-*"):  # left by a save that was killed
                shutil.rmtree(leftover)
        dist.barrier()

    def save(self, step: int, mine: Pieces, state: dict[str, Any]) -> None:
        """Copy and write in the background. `mine` must not change before `settle` returns.

        Waits for the previous save. A save that fails is logged and counted, and training goes on.
        """
        self.wait()
        if any(values.is_cuda for _, values in mine.values()):
            mine = self._stage(mine)  # in this thread, to be ordered after the work queued on the device
            torch.cuda.synchronize()
        else:
            self._copied.clear()
        self._thread = threading.Thread(target=self._write, args=(step, mine, state), name="checkpoint", daemon=True)
        self._thread.start()

    def keep_best(self, step: int | None) -> None:
        """Keep the checkpoint of a step until another one is the best; None: keep none."""
        self.best = None if step is None else f"step-{step:08d}"
        if self.mirror:
            self.mirror.best = self.best

    def settle(self) -> None:
        """Wait until the save under way has copied its tensors, after which they may change."""
        self._copied.wait()

    def wait(self, limit_s: float | None = None) -> bool:
        """Wait for the save under way, at most `limit_s` seconds. Returns True if it succeeded."""
        if self._thread is not None:
            self._thread.join(limit_s)
            if self._thread.is_alive():
                return False
            self._thread = None
        failure, self._failure = self._failure, None
        return failure is None

    def newest(self, before: int | None = None) -> Path | None:
        """Find the newest checkpoint, of a step below `before`, that is intact on every rank; None without any.

        Raises InputError if there are checkpoints but all are damaged.
        """
        found = [p for p in _folders(self.folder) if before is None or p.name < f"step-{before:08d}"]
        for path in reversed(found):
            damage = verify(path, self.rank, self.ranks)
            intact = torch.tensor([damage is None], dtype=torch.int32)
            dist.all_reduce(intact, op=dist.ReduceOp.MIN, group=self._group)
            if intact.item():
                return path
            _log.error(
                "checkpoint %s is damaged (%s); trying an older one", path.name, damage or "found by another rank"
            )
        if found:
            raise InputError(
                f"every checkpoint in {self.folder} is damaged; restore one, or move the folder away to start anew"
            )
        return None

    def discard_after(self, step: int) -> None:
        """Delete the checkpoints of steps after `step`, for a rollback."""
        if self.rank == 0:
            for path in _folders(self.folder):
                if path.name > f"step-{step:08d}":
                    remove_folder(path)
            if self.mirror:
                self.mirror.discard_after(self.folder, step)
        dist.barrier(group=self._group)

    def _stage(self, mine: Pieces) -> Pieces:
        """Copy tensors to host memory (page-locked if from a GPU). The buffers are reused by the next save."""
        staged: Pieces = {}
        for key, (start, values) in mine.items():
            kept = self._staging.get(key)
            if kept is None or kept.shape != values.shape or kept.dtype != values.dtype:
                kept = self._staging[key] = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            staged[key] = start, kept.copy_(values.detach(), non_blocking=True)
        return staged

    def _write(self, step: int, mine: Pieces, state: dict[str, Any]) -> None:
        """Body of the writer thread. A save that isn't published counts as failed."""
        try:
            self._write_together(step, mine, state)
        except Exception as error:  # a collective failed: another rank is gone, and the loop will soon fail too
            self._fail(step, f"rank {self.rank}: {error}")
            group, self._group = self._group, None
            if group is not None:  # so that writers of other ranks, which may wait for this one, fail too
                dist.destroy_process_group(group)

    def _write_together(self, step: int, mine: Pieces, state: dict[str, Any]) -> None:
        temporary = self.folder / f".tmp-step-{step:08d}"
        record: dict[str, Any] = {}
        if self._group is None:
            self._copied.set()
            raise OSError("another rank is gone")
        try:
            try:
                staged = mine if self._copied.is_set() else self._stage(mine)
            finally:
                self._copied.set()
                self._check_space(mine)  # collective, so it must run even if the copy failed on this rank
            temporary.mkdir(parents=True, exist_ok=True)
            record = _write_pieces(temporary / f"rank-{self.rank}.safetensors", staged)
        except Exception as error:  # reported to all ranks by the collective below, which would hang without this rank
            record = {"error": f"rank {self.rank}: {error}"}
        records: list[dict[str, Any]] = [{}] * self.ranks
        dist.all_gather_object(records, record, group=self._group)
        errors = [r["error"] for r in records if "error" in r]
        if not errors and self.rank == 0:
            try:
                self._publish(temporary, step, records, state)
            except Exception as error:  # reported to all ranks below
                errors = [f"rank 0: {error}"]
        outcome = [errors]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[0]:
            self._fail(step, "; ".join(outcome[0]))
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)

    def _fail(self, step: int, reason: str) -> None:
        self._failure, self.failed = OSError(reason), self.failed + 1
        _log.error(
            "checkpoint of step %d not written: %s; training goes on, older checkpoints are untouched", step, reason
        )

    def require_room(self, mine: Pieces) -> None:
        """Check at the start that a checkpoint fits on the disk. Raises InputError on all ranks if not."""
        try:
            self._check_space(mine)
            lacking = ""
        except OSError as error:
            lacking = str(error)
        everyone = [""] * self.ranks
        dist.all_gather_object(everyone, lacking, group=self._group)
        if any(everyone):
            lacking = max(everyone, key=len)
            raise InputError(f"no room for a checkpoint: {lacking}; make room, or choose another run_dir")

    def _check_space(self, mine: Pieces) -> None:
        """Raise OSError if the checkpoint of all ranks doesn't fit on the disk. Collective."""
        total = torch.tensor([sum(values.nbytes for _, values in mine.values())], dtype=torch.int64)
        dist.all_reduce(total, group=self._group)
        needed, free = int(total.item()) + _SPARE, shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(f"{free / 2**30:.2f} GiB free in {self.folder}, {needed / 2**30:.2f} GiB needed")

    def _publish(self, temporary: Path, step: int, records: list[dict[str, Any]], state: dict[str, Any]) -> None:
        files = {record["file"]: record for record in records}
        files["state.json"] = write_json(temporary / "state.json", state)
        manifest: dict[str, Any] = {"version": VERSION, "step": step, "files": files}
        write_json(temporary / "manifest.json", manifest | {"sha256": digest_of(manifest)})
        sync_folder(temporary)
        final = self.folder / f"step-{step:08d}"
        if os.path.lexists(final):  # it is damaged, or the run would have resumed from it
            remove_folder(final)
        temporary.rename(final)
        sync_folder(self.folder)
        older = [path.name for path in _folders(self.folder) if path.name <= final.name]
        for old in surplus(
            older, self.keep, self.keep_every, self.best
        ):  # newer ones are damaged, and don't count towards `keep`
            if not (self.mirror and self.mirror.busy == self.folder / old):  # being uploaded; deleted by the next save
                remove_folder(self.folder / old)
        if self.mirror:
            self.mirror.offer(final)


def read_state(path: Path) -> dict[str, Any]:
    """Read the state.json of a checkpoint."""
    return json.loads((path / "state.json").read_text())


def load_into(path: Path, targets: Pieces) -> None:
    """Fill target tensors (by name: offset, 1-D tensor) from a verified checkpoint, however it was partitioned.

    Raises InputError if the checkpoint doesn't cover a target, e.g. because the model has other parameters.
    """
    manifest = json.loads((path / "manifest.json").read_text())
    where: dict[str, list[tuple[int, int, str]]] = {}
    for file, record in manifest["files"].items():
        for key, (start, numel) in record.get("pieces", {}).items():
            where.setdefault(key, []).append((start, numel, file))
    with _Files(path) as files:
        for key, (first, target) in targets.items():
            done = 0
            for start, numel, file in where.get(key, []):
                low, high = max(first, start), min(first + target.numel(), start + numel)
                if low < high:
                    target[low - first : high - first].copy_(files[file].get_slice(key)[low - start : high - start])
                    done += high - low
            if done != target.numel():
                raise InputError(
                    f"{path.name} holds {done} of {target.numel()} values of {key}; was it another model's?"
                )


def kinds_of(path: Path, network: str | None = None) -> list[str]:
    """Kinds of tensors (ema, exp_avg, master, ...) that a checkpoint has of a network (default: the first), sorted."""
    files = json.loads((path / "manifest.json").read_text())["files"].values()
    keys = [key.split("/") for record in files for key in record.get("pieces", {})]
    wanted = network or networks_of(path)[0]
    return sorted({kind for kind, of, *_ in keys if of == wanted})


def networks_of(path: Path) -> list[str]:
    """Names of the trained networks of a checkpoint, the run's main one first."""
    return list(dict.fromkeys(name.split("/", 1)[0] for name in read_state(path)["shapes"]))


def load_full(path: Path, kind: str, network: str | None = None) -> dict[str, Tensor]:
    """Load the full tensors of a kind by parameter name, of a network (default: the first), for use outside a run."""
    prefix = f"{network or networks_of(path)[0]}/"
    shapes = {name: shape for name, shape in read_state(path)["shapes"].items() if name.startswith(prefix)}
    full = {name: torch.empty(torch.Size(shape).numel()) for name, shape in shapes.items()}
    load_into(path, {f"{kind}/{name}": (0, values) for name, values in full.items()})
    return {name.removeprefix(prefix): values.view(shapes[name]) for name, values in full.items()}


def latest_intact(folder: Path) -> Path:
    """Find the newest intact checkpoint in a folder, in a single process. Raises InputError if there is none."""
    for path in reversed(_folders(folder)):
        if verify(path) is None:
            return path
    raise InputError(f"no intact checkpoint in {folder}; train first")


def verify(path: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """Verify a checkpoint. Returns a description of the damage, or None if it is intact.

    With several ranks each checks the hashes of its share of the files.
    """
    try:
        manifest = read_manifest(path)
        for number, (name, record) in enumerate(sorted(manifest["files"].items())):
            check_file(path / name, record, hashed=number % ranks == rank)
            if "pieces" in record:
                with safe_open(path / name, "pt") as tensors:  # safetensors, whatever the file's extension
                    if set(tensors.keys()) != set(record["pieces"]):
                        return f"{name} doesn't hold the tensors that manifest.json names"
    except Damage as damage:
        return str(damage)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        return f"{type(error).__name__}: {error}"
    return None


class _Files:
    """Context manager of a checkpoint's safetensors files, which are opened on first use."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.open: dict[str, Any] = {}

    def __enter__(self) -> _Files:
        return self

    def __getitem__(self, name: str) -> Any:
        if name not in self.open:
            self.open[name] = safe_open(self.path / name, "pt").__enter__()
        return self.open[name]

    def __exit__(self, *_: object) -> None:
        for file in self.open.values():
            file.__exit__(None, None, None)


def _write_pieces(path: Path, staged: Pieces) -> dict[str, Any]:
    save_file({key: values.contiguous() for key, (_, values) in staged.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    places = {key: (start, values.numel()) for key, (start, values) in staged.items()}
    return {"file": path.name, "size": path.stat().st_size, "sha256": sha256(path), "pieces": places}


def _folders(folder: Path) -> list[Path]:
    """Checkpoint folders of a run, intact or not, oldest first. Other entries are ignored."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdigit())
