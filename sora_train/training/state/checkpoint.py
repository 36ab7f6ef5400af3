"""Checkpoints of a run: saving in the background, and selection at a resume. `checkpoint_format` has the format.

A checkpoint is written from a copy, into a temporary folder that is renamed when it is complete. Tensors in host memory
are copied in the background too: they don't change before the next optimizer step, which waits for the copy (`settle`).
The newest that is valid on every rank is loaded; there is no file that points to it.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sora_train.core.cli import InputError
from sora_train.training.state.checkpoint_format import Pieces, checkpoint_folders, verify, write_pieces
from sora_train.training.state.files import (
    VERSION,
    digest_of,
    remove_folder,
    surplus,
    sync_folder,
    write_json,
)
from sora_train.training.state.mirror import Mirror

_SPARE = 16 << 20  # bytes that must stay free in addition to a checkpoint: for JSON, logs and other writers
_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoint folder of a run. All methods are collective."""

    def __init__(self, folder: Path, keep: int, keep_every: int = 0, mirror: Mirror | None = None) -> None:
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self.mirror = mirror  # on the main rank, if configured
        self.best: str | None = None  # name of the best checkpoint, which is kept
        self.failed = 0  # number of saves that could not be written
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        # process group of the writer thread, as collectives of two threads must not mix; None after a failure
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
        """Find the newest checkpoint that is intact on every rank, of a step below `before` if given.

        Returns None if there are no checkpoints.

        Raises InputError if there are checkpoints but all are damaged.
        """
        found = [p for p in checkpoint_folders(self.folder) if before is None or p.name < f"step-{before:08d}"]
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
            for path in checkpoint_folders(self.folder):
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
            record = write_pieces(temporary / f"rank-{self.rank}.safetensors", staged)
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
        if os.path.lexists(final):  # a damaged one: the run would have resumed from an intact one
            remove_folder(final)
        temporary.rename(final)
        sync_folder(self.folder)
        older = [path.name for path in checkpoint_folders(self.folder) if path.name <= final.name]
        # newer ones are damaged, and don't count towards `keep`
        for old in surplus(older, self.keep, self.keep_every, self.best):
            if not (self.mirror and self.mirror.busy == self.folder / old):  # being uploaded; deleted by the next save
                remove_folder(self.folder / old)
        if self.mirror:
            self.mirror.offer(final)
