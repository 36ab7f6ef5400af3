"""Hydra launcher `torchrun`: every job of a sweep is a torchrun of its own. Hydra finds plugins in this package only.

python -m sora_train.train -m hydra/launcher=torchrun experiment=demo run_dir=runs/sweep optim.lr=1e-3,3e-3
"""

# Without postponed annotations: Hydra's scan loads this file outside sys.modules, where dataclasses can't resolve them.
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
from sora_train.operations.sweep import Job, run_jobs, summary


@dataclass
class TorchrunLauncherConf:
    """Keys under hydra.launcher."""

    _target_: str = "hydra_plugins.torchrun_launcher.TorchrunLauncher"
    nproc: int = 0  # ranks of a job; 0: every GPU, or 2 on a CPU
    jobs: int = 1  # at a time; 0: as many as there are GPUs for
    metric: str = "validation_loss"  # what a sweeper is told; "loss" where a run has none; a failed job is inf


ConfigStore.instance().store(group="hydra/launcher", name="torchrun", node=TorchrunLauncherConf, provider="sora_train")


class TorchrunLauncher(Launcher):
    """Runs jobs as processes, and tells the sweeper their figures."""

    def __init__(self, nproc: int, jobs: int, metric: str) -> None:
        self.nproc, self.jobs, self.metric = nproc, jobs, metric

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra hands over what a launcher needs."""
        self.context, self.task, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run one batch of jobs."""
        root = Path(str(self.config.run_dir))
        jobs = [self._job(root, initial_job_idx + place, list(line)) for place, line in enumerate(job_overrides)]
        results = run_jobs(jobs, self.nproc, self.jobs, self.metric)
        codes: list[int] = self.task.codes  # type: ignore[attr-defined]  # of compose.run_hydra
        codes += [result.code for result in results]
        summary(root, jobs, results)
        return [_returned(result.figure, job.overrides) for job, result in zip(jobs, results, strict=True)]

    def _job(self, root: Path, number: int, overrides: list[str]) -> Job:
        composed = self.context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(composed):
            composed.hydra.job.id, composed.hydra.job.num = str(number), number
        HydraConfig.instance().set_config(composed)
        kept = [o for o in overrides if not o.lstrip("+~").startswith(("hydra/", "hydra.", "run_dir="))]
        return Job(root / job_name(), kept)


def _returned(figure: float, overrides: list[str]) -> JobReturn:
    done: Any = JobReturn()
    done.overrides, done.status, done.return_value = overrides, JobStatus.COMPLETED, figure
    return done
