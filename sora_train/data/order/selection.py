"""Which samples a plan may use: those the index has nothing against, that pass the filter of their shard."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sora_train.data.index.index import Index
from sora_train.data.order.filters import Filter

_SCANNED = 1 << 22  # rows that a scan of the whole index takes at once


class Selection:
    """Which rows of an index may be used: those without a cause against them that pass their shard's filter."""

    def __init__(self, index: Index, filters: Sequence[str]) -> None:
        self.index, self.filters = index, np.asarray(filters, dtype=object)
        self._usable = index.usable
        self._parsed = {text: Filter(text) for text in sorted(set(filters)) if text}
        for parsed in self._parsed.values():
            parsed.check(index.columns)

    def rows(self, shards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Usable rows of some shards, in the order of the shards, and the shard of each."""
        first, counts = self.index.first[shards], np.diff(self.index.first)[shards]
        rows = np.arange(counts.sum()) + np.repeat(first - (np.cumsum(counts) - counts), counts)
        of_shard = np.repeat(shards, counts)
        kept = np.array(self._usable[rows], dtype=bool)
        for text, parsed in self._parsed.items():
            mine = np.flatnonzero(self.filters[of_shard] == text)
            columns = {name: self.index.columns[name][rows[mine]] for name in parsed.columns}
            kept[mine] &= parsed(columns.__getitem__, len(mine))
        return rows[kept], of_shard[kept]

    def per_shard(self) -> np.ndarray:
        """How many rows of each shard may be used."""
        counts = np.zeros(len(self.index.shards), dtype=np.int64)
        sizes = np.cumsum(np.diff(self.index.first))
        for part in np.split(np.arange(len(counts)), np.flatnonzero(np.diff(sizes // _SCANNED)) + 1):
            counts += np.bincount(self.rows(part)[1], minlength=len(counts))
        return counts
