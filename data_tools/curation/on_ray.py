"""The engine for a cluster: runs the same stages with Ray Data. A row is an item (paths and spans, never pictures).

All machines must see the folders of films and of the output under the same paths.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_tools.curation.stage import Item, Outcome, Stage, attempt
from sora_train.core.cli import InputError

_TOGETHER = 10  # items of a block: with fewer, Ray's overhead is a tenth of the work on a clip
_TRIES = 2  # attempts of a single item, after its block was lost


class RayEngine:
    """Runs stages on a Ray cluster: that of RAY_ADDRESS, or a local one of `workers` processes.

    Raises InputError if Ray isn't installed.
    """

    def __init__(self, workers: int | None) -> None:
        try:
            import ray
        except ImportError as error:
            raise InputError("engine=ray needs Ray: pip install -e '.[ray]'") from error
        self._ray: Any = ray
        if not ray.is_initialized():
            ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)

    def run(self, stage: Stage, items: Sequence[Item], folder: Path) -> Iterator[tuple[int, Outcome]]:
        """Yield each item's number with its outcome as it is done."""
        from ray.data import DataContext

        context = DataContext.get_current()
        context.max_errored_blocks = -1  # a film that kills its worker must not stop the others
        context.enable_progress_bars = False
        rows = [{"number": number, "item": json.dumps(item)} for number, item in enumerate(items)]
        blocks = max(1, len(rows) // _TOGETHER)

        def work(row: dict[str, Any]) -> dict[str, Any]:
            return {"number": row["number"], "outcome": json.dumps(attempt(stage, json.loads(row["item"]), folder))}

        left = set(range(len(items)))
        for row in self._ray.data.from_items(rows, override_num_blocks=blocks).map(work).iter_rows():
            left.discard(row["number"])
            yield row["number"], json.loads(row["outcome"])
        yield from self._alone(stage, items, sorted(left), folder)

    def close(self) -> None:
        """Disconnect from the cluster; a local one ends."""
        self._ray.shutdown()

    def _alone(
        self, stage: Stage, items: Sequence[Item], numbers: Sequence[int], folder: Path
    ) -> Iterator[tuple[int, Outcome]]:
        """Run the items of lost blocks, each as a separate task."""
        task = self._ray.remote(max_retries=_TRIES - 1)(attempt)
        waiting = {number: task.remote(stage, items[number], folder) for number in numbers}
        for number, reference in waiting.items():
            try:
                yield number, self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                yield number, {"failed": ["crash", str(error).splitlines()[0][:200]]}
