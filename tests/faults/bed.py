"""Test bed for faults: a tiny data set and model, and real ranks, forked from a warm process or by torchrun.

Forked ranks run `sora_train.train.train` as under torchrun, on gloo; only the imports are shared. A *sabotage* is a
function that such a rank calls before it starts, to break something in itself. Longer than most files, as starting
ranks, waiting for them and comparing what they leave belong together.
"""

from __future__ import annotations

import copy
import ctypes
import faulthandler
import gc
import importlib
import io
import json
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import webdataset as wds
from deepspeed.comm.torch import build_shm_op
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from PIL import Image
from safetensors.torch import save_file

import sora_train.operations.build  # noqa: F401 (warms up what every rank would import)
from sora_train.config.hydra import CONF
from sora_train.config.load import build
from sora_train.config.schema import VAE_USE, Config
from sora_train.core.cli import InputError
from sora_train.core.media import encode_mp4
from sora_train.data.index.make import index_shards
from sora_train.models.video_vae.model import build_vae
from sora_train.train import train
from sora_train.training.state.checkpoint_format import kinds_of, latest_intact, load_full, networks_of, read_state
from sora_train.training.trainer import Trainer

PYTHON = os.environ.get("PYTHON_EXEC", sys.executable)  # the fork server's, where one runs this
Sabotage = Callable[[Config, int], None]  # configuration, rank
_TINY = (
    "experiment=demo", "model.width=16", "model.depth=1", "model.heads=2", "model.ffn=32", "model.frequencies=16",
    "text_encoder.width=16", "text_encoder.heads=2", "text_encoder.buckets=64", "threads=1", "logging.writers=[]",
    "logging.every_steps=1", "logging.validate_every=0", "logging.validation_clips=2", "logging.sample_every=0",
    "logging.evaluate_every=0", "logging.sample_clips=1", "logging.peak_tflops=1", "flow.sampling_steps=2",
    "optim.matrices=adamw",
    "data.slots=4", "data.max_tokens=8",
    "data.max_pixels=256", "data.max_frames=5", "data.workers=1", "data.prefetch_steps=2", "checkpoint.every_steps=2",
    "checkpoint.keep=2", "vae.widths=[4,4]", "vae.blocks=[0,0]",
)  # fmt: skip


class Bed:
    """A folder with shards and a VAE, and the configuration of a run of `steps` steps on them or on shards given."""

    def __init__(self, folder: Path, steps: int = 8, shards: Sequence[str] = ()) -> None:
        self.folder, self.steps = folder, steps
        self.facts: dict[str, Any] = {}  # what the trial under way found out beside its verdict
        folder.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)  # a process with threads can't be forked
        if not shards:
            firsts = {"train-0": 0, "train-1": 12, "val": 24}
            shards = [_shard(folder / f"{name}.tar", first) for name, first in firsts.items()]
            index_shards(list(shards), workers=1)
        build_shm_op()  # DeepSpeed's collectives on a CPU: loaded here, and not by every rank
        *training, validation = shards
        self._base = [
            *_TINY, f"data.sources.demo.shards=[{','.join(training)}]",
            f"data.validation=[{validation}]",
        ]  # fmt: skip
        vae = self.config("none", "method=autoencoder", "vae.path=null").vae
        (folder / "vae").mkdir(exist_ok=True)
        torch.manual_seed(0)
        save_file(build_vae(vae).state_dict(), folder / "vae" / "vae.safetensors")
        shape = {k: v for k, v in vars(vae).items() if k not in VAE_USE}
        (folder / "vae" / "config.json").write_text(json.dumps(shape))
        self._base.append(f"vae.path={folder}/vae")

    def warm(self) -> None:
        """Import what a run imports on its way, so that no fork has to: a run of one rank tells what that is."""
        told = self.folder / "modules.json"
        if not told.exists():
            Job(self.config("warm", "steps=2"), 1, lambda mine, rank: _tell_modules(told)).wait()
        for name in json.loads(told.read_text()):
            with suppress(Exception):  # parts of packages that only stand where something else was imported first
                importlib.import_module(name)
        gc.collect()
        gc.freeze()  # what stands now is not looked through again, nor copied for it, by every fork's collections

    def config(self, name: str, *overrides: str, leave: tuple[str, ...] = ()) -> Config:
        """The configuration of a run in `name` under the bed's folder, without own keys that begin as in `leave`."""
        own = [override for override in self.overrides(name) if not override.startswith(leave)]
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            tree = compose("train", overrides=[*own, *overrides])
        return build(tree, need_vae=False)

    def overrides(self, name: str) -> list[str]:
        """The same for a command line."""
        return [*self._base, f"steps={self.steps}", f"run_dir={self.folder}/{name}"]

    def run_dir(self, name: str) -> Path:
        """Run folder of run `name`."""
        return self.folder / name


