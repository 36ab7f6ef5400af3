"""Every metric of this package, and the choice among them: importing a module of metrics registers what is in it."""

from __future__ import annotations

from collections.abc import Sequence

# ruff: noqa: F401  (the modules of metrics are imported to register them)
import sora_train.evaluation.completion
import sora_train.evaluation.demo
import sora_train.evaluation.distances
import sora_train.evaluation.motion
import sora_train.evaluation.networks
import sora_train.evaluation.pixels
from sora_train.core.cli import InputError, nearest
from sora_train.evaluation.metric import GROUPS, METRICS, Distance, Metric, Models, Unavailable
from sora_train.evaluation.results import Judges


def choose(names: Sequence[str], models: Models) -> Judges:
    """The metrics and distances of these names and groups.

    Raises InputError for an unknown name, and for a metric that was asked for by name and isn't available; of a group
    it is left out.
    """
    metrics: list[Metric] = []
    distances: list[Distance] = []
    skipped: list[str] = []
    for name, by_name in _expanded(names).items():
        try:
            built = METRICS[name].build(models)
        except Unavailable as error:
            if by_name:
                raise InputError(f"metrics={name}: {error}") from error
            skipped.append(f"{name}: {error}")
            continue
        if isinstance(built, Distance):
            distances.append(built)
        else:
            metrics.append(built)
    return Judges(metrics, distances, skipped)


def _expanded(names: Sequence[str]) -> dict[str, bool]:
    """Names of metrics in order, and whether each was named itself."""
    found: dict[str, bool] = {}
    for name in names:
        if name in METRICS:
            found[name] = True
        elif name in GROUPS:
            members = [entry.name for entry in METRICS.values() if name in entry.groups]
            found = dict.fromkeys(members, False) | found
        else:
            raise InputError(f"metrics={name}; {nearest(name, [*GROUPS, *METRICS])}")
    return found
