"""Checks of one machine before a run, made by doing it: decode a clip, read a shard, write a file."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sora_train.core.cli import InputError
from sora_train.core.media import encode_mp4
from sora_train.data.index.patterns import expand
from sora_train.data.read.decode import DecodeError
from sora_train.data.read.pool import Pool
from sora_train.data.read.store import Store, scheme

OK, WARNING, FAILURE = "ok", "warning", "failure"
_PACKAGES = ("torch", "deepspeed", "hydra-core", "webdataset", "decord", "av", "wandb")
_READ_BYTES = 64 << 20
_WANDB = "https://api.wandb.ai"


@dataclass(frozen=True)
class Finding:
    """Result of one check. `value` is its figure, in the unit that `detail` names."""

    check: str
    status: str
    detail: str
    value: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Convert to a dictionary for JSON."""
        return asdict(self)


def machine(shards: list[str], run_dir: str) -> list[Finding]:
    """Run all checks of this machine, which don't involve any other."""
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "versions": versions, "GPUs": gpus, "decoder": decoders, "shards": lambda: shard_reads(shards),
        "space": lambda: space(run_dir), "limits": limits, "build locks": build_locks,
        "checkpoint folder": lambda: writable(run_dir), "wandb": wandb,
    }  # fmt: skip
    return [finding for name, check in checks.items() for finding in _tried(name, check)]


