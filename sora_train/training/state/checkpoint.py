"""Checkpoints that fit any cluster: tensors by parameter name, JSON, hashed, published by one rename.

    checkpoints/step-00001000/
        rank-0.safetensors ...   this rank's pieces: `KIND/NETWORK/PARAMETER`, KIND = master, exp_avg, ema, ...
        state.json               step, position, counters, shapes
        manifest.json            size and SHA-256 of every file and of itself, where every piece begins; written last

Written in the background from a copy, and what lies in host memory is copied in the background too: nothing of it
changes before the next optimizer step, which waits for the copy (`settle`). A folder counts only if its manifest is
there and every byte agrees; the newest that counts on every rank is loaded, at any number of ranks and any ZeRO stage.
There is no pointer file to be wrong, and nothing on disk is ever unpickled. A little longer than most files, as writing
and reading share one form.
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

_SPARE = 16 << 20  # bytes that must stay free beside a checkpoint: JSON, logs, what others write meanwhile
_log = logging.getLogger(__name__)

Pieces = dict[str, tuple[int, Tensor]]  # KIND/NETWORK/PARAMETER: first element, values


def pieces(
    fragments: Sequence[Fragment],
    ema: Mapping[str, Tensor],
    split: tuple[int, int] | None,
    more: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Pieces:
    """What this rank saves; `more` are further averages by kind. For `split` see `shares`."""
    own: dict[str, dict[str, Tensor]] = {"master": {f.name: f.master for f in fragments}}
    for f in fragments:
        for kind, values in f.states.items():
            own.setdefault(kind, {})[f.name] = values
    return shares(fragments, {**own, "ema": ema, **(more or {})}, split)


def shares(
    fragments: Sequence[Fragment], kinds: Mapping[str, Mapping[str, Tensor]], split: tuple[int, int] | None
) -> Pieces:
    """Kinds of tensors by parameter; `split` (rank, ranks) shares them out where every rank holds them whole."""
    mine: Pieces = {}
    for f in fragments:
        for kind, tensors in kinds.items():
            if f.name not in tensors:  # a network without an average
                continue
            values = tensors[f.name]
            start, stop = 0, values.numel()
            if split is not None:
                start, stop = (stop * split[0] // split[1], stop * (split[0] + 1) // split[1])
            if stop > start:
                mine[f"{kind}/{f.name}"] = (f.start + start, values[start:stop])
    return mine


class Checkpoints:
    """The checkpoint folder of a run. All methods are called by all ranks together."""

    def __init__(self, folder: Path, keep: int, keep_every: int = 0, mirror: Mirror | None = None) -> None:
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self.mirror = mirror  # the main rank's, if any
        self.failed = 0  # saves that could not be written
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        # the writer thread's own, so that it can't mix with the loop's; None once another rank is gone
        self._group: Any = dist.new_group(backend="gloo")
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._staging: dict[str, Tensor] = {}  # copies of the last save, overwritten by the next
        self._copied = threading.Event()  # whether the save under way needs the live tensors no more
        self._copied.set()
        if self.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".tmp-*"):  # of a save that was killed
                shutil.rmtree(leftover)
        dist.barrier()

    def save(self, step: int, mine: Pieces, state: dict[str, Any]) -> None:
        """Copy and write in the background: `mine` must not change before `settle` returns.

        Waits for the save before this one; a failed save is logged, not fatal.
        """
        self.wait()
        if any(values.is_cuda for _, values in mine.values()):
            mine = self._stage(mine)  # now, behind what the device has queued
            torch.cuda.synchronize()
        else:
            self._copied.clear()
        self._thread = threading.Thread(target=self._write, args=(step, mine, state), name="checkpoint", daemon=True)
        self._thread.start()

    def settle(self) -> None:
        """Wait until the save under way has its copy: from then on the tensors may change."""
        self._copied.wait()

    def wait(self, limit_s: float | None = None) -> bool:
        """Wait for the save under way, at most so many seconds; whether it succeeded."""
        if self._thread is not None:
            self._thread.join(limit_s)
            if self._thread.is_alive():
                return False
            self._thread = None
        failure, self._failure = self._failure, None
        return failure is None

    def newest(self, before: int | None = None) -> Path | None:
        """The newest checkpoint (of a step below `before`) that is intact in the eyes of every rank; None without any.

        Raises InputError if there are checkpoints but every one is damaged.
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
        """Remove the checkpoints of later steps: they hold what a rollback undoes."""
        if self.rank == 0:
            for path in _folders(self.folder):
                if path.name > f"step-{step:08d}":
                    remove_folder(path)
            if self.mirror:
                self.mirror.discard_after(self.folder, step)
        dist.barrier(group=self._group)

    def _stage(self, mine: Pieces) -> Pieces:
        """A copy in host memory that is kept and used again, page-locked where it comes from a GPU."""
        staged: Pieces = {}
        for key, (start, values) in mine.items():
            kept = self._staging.get(key)
            if kept is None or kept.shape != values.shape or kept.dtype != values.dtype:
                kept = self._staging[key] = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            staged[key] = start, kept.copy_(values.detach(), non_blocking=True)
        return staged

    def _write(self, step: int, mine: Pieces, state: dict[str, Any]) -> None:
        """The writer thread; whatever happens in it, the save counts as failed unless it was published."""
        try:
            self._write_together(step, mine, state)
        except Exception as error:  # of a collective: another rank is gone, and this one will soon notice elsewhere too
            self._fail(step, f"rank {self.rank}: {error}")
            group, self._group = self._group, None
            if group is not None:  # so that the others' writers, which may wait for this one, fail as well and let go
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
                self._check_space(mine)  # a collective: also where this rank had no memory for the copy
            temporary.mkdir(parents=True, exist_ok=True)
            record = _write_pieces(temporary / f"rank-{self.rank}.safetensors", staged)
        except Exception as error:  # reported to all ranks below: a rank that stays silent would hang the others
            record = {"error": f"rank {self.rank}: {error}"}
        records: list[dict[str, Any]] = [{}] * self.ranks
        dist.all_gather_object(records, record, group=self._group)
        errors = [r["error"] for r in records if "error" in r]
        if not errors and self.rank == 0:
            try:
                self._publish(temporary, step, records, state)
            except Exception as error:  # same
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
        """Raise InputError, on all ranks, where not even one checkpoint fits: nothing of a run would be kept."""
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
        """Raise OSError where the whole checkpoint will not fit; all ranks together."""
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
        if os.path.lexists(final):  # damaged, or it would have been loaded
            remove_folder(final)
        temporary.rename(final)
        sync_folder(self.folder)
        older = [path.name for path in _folders(self.folder) if path.name <= final.name]
        for old in surplus(older, self.keep, self.keep_every):  # a newer one is damaged and doesn't count as kept
            if not (self.mirror and self.mirror.busy == self.folder / old):  # it goes after the next save
                remove_folder(self.folder / old)
        if self.mirror:
            self.mirror.offer(final)


