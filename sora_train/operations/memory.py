"""Report of running out of memory as one line of advice instead of a traceback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from sora_train.config.schema import Config
from sora_train.core.cli import InputError
from sora_train.core.world import World
from sora_train.forecast.out_of_memory import advice, is_out_of_memory, line
from sora_train.training.parts import Place
from sora_train.training.report.profiling import dump_memory


@dataclass
class Whereabouts:
    """Source of the current step and phase of a run; `where` is set to the trainer's method once there is one."""

    where: Callable[[], Place] = lambda: Place(0, "start")


@contextmanager
def out_of_memory(config: Config, world: World) -> Iterator[Whereabouts]:
    """Context that turns out-of-memory errors into an InputError, which names the phase and a setting that should fit.

    For GPU memory a snapshot is written to run_dir/logs.
    """
    known = Whereabouts()
    try:
        yield known
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        path = Path(config.run_dir) / "logs" / f"rank-{world.rank}.memory.pickle"
        snapshot = dump_memory(path) if isinstance(error, torch.OutOfMemoryError) else ""

        available = (
            torch.cuda.mem_get_info()[1]
            if torch.cuda.is_available()
            else psutil.virtual_memory().total // world.local_size
        )
        place = known.where()
        change = advice(place.phase, config, world.size, available)
        raise InputError(line(place, change, snapshot)) from error
