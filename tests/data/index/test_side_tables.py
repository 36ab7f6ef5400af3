"""Side tables: the right value for each sample, errors of one line, and a plan that follows them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import index as indexing
from sora_train.core.cli import InputError
from sora_train.core.cost import Cost, Geometry
from sora_train.data.index.consolidated import consolidate, load_consolidated
from sora_train.data.index.index import Index, load_index
from sora_train.data.index.make import index_shards
from sora_train.data.index.side_tables import SideTables
from sora_train.data.loader import passes_of_rank
from sora_train.data.order.plan import Plan, PlanInputs
from sora_train.data.read.store import Store
from tests.data.servers import WebServer

FIRST_EPOCH = [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 2, 3]  # visits at seed 3
KEYS = [f"{n:05d}" for n in range(24)]
SCORES = [n / 8 for n in range(24)]


def table(path: Path, **columns: Any) -> str:
    """A Parquet file of these columns; `key` is that of every sample unless given."""
    path.parent.mkdir(exist_ok=True, parents=True)
    pq.write_table(pa.table({"key": KEYS} | columns), path)
    return str(path)


def joined(shards: list[str], *patterns: str) -> Index:
    return SideTables(patterns, Store()).join(load_index(shards))


def plan_of(index: Index, text: str = "", weight: str = "") -> Plan:
    inputs = PlanInputs(
        3, 4, 256, 0.9, 4096, 8.0, 17, 1024, "crop", (("text_to_video", 1.0),), (1.0,) * len(index.shards),
        Geometry(4, 4, 2), Cost(1, 1), (text,) * len(index.shards), weight=weight,
    )  # fmt: skip
    return Plan(index, inputs)


def visited(plan: Plan, epoch: int = 0, ranks: int = 1) -> list[int]:
    """The samples of an epoch, as so many ranks take them."""
    passes = [passes_of_rank(plan.inputs.slots, rank, ranks, None) for rank in range(ranks)]
    steps = [step for window in range(len(plan.windows(epoch))) for step in plan.steps(epoch, window)]
    return [v.sample for step in steps for mine in passes for one in mine for slot in one for v in step[slot]]


def test_each_sample_has_its_value_whatever_the_order_of_the_table(corpus: list[str], tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(24)
    path = table(
        tmp_path / "all.parquet", key=[KEYS[n] for n in order] + ["other"], score=[SCORES[n] for n in order] + [9.0],
        count=[int(n) for n in order] + [0], good=[bool(n % 2) for n in order] + [None],
        kind=pa.array([f"k{n % 3}" for n in order] + [None]).dictionary_encode(), vector=[[0.5, 1.0]] * 25,
    )  # fmt: skip
    index = joined(corpus, path)
    assert index.key.tolist() == KEYS
    assert index.score.tolist() == SCORES and index.count.tolist() == list(range(24))
    assert index.good.tolist() == [float(n % 2) for n in range(24)]
    assert index.kind.tolist() == [f"k{n % 3}" for n in range(24)] and "vector" not in index.columns
    assert set(visited(plan_of(index, 'score >= 1 and kind != "k1"'))) == {n for n in range(8, 24) if n % 3 != 1}


def test_files_of_one_entry_are_parts_and_entries_are_tables(corpus: list[str], tmp_path: Path) -> None:
    for n in range(3):
        mine = slice(8 * n, 8 * n + 8)
        table(tmp_path / f"scores/{n}.parquet", key=KEYS[mine], score=SCORES[mine])
    flow = table(tmp_path / "flow.parquet", flow=[None, *range(1, 24)])
    index = joined(corpus, f"{tmp_path}/scores/*.parquet", flow)
    assert index.score.tolist() == SCORES and np.isnan(index.flow[0]) and index.flow[1:].tolist() == list(range(1, 24))


def test_a_column_shard_tells_equal_keys_apart(
    tmp_path: Path, write_samples: Callable[..., str], make_sample: Callable[..., dict[str, object]]
) -> None:
    shards = [write_samples(tmp_path / f"{name}.tar", [make_sample(0), make_sample(1)]) for name in ("a", "b")]
    index_shards(shards, workers=1)
    plain = table(tmp_path / "plain.parquet", key=KEYS[:2], score=[1.0, 2.0])
    with pytest.raises(InputError, match=r"key '00000' is in several shards; add a column `shard`"):
        joined(shards, plain)
    named = table(
        tmp_path / "named.parquet", key=KEYS[:2] * 2, shard=["a.tar", "a", "b", f"{tmp_path}/b.tar"],
        score=[1.0, 2.0, 3.0, 4.0],
    )  # fmt: skip
    assert joined(shards, named).score.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert consolidate(shards, tmp_path / "all", side_tables=[named]) == 4
    with pytest.raises(InputError, match="is in several shards"):
        consolidate(shards, tmp_path / "all", side_tables=[plain])


def test_clips_that_were_encoded_before_have_the_row_of_their_video(corpus: list[str], tmp_path: Path) -> None:
    index = load_index(corpus[:1])
    index.columns["encoded"] = np.full(8, "{}", dtype=object)
    index.columns["key"] = np.array([*KEYS[:6], "00005+1", "00005+2"], dtype=object)
    path = table(tmp_path / "all.parquet", score=SCORES)
    scores = SideTables([path], Store()).join(index).columns["score"].tolist()
    assert scores == [*SCORES[:6], SCORES[5], SCORES[5]]


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "missing key": ({"key": KEYS[:20], "score": SCORES[:20]}, r"no row for 4 sample\(s\) such as '00020' of .*2.tar"),
    "double key": ({"key": [*KEYS, "00003"], "score": [*SCORES, 1.0]}, "key '00003' has several rows"),
    "null key": ({"key": [*KEYS, None], "score": [*SCORES, 1.0]}, r"1 row\(s\) have no key"),
    "column of the index": ({"duration": SCORES}, "column 'duration' is in the index too; rename it"),
    "number as key": ({"key": list(range(24))}, "column `key` of .* is int64; keys are text"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(corpus: list[str], tmp_path: Path, name: str) -> None:
    columns, said = MISTAKES[name]
    with pytest.raises(InputError, match=said) as error:
        joined(corpus, table(tmp_path / "all.parquet", **columns))
    assert "\n" not in str(error.value) and "data.side_tables" in str(error.value)


def test_wrong_files_are_one_line(corpus: list[str], tmp_path: Path) -> None:
    good = table(tmp_path / "good.parquet", score=SCORES)
    pq.write_table(pa.table({"name": KEYS}), tmp_path / "unkeyed.parquet")
    (tmp_path / "text.parquet").write_text("key,score\n00000,1\n")
    other = table(tmp_path / "parts/b.parquet", key=["x"], other=[1.0])
    table(tmp_path / "parts/a.parquet", score=SCORES)
    for patterns, said in (
        ([f"{tmp_path}/none/*.parquet"], "no side table at .* check data.side_tables"),
        ([f"{tmp_path}/unkeyed.parquet"], "has no column `key`; it has name"),
        ([f"{tmp_path}/text.parquet"], "is no Parquet file"),
        ([good, str(Path(other).with_name("a.parquet"))], "column 'score' is in data.side_tables=.*good.parquet too"),
        ([f"{tmp_path}/parts/*.parquet"], "b.parquet and .*a.parquet have other columns"),
    ):
        with pytest.raises(InputError, match=said) as error:
            joined(corpus, *patterns)
        assert "\n" not in str(error.value)


def test_a_changed_table_is_another_plan_and_a_moved_one_is_not(corpus: list[str], tmp_path: Path) -> None:
    one = plan_of(joined(corpus, table(tmp_path / "one.parquet", score=SCORES))).hash
    moved = plan_of(joined(corpus, table(tmp_path / "elsewhere/two.parquet", score=SCORES))).hash
    changed = plan_of(joined(corpus, table(tmp_path / "one.parquet", score=[*SCORES[:-1], 2.5]))).hash
    assert one == moved and len({one, changed, plan_of(load_index(corpus)).hash}) == 3


def test_a_consolidated_index_holds_the_tables_that_it_was_made_with(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = table(tmp_path / "s/scores.parquet", score=SCORES, kind=["a"] * 24)
    arguments = ["index", *corpus, f"consolidate={tmp_path}/all", f"side_table={tmp_path}/s/*.parquet"]
    monkeypatch.setattr("sys.argv", arguments)
    assert indexing.main() == 0
    mapped, own = load_consolidated(tmp_path / "all", corpus, None, [path]), joined(corpus, path)
    assert mapped.columns["score"].tolist() == SCORES and isinstance(mapped.columns["score"], np.memmap)
    for asked in (("score > 1", ""), ("", "score / 2"), ("score > 1", "score / 2")):
        assert visited(plan_of(mapped, *asked)) == visited(plan_of(own, *asked))
    with pytest.raises(InputError, match="no column 'kind'"):
        plan_of(mapped, "kind == 'a'")
    for tables in ([], [table(tmp_path / "s/scores.parquet", score=SCORES[::-1])]):
        with pytest.raises(InputError, match=r"made with other side tables .*consolidate="):
            load_consolidated(tmp_path / "all", corpus, None, tables)


def test_tables_may_be_remote(corpus: list[str], tmp_path: Path) -> None:
    table(tmp_path / "scores.parquet", score=SCORES)
    server = WebServer(tmp_path)
    tables = SideTables([f"{server.url}/scores.parquet"], Store())
    assert tables.join(load_index(corpus)).columns["score"].tolist() == SCORES
    with pytest.raises(InputError, match=re.escape(f"{server.url}/none.parquet")):
        SideTables([f"{server.url}/none.parquet"], Store())
    server.shutdown()


@pytest.mark.parametrize("ranks", [1, 1024])
def test_a_score_filters_and_weights_what_any_number_of_ranks_takes(
    corpus: list[str], tmp_path: Path, ranks: int
) -> None:
    plan = plan_of(joined(corpus, table(tmp_path / "all.parquet", score=SCORES)), "score > 0.5", "score")
    counts = np.zeros(24)
    for epoch in range(400):
        times = np.bincount(visited(plan, epoch, ranks if epoch < 3 else 1), minlength=24)
        assert all(np.floor(score) <= n <= np.ceil(score) for n, score in zip(times[5:], SCORES[5:], strict=True))
        counts += times
    assert not counts[:5].any(), "filtered out"
    assert counts[5:] / 400 == pytest.approx(np.array(SCORES[5:]), abs=0.08)  # three standard deviations
    assert visited(plan, 0, ranks) != visited(plan, 1, ranks)
    assert sorted(visited(plan, 7, ranks)) == sorted(visited(plan, 7, 1))
    assert np.bincount(visited(plan, 0, ranks), minlength=24).tolist() == FIRST_EPOCH, "the same on every machine"


def test_samples_without_captions_need_their_rows_from_every_kind_of_index(
    tmp_path: Path, write_samples: Callable[..., str], make_sample: Callable[..., dict[str, Any]]
) -> None:
    bare = {name: value for name, value in make_sample(2).items() if name != "txt"}
    shards = [write_samples(tmp_path / "s.tar", [make_sample(0), bare])]
    index_shards(shards, workers=1)
    path = table(tmp_path / "scores.parquet", key=KEYS[:1], score=SCORES[:1])
    consolidate(shards, tmp_path / "all", side_tables=[path])
    assert joined(shards, path).usable.tolist() == [True, False]
    assert load_consolidated(tmp_path / "all", shards, None, [path]).usable.tolist() == [True, False]
    said = []
    for load in (
        lambda: SideTables([path], Store()).join(load_index(shards, captioned=False)),
        lambda: load_consolidated(tmp_path / "all", shards, None, [path], captioned=False),
    ):
        with pytest.raises(InputError, match=r"has no row for 1 sample\(s\) such as '00002'") as error:
            load()
        said.append(str(error.value))
    assert said[0] == said[1]
