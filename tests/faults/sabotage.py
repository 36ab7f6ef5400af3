"""Faults that a rank of a trial plants in itself before it starts: in the classes and modules of its own process."""

from __future__ import annotations

import ctypes
import errno
import importlib.metadata
import json
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import sora_train.operations.build as assembly
from sora_train.config.schema import Config
from sora_train.operations import preflight
from sora_train.training.engine.zero import Engine
from sora_train.training.health import watch
from sora_train.training.state import checkpoint, checkpoint_format
from sora_train.training.trainer import Trainer

SKEWS = ("torch", "package", "config", "data set index", "code", "environment")
HANGS = ("stopped", "holds the GIL", "waits in a phase")
HELD_S = 0.15  # that a slowed save is held open for

_here: dict[str, Any] = {}  # what a sabotaged rank knows of the step that it is in


def slow_saves() -> None:
    """Hold every save open for a while, so that kills fall into it."""
    true = checkpoint.write_json

    def slow(path: Path, value: dict[str, Any]) -> dict[str, Any]:
        time.sleep(HELD_S / 2)
        return true(path, value)

    checkpoint.write_json = slow


def fill_disk(at: int, lasts: int) -> None:
    """Have this rank's writes to checkpoints fail from the `at`-th on, `lasts` times, with half a file left behind."""
    seen = [0]

    def failing(true: Callable[..., Any], place: int) -> Callable[..., Any]:
        def write(*arguments: Any) -> Any:
            seen[0] += 1
            if at <= seen[0] < at + lasts:
                arguments[place].write_bytes(b"x" * 100)
                raise OSError(errno.ENOSPC, "No space left on device")
            return true(*arguments)

        return write

    checkpoint_format.save_file = failing(checkpoint_format.save_file, 1)
    checkpoint.write_json = failing(checkpoint.write_json, 0)


def limit_files(nbytes: int) -> None:
    """Have the kernel cut every file of this process off at a size: a write beyond it fails with EFBIG."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, resource.RLIM_INFINITY))


def signal_in(
    phase: str, count: int, number: int, again_s: float = 0.0, target: int = 0, note: Path | None = None
) -> None:
    """Signal this process (or `target`) when it enters a phase for the `count`-th time, and after `again_s` once more.

    `note` then says in which step that was.
    """
    true, seen = watch.Watch.phase, [0]

    def entering(self: watch.Watch, name: str, slow: bool = False) -> None:
        true(self, name, slow)
        seen[0] += name == phase
        if name == phase and seen[0] == count:
            if note is not None:
                note.write_text(json.dumps({"done": self.step, "time": time.time()}))
            os.kill(target or os.getpid(), number)
            if again_s:
                threading.Timer(again_s, os.kill, (target or os.getpid(), number)).start()

    watch.Watch.phase = entering  # type: ignore[method-assign]


def hang_in(phase: str, count: int, kind: str, note: Path) -> None:
    """Stand still in a phase for ever: stopped as by SIGSTOP, holding the GIL, or waiting without it."""
    true, seen = watch.Watch.phase, [0]

    def entering(self: watch.Watch, name: str, slow: bool = False) -> None:
        true(self, name, slow)
        seen[0] += name == phase
        if name == phase and seen[0] == count:
            note.write_text(str(time.time()))
            if kind == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif kind == "holds the GIL":
                ctypes.PyDLL(None).sleep(3600)  # unlike CDLL, it doesn't let go of the GIL
            else:
                threading.Event().wait(3600)

    watch.Watch.phase = entering  # type: ignore[method-assign]


def multiply_loss(factor: Callable[[int], float], at: Callable[[Any], bool] = lambda position: True) -> None:
    """Multiply this rank's losses by a factor that depends on the step, where its place in the plan says so."""
    _know_the_factor(factor, at)
    backward = Engine.backward

    def going_back(self: Engine, loss_sum: torch.Tensor) -> None:
        if _here["factor"] != 1.0:
            loss_sum.data.mul_(_here["factor"])
            loss_sum = loss_sum * _here["factor"]
        backward(self, loss_sum)

    Engine.backward = going_back  # type: ignore[method-assign]


def multiply_gradient(factor: Callable[[int], float]) -> None:
    """The same for this rank's gradients alone: its losses stay finite."""
    _know_the_factor(factor, lambda position: True)
    backward = Engine.backward

    def going_back(self: Engine, loss_sum: torch.Tensor) -> None:
        if _here["factor"] != 1.0 and loss_sum.requires_grad:
            loss_sum.register_hook(lambda gradient: gradient * _here["factor"])
        backward(self, loss_sum)

    Engine.backward = going_back  # type: ignore[method-assign]


def _know_the_factor(factor: Callable[[int], float], at: Callable[[Any], bool]) -> None:
    begin = Trainer.begin

    def beginning(self: Trainer, batch: Any, agreed: Any) -> None:
        _here["factor"] = factor(self.step + 1) if at(batch.position) else 1.0
        begin(self, batch, agreed)

    Trainer.begin = beginning  # type: ignore[method-assign]


def note_changes(path: Path) -> None:
    """Write after every step which weights, moments and averages changed."""
    advance = Trainer.advance

    def advancing(self: Trainer, batch: Any, own_loss: float, applied: bool) -> None:
        advance(self, batch, own_loss, applied)
        now, before = _state(self), _here.get("tensors")
        _here["tensors"] = now
        changed = [name for name in now if before is None or not torch.equal(now[name], before[name])]
        counters = [self.engines.ema.updates, self.engines.powers.updates, self.applied]
        with path.open("a") as file:
            line = {"step": self.step, "changed": changed, "applied": applied, "counters": counters}
            file.write(json.dumps(line) + "\n")

    Trainer.advance = advancing  # type: ignore[method-assign]


def _state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of everything of this rank that a step may change: what it owns, and what forward uses."""
    engines = trainer.engines
    kinds = {"ema": engines.ema.values, **engines.powers.values}
    state = {f"{kind}/{f.name}": values[f.name] for kind, values in kinds.items() for f in engines.fragments}
    for f in engines.fragments:
        state |= {f"{kind}/{f.name}": values for kind, values in {"master": f.master, **f.states}.items()}
    for p, name in engines.first.names.items():  # under ZeRO-3 what a rank keeps; what it gathers comes from that
        state[f"forward/{name}"] = p.ds_tensor.data if engines.stage == 3 else p.data
    return {name: values.clone() for name, values in state.items()}


def differ(config: Config, kind: str) -> str:
    """Make this rank unlike the others in one of the kinds of `SKEWS`; returns what must be named."""
    if kind == "config":
        config.optim.lr *= 2
        return "key optim.lr"
    if kind == "environment":
        os.environ["NCCL_ALGO"] = "Ring"
        return "variable NCCL_ALGO"
    if kind == "code":
        true_hash = preflight.code_hash
        preflight.code_hash = lambda: true_hash()[::-1]
        return "code"
    if kind == "data set index":
        true_index = assembly.load_index

        def other_index(shards: list[str], *arguments: Any) -> Any:
            return true_index(shards[::-1], *arguments)  # as where a list of shards is sorted otherwise

        assembly.load_index = other_index
        return "data set index"
    name, true_version = {"torch": "torch", "package": "numpy"}[kind], importlib.metadata.version
    importlib.metadata.version = lambda package: "0.0.1" if package == name else true_version(package)
    return f"package {name}"
