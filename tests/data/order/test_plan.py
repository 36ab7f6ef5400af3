"""The plan: every sample once an epoch, the same for any number of ranks, exact at every position, in its budget."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sora_train.config.schema import DataConfig, SourceConfig, StageConfig
from sora_train.core.batch import Visit
from sora_train.core.cli import InputError
from sora_train.core.cost import Cost, Geometry
from sora_train.data.index.index import Index
from sora_train.data.loader import passes_of_rank
from sora_train.data.order.curriculum import Stages, build_stages
from sora_train.data.order.plan import Plan, PlanInputs, Position
from sora_train.data.order.times import source_frames
from sora_train.data.order.visits import cut_pieces, fit_sizes

MakePlan = Callable[..., Plan]


def make_index(shards: int = 12, per_shard: int = 40, fingerprint: str = "f", **fixed: Any) -> Index:
    """A large index without files: mixed sizes, lengths and rates, one image in ten, one in fifty refused."""
    n = shards * per_shard
    rng = np.random.default_rng(1)
    image = rng.random(n) < 0.1
    sizes = np.array([(64, 64), (48, 96), (96, 48), (32, 32), (120, 68)])[rng.integers(0, 5, n)]
    columns = {
        "frames": np.where(image, 1, rng.integers(2, 120, n)),
        "fps": np.where(image, 0.0, np.array([8.0, 16.0, 23.976, 30.0])[rng.integers(0, 4, n)]),
        "height": sizes[:, 0],
        "width": sizes[:, 1],
        "refused": np.where(np.arange(n) % 50 == 7, "checksum", "").astype(object),
    }
    for name, value in fixed.items():
        columns[name] = np.full(n, value, dtype=object if isinstance(value, str) else None)
    shard = np.repeat(np.arange(shards), per_shard)
    first = np.arange(0, n + 1, per_shard)
    return Index(tuple(f"s{i}" for i in range(shards)), shard, first, columns, fingerprint)


def test_epochs_are_counted_in_steps() -> None:
    plan = make_plan()
    taken = Counter(position.epoch for position, _ in islice(plan.from_position(Position()), plan.count(2)))
    assert sorted(taken) == [0, 1] and plan.count(2) == taken[0] + taken[1] and plan.count(1) == taken[0]
    assert plan.count(1.5) == taken[0] + round(0.5 * taken[1]) and plan.count(1e-9) == 1
    position, _ = next(islice(plan.from_position(Position()), plan.count(2), None))
    assert position == Position(2, 0, 0), "the next step begins the next epoch"


def make_plan(index: Index | None = None, **changes: Any) -> Plan:
    index = make_index() if index is None else index
    inputs: dict[str, Any] = {
        "seed": 3, "slots": 8, "max_tokens": 768, "fill": 0.85, "window": 160, "fps": 8.0, "max_frames": 17,
        "max_pixels": 1024, "fit": "crop", "tasks": (("extension", 0.2), ("text_to_video", 0.8)),
        "repeats": (1.0,) * len(index.shards), "geometry": Geometry(4, 4, 2), "cost": Cost(1000, 2),
    }  # fmt: skip
    return Plan(index, PlanInputs(**inputs | changes))


def epoch_of(plan: Plan, epoch: int = 0) -> list[list[list[Visit]]]:
    return [step for w in range(len(plan.windows(epoch))) for step in plan.steps(epoch, w)]


def visits_of(steps: list[list[list[Visit]]]) -> list[Visit]:
    return [visit for step in steps for slot in step for visit in slot]


def test_every_usable_sample_is_visited_exactly_once_an_epoch() -> None:
    plan = make_plan()
    usable = np.flatnonzero(plan.index.usable).tolist()
    assert 0 < len(usable) < len(plan.index)
    for epoch in (0, 1):
        assert sorted(v.sample for v in visits_of(epoch_of(plan, epoch))) == usable


def test_epochs_differ_in_order_and_in_every_visits_seed() -> None:
    plan = make_plan()
    first, second = (visits_of(epoch_of(plan, epoch)) for epoch in (0, 1))
    assert [v.sample for v in first] != [v.sample for v in second]
    assert not {v.seed for v in first} & {v.seed for v in second}
    assert len({v.seed for v in first}) == len(first)


def test_the_plan_is_a_pure_function_of_its_inputs() -> None:
    one, two = make_plan(), make_plan()
    assert one.hash == two.hash
    assert epoch_of(one) == epoch_of(two)
    others = [make_plan(seed=4), make_plan(slots=4), make_plan(fps=16.0), make_plan(make_index(fingerprint="g"))]
    assert len({one.hash, *(other.hash for other in others)}) == 5


def test_a_window_can_be_planned_alone() -> None:
    assert len(make_plan().windows(0)) > 2
    assert make_plan().steps(0, 2) == [step for window, step in _by_window(make_plan()) if window == 2]


def _by_window(plan: Plan) -> list[tuple[int, list[list[Visit]]]]:
    return [(w, step) for w in range(len(plan.windows(0))) for step in plan.steps(0, w)]


@pytest.mark.parametrize("slots", [8, 7])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 64, 1024])
def test_the_ranks_together_take_every_slot_once(slots: int, ranks: int) -> None:
    for accumulation in {None, 1, -(-slots // ranks)}:
        passes = [passes_of_rank(slots, rank, ranks, accumulation) for rank in range(ranks)]
        assert sorted(slot for mine in passes for one in mine for slot in one) == list(range(slots))
        assert len({len(mine) for mine in passes}) == 1, "every rank takes part in as many passes"


def test_more_passes_than_slots_of_a_rank_is_refused() -> None:
    assert passes_of_rank(8, 1, 2, 2) == [[1, 5], [3, 7]]
    with pytest.raises(InputError, match=r"parallel.accumulation=5 .* 4 slot"):
        passes_of_rank(8, 0, 2, 5)


def test_resuming_at_any_position_goes_on_as_if_never_stopped() -> None:
    count = len(epoch_of(make_plan())) + 5  # into the second epoch
    whole = list(islice(make_plan().from_position(Position()), count))
    assert whole[-1][0].epoch == 1
    for at, (position, _) in enumerate(whole):
        if at:  # the trainer stands one step behind the last that it took
            before = whole[at - 1][0]
            position = Position(before.epoch, before.window, before.step + 1)
        resumed = list(islice(make_plan().from_position(position), min(6, count - at)))
        assert resumed == whole[at : at + 6]


def test_no_slot_is_over_the_budget_and_no_step_is_empty() -> None:
    plan = make_plan()
    steps = epoch_of(plan)
    tokens = [[sum(plan.inputs.geometry.tokens(*v.size) for v in slot) for slot in step] for step in steps]
    assert max(max(step) for step in tokens) <= 768
    assert min(sum(step) for step in tokens) > 0
    assert all(len(step) == 8 for step in steps)


def test_slots_of_a_step_cost_nearly_the_same_and_are_well_filled() -> None:
    plan = make_plan(make_index(shards=24, per_shard=80), window=4096)
    steps = epoch_of(plan)
    loads = np.array(
        [[plan.inputs.cost.training([plan.inputs.geometry.tokens(*v.size) for v in s]) for s in step] for step in steps]
    )
    assert (loads.mean(1) / loads.max(1)).mean() > 0.93
    tokens = sum(plan.inputs.geometry.tokens(*v.size) for v in visits_of(steps))
    assert 0.80 < tokens / (len(steps) * 8 * 768) <= 0.85, "close under the wanted fill"


def test_every_step_has_the_whole_mix() -> None:
    plan = make_plan(make_index(shards=24, per_shard=80), window=4096)
    shares = [np.mean([v.frames == 1 for slot in step for v in slot]) for step in epoch_of(plan)]
    assert 0.05 < np.mean(shares) < 0.2
    assert np.std(shares) < 0.04


def test_frames_are_whole_latent_frames_inside_the_video_at_the_wanted_rate() -> None:
    plan = make_plan()
    for v in visits_of(epoch_of(plan)):
        fps, available = plan.index.fps[v.sample], plan.index.frames[v.sample]
        taken = source_frames(v, float(fps))
        assert (v.frames - 1) % 4 == 0 and v.frames <= 17
        assert len(taken) == v.frames and taken[0] == v.first and taken[-1] < available
        assert v.fps == (8.0 if fps else 0.0)


@pytest.mark.parametrize("fps", [3.0, 5.0, 8.0, 16.0, 23.976, 30.0])
def test_a_clip_has_the_wanted_rate_and_with_0_that_of_its_source(fps: float) -> None:
    index = make_index(2, 10, fps=fps, frames=200, refused="")
    assert {v.fps for v in visits_of(epoch_of(make_plan(index)))} == {8.0}
    own = visits_of(epoch_of(make_plan(index, fps=0.0)))
    assert {v.fps for v in own} == {fps}
    assert {b - a for v in own for a, b in pairwise(source_frames(v, fps))} == {1}


def test_the_first_frame_is_drawn_from_the_whole_video() -> None:
    plan = make_plan(make_index(10, 100, fps=8.0, frames=20, refused=""), window=10_000)
    assert Counter(v.first for v in visits_of(epoch_of(plan))).keys() == {0, 1, 2, 3}


def test_repeats_may_be_fractional() -> None:
    index = make_index(10, 100, refused="")
    counts = Counter(v.sample for v in visits_of(epoch_of(make_plan(index, repeats=(2.5,) * 5 + (0.5,) * 5))))
    often = [counts[row] for row in range(500)]
    seldom = [counts[row] for row in range(500, 1000)]
    assert set(often) == {2, 3} and set(seldom) == {0, 1}
    assert 2.4 < np.mean(often) < 2.6 and 0.4 < np.mean(seldom) < 0.6


def test_two_visits_of_one_epoch_differ() -> None:
    index = make_index(1, 30, refused="")
    seeds = [v.seed for v in visits_of(epoch_of(make_plan(index, repeats=(3.0,))))]
    assert len(seeds) == len(set(seeds)) == 90


def test_a_fraction_takes_other_samples_every_epoch() -> None:
    plan = make_plan(make_index(10, 100, refused=""), repeats=(0.5,) * 10)
    first, second = ({v.sample for v in visits_of(epoch_of(plan, e))} for e in (0, 1))
    assert 0.2 < len(first & second) / 1000 < 0.3


def test_tasks_are_drawn_by_weight_and_single_frames_are_images() -> None:
    plan = make_plan(make_index(20, 100, refused=""), tasks=(("a", 0.0), ("b", 1.0), ("c", 3.0)))
    visits = visits_of(epoch_of(plan))
    assert all((v.task == "image") == (v.frames == 1) for v in visits)
    counts = Counter(v.task for v in visits if v.frames > 1)
    assert counts.keys() == {"b", "c"}
    assert 0.70 < counts["c"] / counts.total() < 0.80


def test_a_budget_that_cannot_hold_one_frame_is_refused() -> None:
    with pytest.raises(InputError, match=r"data.max_tokens=15 can't hold one frame of data.max_pixels=1024"):
        make_plan(max_tokens=15)
    clips = visits_of(epoch_of(make_plan(max_tokens=16)))
    assert {v.frames for v in clips if v.crop[2:] == (32, 32)} == {1}, "longer clips are cut to what fits"


def test_a_plan_without_a_usable_sample_says_so() -> None:
    with pytest.raises(InputError, match="no sample is usable"):
        next(make_plan(make_index(2, 5, refused="checksum")).from_position(Position()))


SIZES = [
    # height, width, max_pixels, what comes out, what is resized to before the crop
    (64, 64, 1024, (32, 32), (32, 32)),
    (48, 96, 1024, (24, 40), (24, 48)),
    (96, 48, 1024, (40, 24), (48, 24)),
    (32, 32, 4096, (32, 32), (32, 32)),
    (30, 30, 4096, (24, 24), (24, 24)),
    (5, 5, 4096, (8, 8), (8, 8)),
    (8, 4000, 64, (8, 8), (8, 4000)),
]


@pytest.mark.parametrize(("height", "width", "limit", "size", "resized"), SIZES)
def test_sizes_that_fit(height: int, width: int, limit: int, size: tuple[int, int], resized: tuple[int, int]) -> None:
    resize, crop = fit_sizes(np.array([height]), np.array([width]), limit, 8, "crop")
    assert (tuple(crop[0, 2:].tolist()), tuple(resize[0].tolist())) == (size, resized)
    assert crop[0, :2].tolist() == [(resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2]
    resize, crop = fit_sizes(np.array([height]), np.array([width]), limit, 8, "stretch")
    assert resize[0].tolist() == crop[0, 2:].tolist() == list(size)
    assert crop[0, :2].tolist() == [0, 0]


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([64, 1024, 102400]), st.sampled_from([8, 16]))
def test_any_size_fits_the_grid_the_limit_and_the_source(height: int, width: int, limit: int, multiple: int) -> None:
    limit = max(limit, multiple**2)
    resize, crop = (x[0].tolist() for x in fit_sizes(np.array([height]), np.array([width]), limit, multiple, "crop"))
    top, left, h, w = crop
    assert h % multiple == 0 and w % multiple == 0 and multiple**2 <= h * w <= limit
    assert h <= max(height, multiple) and w <= max(width, multiple), "never larger than the source"
    assert 0 <= top <= resize[0] - h and 0 <= left <= resize[1] - w


def test_the_visits_of_a_long_clip_cover_all_of_it() -> None:
    """Any P + 1 visits in a row show every frame that P pieces of a clip can hold."""
    for available, wanted in ((20, 17), (34, 17), (100, 17), (101, 9), (17, 17), (1, 1)):
        pieces = -(-available // wanted)
        for seed in range(20):
            turns = np.arange(3 * (pieces + 1))
            one = np.ones_like(turns)
            first = cut_pieces(available * one, wanted * one, turns, seed * one)
            assert first.min() >= 0 and first.max() <= available - wanted
            for lap in range(2):  # whole rounds begin at another visit for each clip
                seen = {int(f) + n for f in first[lap * (pieces + 1) : (lap + 2) * (pieces + 1)] for n in range(wanted)}
                assert seen == set(range(available)), (available, wanted, seed)


def test_successive_epochs_show_all_of_a_long_video() -> None:
    plan = make_plan(make_index(2, 20, fps=8.0, frames=60, height=32, width=32, refused=""))
    seen: dict[int, set[int]] = {}
    for epoch in range(2 * (4 + 1)):
        for v in visits_of(epoch_of(plan, epoch)):
            seen.setdefault(v.sample, set()).update(range(v.first, v.first + v.frames))
    assert all(frames == set(range(60)) for frames in seen.values()) and len(seen) == 40


def test_a_filter_leaves_out_what_it_says_and_counts_it() -> None:
    index = make_index()
    plan = make_plan(index, filters=("height >= 48 and frames > 1",) * 12)
    kept = np.flatnonzero(index.usable & (index.height >= 48) & (index.frames > 1)).tolist()
    assert sorted(v.sample for v in visits_of(epoch_of(plan))) == kept
    assert plan.filtered == index.usable.sum() - len(kept) > 0
    assert plan.hash != make_plan(index).hash
    by_source = make_plan(index, filters=("",) * 6 + ("height == 32",) * 6)
    rows = np.array(sorted(v.sample for v in visits_of(epoch_of(by_source))))
    assert (rows < 240).sum() == index.usable[:240].sum() and set(index.height[rows[rows >= 240]].tolist()) == {32}


def test_a_filter_that_leaves_nothing_says_so() -> None:
    with pytest.raises(InputError, match=r"no sample is usable.*data.filter, which leaves out 470"):
        next(make_plan(filters=("height > 5000",) * 12).from_position(Position()))


def test_amended_samples_are_left_out_from_a_later_epoch_on() -> None:
    plan = Stages([make_plan()], [])
    before = [epoch_of(make_plan(), epoch) for epoch in (0, 1)]
    at = Position(0, 0, 1)
    plan.amend(at, 0, 3, [5, 9, 5])
    plan.amend(Position(0, 0, 2), 1, 3, [11])
    assert plan.amendments == [(1, (5, 9, 11))]
    assert epoch_of(plan.plans[0], 0) == before[0], "what was planned stays"
    rows = sorted(v.sample for v in visits_of(epoch_of(plan.plans[0], 1)))
    assert rows == sorted({v.sample for v in visits_of(before[1])} - {5, 9, 11})


def test_an_amendment_waits_for_steps_that_were_given_away() -> None:
    plan = Stages([make_plan()], [])
    last = len(plan.plans[0].windows(0)) - 1
    at = Position(0, last, len(plan.plans[0].steps(0, last)) - 2)
    given = list(islice(plan.from_position(at), 4))
    assert given[-1][0].epoch == 1
    plan.amend(at, 7, 3, [5])
    assert plan.amendments == [(2, (5,))]
    with pytest.raises(RuntimeError, match="given away"):
        plan.restore([(1, (6,))])


def run_of(plan: Stages, at: Position, taken: int, count: int) -> list[tuple[Position, list[list[Visit]]]]:
    """Take steps as a trainer does, and leave out the first samples of every epoch from later ones."""
    steps, done = plan.from_position(at, taken), []
    for number in range(taken, taken + count):
        position, slots = next(steps)
        done.append((position, list(slots)))
        if position.window == position.step == 0:
            plan.amend(position, number, 1, [v.sample for slot in slots for v in slot][:3])
    return done


@pytest.mark.parametrize("ends", [[], [5, 9], [20]])
def test_stages_and_amendments_resume_as_if_never_stopped(ends: list[int]) -> None:
    def staged() -> Stages:
        return Stages([make_plan(max_pixels=p) for p in (1024, 256, 2304)[: len(ends) + 1]], ends)

    plan, kept = staged(), []
    whole = []
    for number in range(40):
        kept.append((list(map(tuple, plan.amendments)), whole[-1][0] if whole else None))
        before = whole[-1][0] if whole else Position(0, 0, -1)
        whole += run_of(plan, Position(before.epoch, before.window, before.step + 1), number, 1)
        plan = staged()
        plan.restore([[epoch, list(rows)] for epoch, rows in kept[-1][0]])
        plan_again = run_of(plan, Position(before.epoch, before.window, before.step + 1), number, 1)
        assert plan_again == whole[-1:], "saved after every step, and loaded"
    plan = staged()
    assert run_of(plan, Position(), 0, 40) == whole, "never stopped"
    assert len({position for position, _ in whole}) == 40
    assert plan.amendments and kept[-1][0]


def test_a_stage_changes_sizes_at_its_step_and_covers_its_epoch() -> None:
    plan = Stages([make_plan(), make_plan(max_pixels=256)], [4])
    taken = list(islice(plan.from_position(Position()), 4 + len(epoch_of(make_plan(max_pixels=256), 1))))
    assert all(max(v.crop[2] * v.crop[3] for slot in slots for v in slot) == 1024 for _, slots in taken[:4])
    later = [v for _, slots in taken[4:] for slot in slots for v in slot]
    assert {v.crop[2] * v.crop[3] for v in later} <= {64, 128, 192, 256} and {p.epoch for p, _ in taken[4:]} == {1}
    assert sorted(v.sample for v in later) == np.flatnonzero(plan.index.usable).tolist()
    assert plan.hash != Stages([make_plan(), make_plan(max_pixels=256)], [5]).hash


def test_weights_are_shares_of_the_visits() -> None:
    index = make_index(10, 100, refused="")
    shards = [f"s{n}" for n in range(10)]
    sources = {"few": SourceConfig(shards[:2], weight=3.0), "many": SourceConfig(shards[2:], weight=1.0)}
    source_of = ["few"] * 2 + ["many"] * 8
    data = DataConfig(sources, stages=[StageConfig(5), StageConfig(None, weights={"many": 1.0}, max_frames=9)])
    plan = build_stages(index, source_of, data, make_plan(index).inputs)
    visits = visits_of(epoch_of(plan.plans[0]))
    assert len(visits) == pytest.approx(1000, abs=60)
    assert np.mean([v.sample < 200 for v in visits]) == pytest.approx(0.75, abs=0.03)
    later = visits_of(epoch_of(plan.plans[1]))
    assert sorted(v.sample for v in later) == list(range(200, 1000)) and max(v.frames for v in later) == 9
    half = make_index(10, 100, refused="")
    half.columns["refused"][:200] = "bad"
    with pytest.raises(InputError, match=r"data.sources.few has a weight and no usable sample"):
        build_stages(half, source_of, data, make_plan(index).inputs)


def test_no_library_changes_a_plan() -> None:
    """By value: the same visits on every machine and with every version of everything."""
    step = make_plan().steps(0, 1)[0]
    text = repr([[(v.sample, v.first, v.frames, v.crop, v.task, v.seed) for v in slot] for slot in step])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "1e577a01f73301a8"


@pytest.mark.parametrize("shards", range(1, 10))
def test_few_shards_and_any_ranks_take_the_same_number_of_steps(shards: int) -> None:
    """144 cases of shards 1-9, ranks 1-4 and workers 0-3: workers are no input, and no rank waits for another."""
    plan = make_plan(make_index(shards, 1 + shards % 3 * 5, refused=""), slots=4)
    steps = epoch_of(plan)
    for ranks in range(1, 5):
        passes = [passes_of_rank(4, rank, ranks, None) for rank in range(ranks)]
        taken = [[[v for slot in mine for n in slot for v in step[n]] for step in steps] for mine in passes]
        assert {(len(steps_of_rank), len(mine)) for steps_of_rank, mine in zip(taken, passes, strict=True)} == {
            (len(steps), -(-4 // ranks))
        }
        visited = sorted(v.sample for steps_of_rank in taken for step in steps_of_rank for v in step)
        assert visited == list(range(len(plan.index)))


@hypothesis_settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_plan_covers_its_samples_once_and_resumes_at_any_position(data: st.DataObject) -> None:
    draw = data.draw
    index = make_index(draw(st.integers(1, 9)), draw(st.integers(1, 30)), refused="")
    settings = {
        "slots": draw(st.integers(1, 12)), "max_tokens": draw(st.integers(80, 900)), "fill": draw(st.floats(0.3, 1.0)),
        "window": draw(st.integers(1, 200)), "seed": draw(st.integers(0, 2**40)),
    }  # fmt: skip
    epoch = draw(st.integers(0, 3))
    plan = make_plan(index, **settings)
    assert sorted(v.sample for v in visits_of(epoch_of(plan, epoch))) == list(range(len(index)))
    whole = list(islice(plan.from_position(Position(epoch, 0, 0)), 12))
    at = draw(st.integers(0, len(whole) - 1))
    assert list(islice(make_plan(index, **settings).from_position(whole[at][0]), 12 - at)) == whole[at:]


def test_another_plan_goes_on_where_the_epoch_has_the_same_shards_behind_it() -> None:
    """Other slots and budgets leave the windows as they are, so that the rest of the epoch is visited; data don't."""
    plan, usable = make_plan(), set(np.flatnonzero(make_index().usable).tolist())
    assert len(plan.windows(0)) >= 3
    at = Position(0, 2, 1)
    taken = {visit.sample for window in range(2) for slots in plan.steps(0, window) for slot in slots for visit in slot}
    other = make_plan(slots=5, max_tokens=512)
    assert other.hash != plan.hash and other.before(at) == plan.before(at)
    rest = {
        visit.sample
        for position, slots in islice(other.from_position(Position(0, 2, 0)), 200)
        if position.epoch == 0
        for slot in slots
        for visit in slot
    }
    dropped = usable - taken - rest  # what doesn't fill the last step of a window
    assert not taken & rest and len(dropped) < 0.1 * len(usable)
    assert make_plan(make_index(shards=13)).before(at) != plan.before(at)
    assert make_plan(make_index(shards=2)).before(at) != plan.before(at), "fewer windows than were taken"
    assert make_plan(seed=4).before(at) != plan.before(at) and plan.before(Position()) == other.before(Position())