def _tried(name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Run a check. An exception in it becomes a finding, because the other machines wait for this one's report."""
    try:
        yield from check()
    except Exception as error:
        text = " ".join(str(error).split())
        yield Finding(name, FAILURE, f"the check itself failed: {type(error).__name__}: {text}")


def versions() -> Iterator[Finding]:
    """Report the versions of Python and of required packages."""
    yield Finding("python", OK, f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} CPUs")
    found, missing = [], []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    yield Finding("packages", OK, ", ".join(found))
    if missing:
        yield Finding("packages", WARNING, f"not installed: {', '.join(missing)}")


def gpus() -> Iterator[Finding]:
    """Check every GPU that torch can use by a small matrix product, and its free memory."""
    if not torch.cuda.is_available():
        yield Finding("GPUs", WARNING, "none that torch can use; training runs on the CPU", 0)
        return
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        a = torch.ones(256, 256, device=f"cuda:{number}")
        right = bool(((a @ a) == 256).all())
        free, total = torch.cuda.mem_get_info(number)[0] / 2**30, about.total_memory / 2**30
        status = OK if right and free > 0.9 * total else WARNING if right else FAILURE
        yield Finding(f"GPU {number}", status, f"{about.name}, {free:.1f} of {total:.1f} GiB free", free)


def decoders() -> Iterator[Finding]:
    """Decode a synthetic clip in a child process as training does, and compare its pixels."""
    shade = np.arange(0, 250, 25, dtype=np.uint8)
    clip = np.broadcast_to(shade[:, None, None, None], (len(shade), 64, 96, 3)).copy()
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"sora_train-doctor-{os.getpid()}.mp4"
    path.write_bytes(encode_mp4(clip, 8.0))
    try:
        with Pool(1, 60.0) as pool:
            about = pool.probe(str(path), "mp4").result()
            start = time.monotonic()
            member = (0, path.stat().st_size, about["crc32"])
            frames = pool.decode(str(path), "mp4", member, [0, 5, 9], (64, 96), (0, 0, 64, 96)).result()
            took = time.monotonic() - start
        off = int(np.abs(frames.mean((1, 2, 3)) - shade[[0, 5, 9]]).max())
        status = OK if about["frames"] == len(shade) and off <= 4 else FAILURE
        text = f"{about['frames']} of {len(shade)} frames, pixels off by {off}, {took:.2f} s"
        yield Finding("decoder", status, text, took)
    except DecodeError as error:
        yield Finding("decoder", FAILURE, f"{error.cause}: {error.detail}")
    finally:
        path.unlink()


def shard_reads(patterns: list[str]) -> Iterator[Finding]:
    """Tell whether the shards are there, and how fast the first, middle and last are read."""
    if not patterns:
        return
    try:
        paths = expand(patterns)
    except InputError as error:
        yield Finding("shards", FAILURE, str(error))
        return
    done, start, store = 0, time.monotonic(), Store()
    for path in sorted({paths[0], paths[len(paths) // 2], paths[-1]}):
        try:
            if scheme(path) is not None:
                done += len(store.read(path, 0, min(_READ_BYTES, store.size(path))))
                continue
            with Path(path).open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # measure the disk, not the page cache
                while done < _READ_BYTES and (part := file.read(4 << 20)):
                    done += len(part)
        except OSError as error:
            yield Finding("shards", FAILURE, f"{path}: {error.strerror}")
            return
        except (DecodeError, InputError) as error:  # of a remote one
            yield Finding("shards", FAILURE, f"{path}: {error}")
            return
    speed = done / max(time.monotonic() - start, 1e-9) / 1e6
    yield Finding("shards", OK if speed > 50 else WARNING, f"{len(paths)} shard(s), read at {speed:.0f} MB/s", speed)


def space(run_dir: str) -> Iterator[Finding]:
    """Check the free space for checkpoints on disk, and for decoded frames in shared memory."""
    existing = next(p for p in (Path(run_dir).resolve(), *Path(run_dir).resolve().parents) if p.exists())
    for name, path, least in (("disk", existing, 10.0), ("shared memory", Path("/dev/shm"), 1.0)):
        if not path.exists():
            yield Finding(name, WARNING, f"there is no {path}; decoded frames go through files")
            continue
        free = shutil.disk_usage(path).free / 2**30
        yield Finding(name, OK if free >= least else WARNING, f"{free:.1f} GiB free at {path}", free)


def limits() -> Iterator[Finding]:
    """Check the limits on open files, and on locked memory if there is InfiniBand."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    enough = files == resource.RLIM_INFINITY or files >= 4096
    yield Finding("open files", OK if enough else WARNING, f"{files} allowed (ulimit -n); 4096 are wanted", files)
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if Path("/dev/infiniband").exists() and locked != resource.RLIM_INFINITY:
        yield Finding("locked memory", FAILURE, f"{locked} bytes allowed (ulimit -l); RDMA needs unlimited", locked)


def build_locks() -> Iterator[Finding]:
    """Find locks of killed builds of torch extensions, for which every later start would wait silently."""
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")).expanduser()
    stale = [lock for lock in folder.glob("**/lock") if not _is_open(lock)]
    if stale:
        yield Finding("build locks", FAILURE, f"stale, remove it: {stale[0]} ({len(stale)} in all)", len(stale))
    else:
        yield Finding("build locks", OK, f"none in {folder}", 0)


def _is_open(path: Path) -> bool:
    """Tell whether a process that we have permission to inspect has the file open."""
    wanted = os.path.realpath(path)
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(descriptor.readlink()) == wanted:
                return True
        except OSError:  # the process ended, or belongs to another user
            continue
    return False


def writable(run_dir: str) -> Iterator[Finding]:
    """Write, sync, rename and delete a file in the folder of checkpoints."""
    folder = Path(run_dir) / "checkpoints"
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    probe = folder / f".doctor-{socket.gethostname()}-{os.getpid()}"
    start = time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            file.write(os.urandom(8 << 20))
            file.flush()
            os.fsync(file.fileno())
        renamed = probe.rename(probe.with_suffix(".renamed"))
        renamed.unlink()
    except OSError as error:
        yield Finding("checkpoint folder", FAILURE, f"{folder}: {error.strerror}")
        return
    speed = 8 * 1.048576 / max(time.monotonic() - start, 1e-9)
    for path in made:  # delete the folders that we created, unless another machine uses them
        if path.exists() and not any(path.iterdir()):
            path.rmdir()
    yield Finding("checkpoint folder", OK, f"{folder} written at {speed:.0f} MB/s", speed)


def wandb(timeout_s: float = 3.0) -> Iterator[Finding]:
    """Tell whether the server answers; without it wandb writes offline."""
    server = os.environ.get("WANDB_BASE_URL", _WANDB).split("://")[-1].split("/")[0]
    host, _, port = server.partition(":")
    try:
        socket.create_connection((host, int(port or 443)), timeout_s).close()
        yield Finding("wandb", OK, f"{server} answers")
    except OSError as error:
        yield Finding("wandb", WARNING, f"{server} does not answer ({error}); runs are written offline")
