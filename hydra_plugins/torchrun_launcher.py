"""Hydra launcher `torchrun`: runs every job of a sweep under a torchrun of its own.

It is in this package because Hydra searches `hydra_plugins` for plugins.

python -m sora_train.train -m hydra/launcher=torchrun experiment=demo run_dir=runs/sweep optim.lr=1e-3,3e-3
"""

# Annotations aren't postponed: Hydra loads this file outside sys.modules, where dataclasses couldn't resolve them.
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from sora_train.config.hydra import job_name
from sora_train.operations.sweep import Job, config_flags, run_jobs, summary


@dataclass
class TorchrunLauncherConf:
    """Keys under hydra.launcher."""

    _target_: str = "hydra_plugins.torchrun_launcher.TorchrunLauncher"
    nproc: int = 0  # ranks of a job; 0: one per GPU, or 2 on a CPU
    jobs: int = 1  # jobs that run at the same time; 0: as many as the GPUs suffice for
    metric: str = "validation_loss"  # figure returned to the sweeper; "loss" if a run has none; inf for a failed job


ConfigStore.instance().store(group="hydra/launcher", name="torchrun", node=TorchrunLauncherConf, provider="sora_train")


class TorchrunLauncher(Launcher):
    """Runs jobs as processes, and returns their figures to the sweeper."""

    def __init__(self, nproc: int, jobs: int, metric: str) -> None:
        self.nproc, self.jobs, self.metric = nproc, jobs, metric

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store the context, job function and configuration that Hydra passes."""
        self.context, self.task, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run one batch of jobs."""
        root = Path(str(self.config.run_dir))
        jobs = [self._job(root, initial_job_idx + place, list(line)) for place, line in enumerate(job_overrides)]
        results = run_jobs(jobs, self.nproc, self.jobs, self.metric)
        codes: list[int] = self.task.codes  # type: ignore[attr-defined]  # set by config.hydra.run_hydra
        codes += [result.code for result in results]
        summary(root, jobs, results)
        return [_returned(result.figure, job.overrides) for job, result in zip(jobs, results, strict=True)]

    def _job(self, root: Path, number: int, overrides: list[str]) -> Job:
        composed = self.context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(composed):
            composed.hydra.job.id, composed.hydra.job.num = str(number), number
        HydraConfig.instance().set_config(composed)
        given = self.config.hydra.overrides.hydra  # Hydra's own, which a job's overrides leave out
        ours = [str(o) for o in given if o.startswith("hydra.searchpath=")]
        ours += [o for o in overrides if not o.lstrip("+~").startswith(("hydra/", "hydra.", "run_dir="))]
        return Job(root / job_name(), ours, config_flags(sys.argv[1:]))


def _returned(figure: float, overrides: list[str]) -> JobReturn:
    done: Any = JobReturn()
    done.overrides, done.status, done.return_value = overrides, JobStatus.COMPLETED, figure
    return done
