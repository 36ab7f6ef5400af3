"""Outcomes of every film and every shot: kept, dropped for a reason, or failed by a cause; and counts by stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.curation.ledger import write_lines
from data_tools.curation.rules import check_yield
from data_tools.curation.stage import Item, Outcome


@dataclass
class Yield:
    """Counts of a stage: items given, kept, dropped by reason, and failed by cause."""

    stage: str
    unit: str  # film or clip
    given: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        out = [f"{n} {reason}" for reason, n in (self.dropped + self.failed).most_common()]
        return f"{self.stage}: {self.kept} of {self.given} {self.unit}s" + (f" ({', '.join(out)})" if out else "")


class Outcomes:
    """The yields of the stages, in their order, and an entry for everything that was left out."""

    def __init__(self, strict: bool = False) -> None:
        self.yields: list[Yield] = []
        self.entries: list[dict[str, Any]] = []
        self.alarms: list[str] = []
        self._strict = strict

    def pass_through(self, stage: str, unit: str, results: Sequence[tuple[Item, Outcome]]) -> list[Item]:
        """Record the outcomes of a stage, and return the items that it keeps."""
        line = Yield(stage, unit, len(results))
        kept = []
        for item, outcome in results:
            if "kept" in outcome:
                line.kept += 1
                kept.append(item)
                continue
            status = "dropped" if "dropped" in outcome else "failed"
            reason, detail = outcome[status]
            getattr(line, status)[reason] += 1
            about = {"unit": unit, "id": item["id"], "film": item["name"], "stage": stage, "status": status}
            self.entries.append(about | {"reason": reason, "detail": detail})
        self.yields.append(line)
        alarm = check_yield(stage, line.kept, line.given, self._strict)
        self.alarms += [alarm] if alarm else []
        return kept

    def write(self, path: Path) -> None:
        """Write the entries as JSON lines."""
        write_lines(path, self.entries)
