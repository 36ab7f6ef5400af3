"""All metrics of this package, and the selection by name or group. Importing a module of metrics registers them."""

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
    """Build the metrics and distances of some names and groups.

    An unavailable metric of a group is left out and listed in `Judges.skipped`.

    Raises:
        InputError: A name is unknown, or a metric given by its own name is unavailable.
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
    """Replace groups by their metrics; maps each name to whether it was given itself rather than by a group."""
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
