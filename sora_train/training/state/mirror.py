"""Mirror of a run's checkpoints (`checkpoint.mirror`) in object storage, or anywhere that fsspec can write.

    URL/run.json                 identity of the run folder that owns the mirror
    URL/config.yaml, inputs.json configuration, and hashes of the weights that the run read; tokenizer.json if used
    URL/step-00001000/...        files of a checkpoint; manifest.json last, so that partial copies are never used
    URL/snapshots/step-.../...   snapshots of averages, all of those that are in the run folder

The main rank uploads published checkpoints in a thread, so that the training loop and the next save never wait for the
network. Failures are counted and logged, and the next checkpoint tries again. A run folder without checkpoints fetches
the newest complete one from the mirror and becomes its owner; the previous owner is refused from then on, so that two
runs never write to one mirror.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from sora_train.config.schema import TOKENIZER, Config
from sora_train.core.cli import InputError
from sora_train.training.state.files import Damage, check_file, read_manifest, stays, surplus, sync_folder

_FLAT = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")  # object stores, which have no directories to create
_AT_ONCE = 8  # concurrent downloads, if the file system supports them
_SNAPSHOTS = "snapshots/"
_NOTES = ("config.yaml", "inputs.json", TOKENIZER)  # of the run folder
_DAMAGED = (Damage, FileNotFoundError, ValueError, KeyError, TypeError, AttributeError)  # errors of a damaged copy
_log = logging.getLogger(__name__)


class Mirror:
    """The mirror of one run.

    Args:
        url: Folder of this run alone.
        run_dir: Run folder.
        keep: Newest checkpoints that are kept.
        keep_every: Checkpoints at multiples of this step are kept for ever; 0: none.
        options: Keyword arguments of the fsspec file system.

    Raises:
        InputError: fsspec can't handle the URL, or a package for it is missing.
    """

    def __init__(self, url: str, run_dir: Path, keep: int, keep_every: int, options: dict[str, Any]) -> None:
        self.url, self.run_dir, self.keep, self.keep_every = url, run_dir, keep, keep_every
        self.best: str | None = None  # name of the best checkpoint, which is kept too
        self.failed = 0  # number of failed uploads and removals
        self.busy: Path | None = None  # checkpoint or snapshot that is being uploaded
        self._latest = ""  # name of the newest checkpoint offered
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._kind = url.partition("://")[0]
        import fsspec

        try:
            fresh = {"skip_instance_cache": True, "use_listings_cache": False}
            self._fs, self._root = fsspec.core.url_to_fs(url, **options, **fresh)
        except (ImportError, ValueError) as error:
            message = f"checkpoint.mirror={url}: {error}; install sora_train[storage], or mend the URL"
            raise InputError(message) from error

    @classmethod
    def of(cls, config: Config) -> Mirror | None:
        """Create the mirror of a configuration; None if it has none."""
        c = config.checkpoint
        if c.mirror is None:
            return None
        options = config.data.storage.get(c.mirror.partition("://")[0], {})
        return cls(c.mirror, Path(config.run_dir), c.keep, c.keep_every, options)

    def restore(self) -> Path | None:
        """Fetch the newest complete checkpoint if the run folder has none. Call before the start.

        Returns the folder of the fetched checkpoint, or None if nothing was fetched.

        Raises InputError if the mirror belongs to another run. For a run folder without checkpoints, it is also raised
        if the mirror can't be read or all its checkpoints are damaged: the run would silently start from scratch.
        """
        empty = not any((self.run_dir / "checkpoints").glob("step-*"))
        try:
            self._claim(take_over=empty)
            return self._fetch_newest() if empty else None
        except InputError:
            raise
        except Exception as error:  # storage clients raise exceptions of their own
            what = f"checkpoint.mirror={self.url} doesn't answer as it should ({type(error).__name__}: {error})"
            if empty:
                raise InputError(
                    f"{what}, so that it isn't known whether this run has checkpoints there; mend it, or set "
                    "checkpoint.mirror=null to start anew"
                ) from error
            _log.error("%s; training goes on, and the next checkpoint tries again", what)
            return None

    def offer(self, published: Path) -> None:
        """Upload a published checkpoint or snapshot in the background.

        A checkpoint may be skipped if a newer one was offered before its turn. With a snapshot, all snapshots that are
        missing in the mirror are uploaded.
        """
        if _under(published.parent):
            self._do(partial(self._upload_snapshots, published.parent))
            return
        self._latest = published.name
        self._do(partial(self._upload_checkpoint, published))

    def discard_after(self, folder: Path, step: int) -> None:
        """Delete copies of steps after `step` in the background; `folder` is the run's folder of the originals."""
        self._do(partial(self._discard_after, f"{_under(folder)}step-{step:08d}"))

    def finish(self, limit_s: float) -> bool:
        """Wait for all jobs, at most `limit_s` seconds. Returns True if they are done."""
        if self._thread is None:
            return True
        self._jobs.put(None)
        self._thread.join(limit_s)
        if self._thread.is_alive():
            _log.error("copying to %s isn't done after %.0f s; what isn't there by now is left out", self.url, limit_s)
            return False
        return True

    def _do(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        for job in iter(self._jobs.get, None):
            try:
                job()
            except Exception as error:  # logged; the next checkpoint tries again
                self.failed += 1
                _log.error(
                    "checkpoint.mirror=%s: %s: %s; training goes on, the checkpoints in %s are untouched",
                    self.url, type(error).__name__, error, self.run_dir / "checkpoints",
                )  # fmt: skip

    def _upload_checkpoint(self, folder: Path) -> None:
        self.busy = folder
        try:
            overtaken = folder.name not in (self._latest, self.best) and not stays(folder.name, self.keep_every)
            if overtaken or not folder.is_dir():
                _log.warning("%s isn't copied to %s: a newer one was saved before its turn", folder.name, self.url)
                return
            self._claim(take_over=False)
            for name in _NOTES:
                if (self.run_dir / name).is_file():
                    self._put(self.run_dir / name, name)
            self._upload(folder)
        finally:
            self.busy = None
        self._tidy(folder.name)

    def _upload_snapshots(self, folder: Path) -> None:
        """Synchronise the mirror's snapshots with the run folder's, which are few, small, and all needed at the end."""
        self._claim(take_over=False)
        here = sorted(path for path in folder.glob("step-*") if path.is_dir())
        for path in here:
            self.busy = path
            try:
                if path.is_dir():  # it may have been deleted meanwhile
                    self._upload(path)
            finally:
                self.busy = None
        for name in self._found(_under(folder)).keys() - {_under(folder) + path.name for path in here}:
            self._remove(name)

    def _upload(self, folder: Path) -> None:
        """Copy a checkpoint or snapshot, the manifest last, unless the mirror has it already."""
        name = _under(folder.parent) + folder.name
        if self._text(f"{name}/manifest.json") == (folder / "manifest.json").read_text():
            return  # uploaded before a restart
        self._remove(name)  # a partial or different copy
        for file, record in read_manifest(folder)["files"].items():
            self._put(folder / file, f"{name}/{file}")
            size = self._fs.size(self._at(f"{name}/{file}"))
            if size != record["size"]:
                raise OSError(f"{size} of {record['size']} bytes of {name}/{file} arrived")
        self._put(folder / "manifest.json", f"{name}/manifest.json")

    def _tidy(self, newest: str) -> None:
        """Delete old and partial copies, and those of steps after `newest`, from which the run rolled back."""
        there = self._found()
        older = sorted(name for name, files in there.items() if "manifest.json" in files and name <= newest)
        halves = [name for name, files in there.items() if "manifest.json" not in files]
        for name in (
            *surplus(older, self.keep, self.keep_every, self.best),
            *halves,
            *(n for n in there if n > newest),
        ):
            if name in there:
                self._remove(name)
                there.pop(name)

    def _discard_after(self, step: str) -> None:
        self._claim(take_over=False)
        for name in self._found(step.rpartition("/")[0]):
            if name > step:
                self._remove(name)

    def _claim(self, take_over: bool) -> None:
        """Check that this run folder owns the mirror, or become its owner if it has none or with `take_over`.

        Raises InputError if another run folder owns it.
        """
        own = self.run_dir / "mirror.json"
        known = json.loads(own.read_text()) if own.is_file() else {}
        mine, moved = known.get("run"), self._has_moved(known)
        theirs = self._text("run.json")
        if theirs is not None and json.loads(theirs)["run"] == mine:
            if not moved:
                return
        elif theirs is not None and not take_over:
            raise InputError(
                f"checkpoint.mirror={self.url} belongs to another run, or this one was gone on with in another run "
                "folder; choose another mirror, or null"
            )
        if mine is None or theirs is not None:
            about = {"run": uuid.uuid4().hex, "folder": str(self.run_dir.resolve()), "inode": self._inode()}
            own.write_text(json.dumps(about) + "\n")
        self._put(own, "run.json")

    def _inode(self) -> int:
        return self.run_dir.stat().st_ino

    def _has_moved(self, known: dict[str, Any]) -> bool:
        """Tell whether the run folder isn't the one whose mirror.json this is: neither path nor inode agree.

        Raises InputError if it is a copy, i.e. the original folder still exists.
        """
        folder = Path(known.get("folder", self.run_dir.resolve()))
        if folder == self.run_dir.resolve() or known.get("inode") == self._inode():
            return False
        original = folder / "mirror.json"
        if original.is_file() and json.loads(original.read_text())["run"] == known["run"]:
            raise InputError(
                f"checkpoint.mirror={self.url} belongs to {folder}, of which {self.run_dir} is a copy; choose another "
                "mirror, or null"
            )
        return True

    def _fetch_newest(self) -> Path | None:
        """Fetch the newest complete and intact checkpoint to the run folder; None if the mirror is empty."""
        whole = sorted(name for name, files in self._found().items() if "manifest.json" in files)
        for name in _NOTES:  # the next checks compare the configuration to them, as at every start
            if not (self.run_dir / name).is_file() and (text := self._text(name)):
                (self.run_dir / name).write_text(text)
        for name in reversed(whole):
            try:
                self._fetch_snapshots(name)
                return self._fetch(name)
            except _DAMAGED as error:
                _log.error("%s/%s is damaged (%s); trying an older one", self.url, name, error)
        if whole:
            raise InputError(
                f"every checkpoint in checkpoint.mirror={self.url} is damaged; restore one, or choose another mirror "
                "to start anew"
            )
        return None

    def _fetch_snapshots(self, until: str) -> None:
        """Fetch the complete snapshots up to a checkpoint.

        Called before the checkpoint is fetched: if this is interrupted, the next start still finds an empty run folder
        and fetches everything.
        """
        for name, files in self._found(_SNAPSHOTS).items():
            if "manifest.json" in files and name <= _SNAPSHOTS + until and not (self.run_dir / name).is_dir():
                try:
                    self._fetch(name)
                except _DAMAGED as error:
                    _log.error("%s/%s is damaged (%s) and is left out", self.url, name, error)

    def _fetch(self, name: str) -> Path:
        """Fetch a checkpoint or snapshot to a temporary folder, verify it, and rename it; returns its folder."""
        home = self.run_dir / (name.rpartition("/")[0] or "checkpoints")
        temporary = home / ".tmp-mirror"  # .tmp-* is removed at the next start
        folder = temporary / name.rpartition("/")[2]
        shutil.rmtree(temporary, ignore_errors=True)
        folder.mkdir(parents=True)
        self._get(name, folder, "manifest.json")
        files = read_manifest(folder)["files"]
        needed, free = sum(record["size"] for record in files.values()), shutil.disk_usage(folder).free
        if free < needed:
            raise InputError(f"{name} needs {needed / 2**30:.2f} GiB, {home} has {free / 2**30:.2f} GiB free")
        with ThreadPoolExecutor(_AT_ONCE if self._fs.async_impl else 1) as pool:
            list(pool.map(partial(self._get, name, folder), files))
        for file, record in files.items():
            check_file(folder / file, record)
        final = folder.rename(home / folder.name)
        temporary.rmdir()
        sync_folder(home)
        _log.warning("fetched %s from %s", name, self.url)
        return final

    def _found(self, under: str = "") -> dict[str, set[str]]:
        """Names of the files of each checkpoint (with `under`: of each snapshot) in the mirror, complete or not."""
        found: dict[str, set[str]] = {}
        for path in self._fs.find(self._at(under)):
            name, _, file = str(path).removeprefix(self._root).strip("/").rpartition("/")
            folder, _, step = name.rpartition("/")
            if folder == under.strip("/") and step.startswith("step-") and step.removeprefix("step-").isdigit():
                found.setdefault(name, set()).add(file)
        return found

    def _remove(self, name: str) -> None:
        """Delete a copy, its manifest first, so that an interruption leaves no copy that seems complete."""
        files = self._found(name.rpartition("/")[0]).get(name, set())
        for file in sorted(files, key=lambda file: file != "manifest.json"):
            self._fs.rm_file(self._at(f"{name}/{file}"))
        if self._kind not in _FLAT and self._fs.isdir(self._at(name)):
            self._fs.rm(self._at(name), recursive=True)

    def _text(self, name: str) -> str | None:
        try:
            return bytes(self._fs.cat_file(self._at(name))).decode()
        except FileNotFoundError:
            return None

    def _put(self, path: Path, name: str) -> None:
        if self._kind not in _FLAT:
            self._fs.makedirs(self._at(name).rpartition("/")[0], exist_ok=True)
        self._fs.put_file(str(path), self._at(name))

    def _get(self, name: str, folder: Path, file: str) -> None:
        self._fs.get_file(self._at(f"{name}/{file}"), str(folder / file))

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}".rstrip("/")


def _under(folder: Path) -> str:
    """Prefix in the mirror of the entries of a folder of the run: `snapshots/`, or nothing for checkpoints."""
    return _SNAPSHOTS if folder.name == _SNAPSHOTS.rstrip("/") else ""