def _shard(path: Path, first: int) -> str:
    if path.exists():  # a campaign that goes on
        return str(path)
    with wds.TarWriter(str(path)) as tar:
        for number in range(first, first + 12):
            rng = np.random.default_rng(number)
            frames = rng.integers(0, 256, (5, 4, 4, 3), np.uint8).repeat(4, 1).repeat(4, 2)
            key = {"__key__": f"{number:05d}", "txt": f"block number {number}".encode()}
            if number % 4:
                tar.write({**key, "mp4": encode_mp4(frames, 4.0)})
            else:
                buffer = io.BytesIO()
                Image.fromarray(frames[0]).save(buffer, "PNG")
                tar.write({**key, "png": buffer.getvalue()})
    return str(path)


class Job:
    """The ranks of one start, forked. As torchrun does, the first that fails has the others told to end, then killed.

    `then` are runs that the same processes make afterwards, as long as every one ends with 0. `command` is what each
    rank does with a configuration; it returns the exit code.
    """

    def __init__(
        self, config: Config, ranks: int, sabotage: Sabotage | None = None, restarts: int = 0,
        then: Sequence[Config] = (), command: Callable[[Config], int] = train,
    ) -> None:  # fmt: skip
        self.config, self.command, self.started, self.codes = config, command, time.monotonic(), {}
        runs = [(each, _free_port()) for each in (config, *then)]
        self.log = Path(config.run_dir).with_suffix(".out")
        self.pids = [self._fork(rank, ranks, runs, sabotage, restarts) for rank in range(ranks)]

    codes: dict[int, int]
    stuck = 0  # ranks that didn't end by themselves after another had failed

    def poll(self) -> bool:
        """Tell whether every rank has ended; collects the codes of those that have."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def wait(self, timeout_s: float = 600.0, grace_s: float = 15.0) -> int:
        """Wait for all ranks: the code of exit.json where the main rank left one, as the launch scripts see it."""
        failed, asked = None, time.monotonic()
        while not self.poll():
            now = time.monotonic()
            if failed is None and any(code not in (0, 75) for code in self.codes.values()):
                failed = now
                self.send(signal.SIGTERM)
            if now - asked > timeout_s or (failed is not None and now - failed > grace_s):
                self.stuck = len(self.pids) - len(self.codes)
                self.send(signal.SIGUSR2)  # their stacks, into the log
                time.sleep(0.3)
                self.send(signal.SIGKILL)
            time.sleep(0.01)
        self.seconds = time.monotonic() - self.started
        if all(code in (0, 75) for code in self.codes.values()):
            return max(self.codes.values())
        try:
            return int(json.loads((Path(self.config.run_dir) / "exit.json").read_text())["code"]) or 1
        except (OSError, ValueError):
            return 1

    def send(self, number: int, rank: int | None = None) -> None:
        """Signal one rank, or all."""
        for r, pid in enumerate(self.pids):
            if r not in self.codes and rank in (None, r):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    def _fork(
        self, rank: int, ranks: int, runs: Sequence[tuple[Config, int]], sabotage: Sabotage | None, restarts: int
    ) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives the campaign
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1)
            faulthandler.register(signal.SIGUSR2, sys.stderr)
            os.environ |= {
                "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "faults", "SORA_RESTARTS": str(restarts),
            }  # fmt: skip
            warnings.simplefilter("ignore")  # deprecations of DeepSpeed's calls, thousands of lines
            for config, port in runs:
                code = 1  # also where an earlier one ended with 0
                os.environ["MASTER_PORT"] = str(port)
                mine = copy.deepcopy(config)
                if sabotage is not None:
                    sabotage(mine, rank)
                if code := self.command(mine):
                    break
        except InputError as error:
            print(f"error: {error}")
            code = 2
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)


def _tell_modules(path: Path) -> None:
    """Have this rank write down at its end which modules it has imported."""
    true = Trainer.leave

    def leaving(self: Trainer, code: int, reason: str) -> int:
        path.write_text(json.dumps(sorted(sys.modules)))
        return true(self, code, reason)

    Trainer.leave = leaving  # type: ignore[method-assign]


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Launch:
    """The ranks of one start by torchrun, as a user gives it; `through` is the module that torchrun starts."""

    def __init__(
        self, config: Config, overrides: Sequence[str], ranks: int, through: str = "sora_train.train", *more: str
    ) -> None:
        self.config, self.ranks = config, ranks
        self.log = Path(config.run_dir).with_suffix(".out")
        self._mark = _exit_mark(config)
        launcher = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
            "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1", "--shutdown-timeout=120", "-m", through,
        ]  # fmt: skip
        with self.log.open("ab") as output:
            self.process = psutil.Popen(
                [*launcher, *more, *overrides], cwd=CONF.parent, stdout=output, stderr=output,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONF.parent)}, start_new_session=True,
            )  # fmt: skip

    def poll(self) -> bool:
        """Tell whether torchrun has ended."""
        return self.process.poll() is not None

    def wait(self, timeout_s: float = 300.0) -> int:
        """Wait for torchrun's end: the code that the run left in exit.json, as the launch scripts see it."""
        try:
            status = int(self.process.wait(timeout_s))
        except psutil.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            return 1
        if status == 0 or _exit_mark(self.config) in (None, self._mark):
            return status
        return int(json.loads((Path(self.config.run_dir) / "exit.json").read_text())["code"])

    def send(self, number: int, rank: int | None = None) -> None:
        """Signal one rank, or all."""
        for worker in self.process.children():
            with suppress(psutil.Error, OSError):
                if rank is None or worker.environ().get("RANK") == str(rank):
                    worker.send_signal(number)


