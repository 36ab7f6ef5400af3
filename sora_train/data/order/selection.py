"""The samples that a plan may use, and how often: those without a cause against them that pass the filter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sora_train.core.cli import InputError
from sora_train.data.index.index import Index
from sora_train.data.order.filters import Filter, Weight

_SCANNED = 1 << 22  # rows that a scan of the whole index takes at once
_UNIT = 1 << 20  # of weights: sums of integers are the same on every machine
_MOST = 1000  # visits of a sample per epoch; a weight above is a wrong column, and sums stay inside 64 bits


class Selection:
    """Rows of an index that may be used: those without a cause against them that pass their shard's filter.

    Args:
        index: With the columns that filters and weight name.
        filters: Of each shard, or none at all.
        weight: Expression for the visits of a sample per epoch; empty: one each.
    """

    def __init__(self, index: Index, filters: Sequence[str], weight: str = "") -> None:
        self.index, self.filters = index, np.asarray(filters, dtype=object)
        self._usable = index.usable
        self._parsed = {text: Filter(text) for text in sorted(set(filters)) if text}
        self._weight = Weight(weight) if weight else None
        for parsed in (*self._parsed.values(), *([self._weight] if self._weight else [])):
            parsed.check(index.columns)

    def rows(self, shards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Usable rows of some shards, in the order of the shards, and the shard of each."""
        first, counts = self.index.first[shards], np.diff(self.index.first)[shards]
        rows = np.arange(counts.sum()) + np.repeat(first - (np.cumsum(counts) - counts), counts)
        of_shard = np.repeat(shards, counts)
        kept = np.array(self._usable[rows], dtype=bool)
        for text, parsed in self._parsed.items():
            mine = np.flatnonzero(self.filters[of_shard] == text)
            kept[mine] &= parsed(self._columns(parsed.columns, rows[mine]), len(mine))
        return rows[kept], of_shard[kept]

    def weights(self, rows: np.ndarray) -> np.ndarray:
        """Visits of each of some usable rows per epoch, before its source's rate: multiples of 2**-20.

        Raises InputError for a weight that is below 0, above 1000, or not a number.
        """
        return self._units(rows) / _UNIT

    def per_shard(self) -> np.ndarray:
        """Number of rows of each shard that may be used."""
        return self._sums(np.ones_like)

    def visits(self) -> np.ndarray:
        """Sum of the weights of each shard's rows; without a weight, `per_shard`."""
        return self._sums(self._units) / _UNIT if self._weight else self.per_shard()

    def _units(self, rows: np.ndarray) -> np.ndarray:
        if self._weight is None:
            return np.full(len(rows), _UNIT)
        values = self._weight(self._columns(self._weight.columns, rows), len(rows))
        wrong = np.flatnonzero(~((values >= 0) & (values <= _MOST)))
        if len(wrong):
            text, key, value = self._weight.text, self.index.key[rows[wrong[0]]], values[wrong[0]]
            raise InputError(
                f"data.weight={text!r} is {value:g} for sample {str(key)!r} ({len(wrong)} such); visits per epoch "
                f"must be 0 to {_MOST}: filter it out, or change the weight"
            )
        return np.rint(values * _UNIT).astype(np.int64)

    def _sums(self, of_rows: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """The sum over each shard's usable rows of an integer of each row."""
        sums = np.zeros(len(self.index.shards), dtype=np.int64)
        sizes = np.cumsum(np.diff(self.index.first))
        for part in np.split(np.arange(len(sums)), np.flatnonzero(np.diff(sizes // _SCANNED)) + 1):
            rows, of_shard = self.rows(part)
            np.add.at(sums, of_shard, of_rows(rows))
        return sums

    def _columns(self, names: Sequence[str], rows: np.ndarray) -> Callable[[str], np.ndarray]:
        return {name: self.index.columns[name][rows] for name in names}.__getitem__