def read_state(path: Path) -> dict[str, Any]:
    """The state.json of a checkpoint."""
    return json.loads((path / "state.json").read_text())


def load_into(path: Path, targets: Pieces) -> None:
    """Fill every target (first element, 1-D tensor) from the pieces of a verified checkpoint.

    Raises InputError if a target isn't covered: another model, or other parameter names.
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
    """The kinds of tensors that a checkpoint holds of a network (the first), sorted: master, ema, exp_avg, ..."""
    files = json.loads((path / "manifest.json").read_text())["files"].values()
    keys = [key.split("/") for record in files for key in record.get("pieces", {})]
    wanted = network or networks_of(path)[0]
    return sorted({kind for kind, of, *_ in keys if of == wanted})


def networks_of(path: Path) -> list[str]:
    """The trained networks of a checkpoint, the run's main one first."""
    return list(dict.fromkeys(name.split("/", 1)[0] for name in read_state(path)["shapes"]))


def load_full(path: Path, kind: str, network: str | None = None) -> dict[str, Tensor]:
    """Whole tensors of one kind by parameter name, of one network (the first), for use outside a run."""
    prefix = f"{network or networks_of(path)[0]}/"
    shapes = {name: shape for name, shape in read_state(path)["shapes"].items() if name.startswith(prefix)}
    full = {name: torch.empty(torch.Size(shape).numel()) for name, shape in shapes.items()}
    load_into(path, {f"{kind}/{name}": (0, values) for name, values in full.items()})
    return {name.removeprefix(prefix): values.view(shapes[name]) for name, values in full.items()}


def latest_intact(folder: Path) -> Path:
    """The newest intact checkpoint of a run, looked for by one process. Raises InputError if there is none."""
    for path in reversed(_folders(folder)):
        if verify(path) is None:
            return path
    raise InputError(f"no intact checkpoint in {folder}; train first")


def verify(path: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """What is wrong with a checkpoint, or None. Each of several ranks hashes its share of the files."""
    try:
        manifest = read_manifest(path)
        for number, (name, record) in enumerate(sorted(manifest["files"].items())):
            check_file(path / name, record, hashed=number % ranks == rank)
            if "pieces" in record:
                with safe_open(path / name, "pt") as tensors:  # whatever its name says, only safetensors are read
                    if set(tensors.keys()) != set(record["pieces"]):
                        return f"{name} doesn't hold the tensors that manifest.json names"
    except Damage as damage:
        return str(damage)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        return f"{type(error).__name__}: {error}"
    return None


class _Files:
    """The safetensors files of a checkpoint, opened on first use."""

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
    """The checkpoints of a run, whole or not, oldest first; anything else that lies there isn't looked at."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdigit())