def _exit_mark(config: Config) -> object:
    with suppress(OSError):
        about = (Path(config.run_dir) / "exit.json").stat()
        return about.st_ino, about.st_mtime_ns
    return None


def run(config: Config, ranks: int, sabotage: Sabotage | None = None) -> int:
    """Start and wait for the end."""
    return Job(config, ranks, sabotage).wait()


def outcome(run_dir: Path) -> dict[str, Any]:
    """Outcome of a run, the same however often it was disturbed: state, figures of each step, samples of each step."""
    newest = latest_intact(run_dir / "checkpoints")
    state = read_state(newest)
    tensors = {
        f"{kind}/{network}/{name}": values.numpy().tobytes()
        for network in networks_of(newest)
        for kind in kinds_of(newest, network)
        for name, values in load_full(newest, kind, network).items()
    }
    counters = ("step", "applied", "position", "ema_updates", "ema_power_updates", "health", "left_out", "amendments")
    kept = {name: state.get(name) for name in counters}
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    figures = [(e["step"], e["loss"], e["lr"], e["samples"]) for e in lines if "loss" in e]
    return {"tensors": tensors, "state": kept, "figures": figures, "samples": samples_by_step(run_dir)}


def losses(run_dir: Path) -> dict[int, float]:
    """The logged loss of each step; of a step that was taken twice, the later one."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def samples_by_step(run_dir: Path) -> dict[int, list[int]]:
    """The ledger: samples of each step, over all ranks."""
    steps: dict[int, list[int]] = {}
    for path in sorted((run_dir / "ledger").glob("rank-*.jsonl")):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            steps.setdefault(entry["step"], []).extend(entry["samples"])
    return {step: sorted(samples) for step, samples in sorted(steps.items())}


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines, without one that is being written; none where there is no file."""
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> Sequence[str]:
    """Names of the parts of two outcomes that differ."""
    return [name for name in ours if ours[name] != theirs[name]]
