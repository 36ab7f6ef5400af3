"""The consolidated index: the same plan and the same samples as the shards' own, small, and not of other shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sora_train.core.cli import InputError
from sora_train.core.cost import Cost, Geometry
from sora_train.data.index.consolidated import COLUMNS, consolidate, load_consolidated
from sora_train.data.index.index import Index, load_index
from sora_train.data.index.make import index_shards
from sora_train.data.index.places import index_path
from sora_train.data.order.plan import Plan, PlanInputs


def plan_of(index: Index, filters: tuple[str, ...] = ()) -> Plan:
    tasks, repeats = (("text_to_video", 1.0),), (1.0,) * len(index.shards)
    grid, cost = Geometry(4, 4, 2), Cost(1, 1)
    return Plan(index, PlanInputs(3, 4, 256, 0.9, 4096, 8.0, 17, 1024, "crop", tasks, repeats, grid, cost, filters))


def test_it_plans_and_reads_as_the_shards_own_indexes_do(corpus: list[str], tmp_path: Path) -> None:
    assert consolidate(corpus, tmp_path / "all") == 24
    own, mapped = load_index(corpus), load_consolidated(tmp_path / "all", corpus)
    assert len(mapped) == len(own) == 24 and mapped.usable.dtype == bool
    for filters in ((), ("duration >= 1 and caption_chars > 5",) * 3):
        assert plan_of(mapped, filters).steps(0, 0) == plan_of(own, filters).steps(0, 0)
    for row in range(24):
        assert mapped.member(row) == own.member(row)
        assert mapped.captions(row) == own.captions(row)
        assert (mapped.key[row], mapped.shard[row]) == (own.key[row], own.shard[row])
    with pytest.raises(InputError, match="no column 'codec'"):
        plan_of(mapped, ("codec == 'h264'",) * 3)


def test_it_takes_at_most_twenty_bytes_a_sample(corpus: list[str], tmp_path: Path) -> None:
    assert sum(np.dtype(kind).itemsize for kind in COLUMNS.values()) <= 20
    consolidate(corpus, tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.bin")) <= 20 * 24


def test_it_is_refused_where_it_is_not_of_these_shards(own_corpus: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no consolidated index at data.index=.*consolidate="):
        load_consolidated(tmp_path / "none", own_corpus)
    consolidate(own_corpus, tmp_path / "all")
    with pytest.raises(InputError, match="is of 3 shard"):
        load_consolidated(tmp_path / "all", own_corpus[::-1])
    (tmp_path / "all" / "fps.bin").write_bytes(b"0")
    with pytest.raises(InputError, match="fps.bin is not whole"):
        load_consolidated(tmp_path / "all", own_corpus)


def test_a_shard_that_changed_afterwards_is_noticed(own_corpus: list[str], tmp_path: Path) -> None:
    consolidate(own_corpus, tmp_path / "all")
    mapped = load_consolidated(tmp_path / "all", own_corpus)
    Path(own_corpus[1]).write_bytes(Path(own_corpus[0]).read_bytes())
    index_path(own_corpus[1]).unlink()
    index_shards(own_corpus, workers=1)
    assert mapped.member(3)[0] == own_corpus[0]
    with pytest.raises(InputError, match="changed after it was consolidated"):
        mapped.member(9)
