"""Weights of samples: exact sums, shares of sources, windows of the size asked for, and errors of one line."""

from __future__ import annotations

import numpy as np
import pytest

from sora_train.config.schema import DataConfig, SourceConfig
from sora_train.core.cli import InputError
from sora_train.data.order.curriculum import build_stages
from sora_train.data.order.plan import Position
from sora_train.data.order.selection import Selection
from tests.data.order.test_plan import epoch_of, make_index, make_plan, visits_of


def test_weights_are_summed_over_the_usable_rows_that_pass() -> None:
    index = make_index(shards=2, per_shard=4, refused="")
    index.columns["score"] = np.array([0.1, 0.2, 0.3, 0.4, 1.0, 2.0, 3.0, 4.0])
    index.columns["refused"][7] = "checksum"
    selection = Selection(index, ("score > 0.1",) * 2, "score / 2 + 1")
    assert selection.per_shard().tolist() == [3, 3]
    assert selection.visits().tolist() == pytest.approx([3.45, 6.0], abs=3e-6)
    assert selection.weights(np.array([4, 5])).tolist() == [1.5, 2.0]
    assert Selection(index, ()).visits().tolist() == [4, 3]


def test_windows_hold_as_many_visits_as_asked_for() -> None:
    index = make_index(refused="", score=0.25)
    sizes = [sum(map(len, (slot for step in make_plan(index, weight="score", window=30).steps(0, 0) for slot in step)))]
    assert len(make_plan(index, window=30).windows(0)) == 12, "a shard is the least"
    assert len(make_plan(index, weight="score", window=30).windows(0)) == 4 and 15 < sizes[0] < 45


def test_a_weight_of_one_changes_nothing_but_the_hash() -> None:
    plain, weighted = make_plan(), make_plan(weight="1")
    assert epoch_of(plain) == epoch_of(weighted) and plain.hash != weighted.hash


def test_shares_of_sources_hold_beside_weights_of_samples() -> None:
    index = make_index(10, 100, refused="")
    index.columns["score"] = np.tile([0.5, 1.5], 500)
    sources = {"few": SourceConfig([], weight=3.0), "many": SourceConfig([], weight=1.0)}
    source_of = ["few"] * 2 + ["many"] * 8
    inputs = make_plan(index, weight="score").inputs
    plan = build_stages(index, source_of, DataConfig(sources), inputs).plans[0]
    visits = np.array([v.sample for v in visits_of(epoch_of(plan))])
    assert len(visits) == pytest.approx(1000, abs=60)
    assert np.mean(visits < 200) == pytest.approx(0.75, abs=0.03)
    assert np.mean(visits % 2) == pytest.approx(0.75, abs=0.04), "1.5 of 0.5 + 1.5"


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        ("score", r"data.weight='score' is nan for sample 'k3' \(1 such\)"),
        ("frames - 200", r"is -\d+ for sample 'k0'"),
        ("1 / (frames - frames)", "is inf for sample 'k0'"),
        ("frames * 1000", r"visits per epoch must be 0 to 1000"),
        ("scores", r"the index has no column 'scores'; did you mean 'score'"),
        ("frames > 3", "'frames > 3' is not a number"),
        ("kind", "'kind' is not a number"),
        ("2 if frames else 1", "is not allowed in a weight"),
        ("frames *", "is no expression: .* write e.g. score / 5"),
    ],
)
def test_a_wrong_weight_is_one_line(weight: str, said: str) -> None:
    index = make_index(shards=2, per_shard=4, refused="", kind="a", score=1.0)
    index.columns["key"] = np.array([f"k{n}" for n in range(8)], dtype=object)
    index.columns["score"][3] = np.nan
    with pytest.raises(InputError, match=said) as error:
        Selection(index, (), weight).visits()
    assert "\n" not in str(error.value)


def test_a_weight_of_nothing_is_said() -> None:
    plan = make_plan(make_index(score=0.0), weight="score")
    with pytest.raises(InputError, match=r"is data.weight='score' above 0 for any sample"):
        next(plan.from_position(Position()))
