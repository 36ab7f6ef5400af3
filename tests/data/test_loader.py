"""From plan to packs: the same clips for any number of ranks, what can't be read is named, a replay is the same."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sora_train.config.rules import check
from sora_train.config.schema import Config, DataConfig, SourceConfig
from sora_train.core.batch import Clip, Refusal
from sora_train.core.cli import InputError
from sora_train.core.cost import Cost, Geometry
from sora_train.data.index.index import load_index
from sora_train.data.index.make import index_shards
from sora_train.data.loader import Loader, Step, draw_caption, passes_of_rank
from sora_train.data.order.plan import Plan, PlanInputs, Position
from sora_train.data.order.times import source_frames
from sora_train.data.read.pool import Pool


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(1, timeout_s=60) as pool:
        yield pool


def make_plan(shards: list[str]) -> Plan:
    index = load_index(shards)
    repeats = (1.0,) * len(shards)
    tasks = (("text_to_video", 1.0),)
    return Plan(
        index, PlanInputs(3, 4, 256, 0.9, 4096, 8.0, 17, 1024, "crop", tasks, repeats, Geometry(4, 4, 2), Cost(1, 1))
    )


def load(plan: Plan, pool: Pool, rank: int, ranks: int, steps: int, **more: Any) -> list[Step]:
    passes = passes_of_rank(plan.inputs.slots, rank, ranks, more.pop("accumulation", None))
    return list(islice(Loader(plan, pool, passes, more.pop("start", Position()), 2, **more), steps))


def identity(clip: Clip) -> tuple[int, int, str, str]:
    """All of a clip: which sample, which seed, which caption, and every pixel."""
    pixels = hashlib.sha256(np.ascontiguousarray(clip.video_TCHW.numpy()).tobytes()).hexdigest()
    return clip.visit.sample, clip.visit.seed, clip.caption, pixels


def clips_of(steps: list[Step]) -> list[Clip]:
    return [clip for step in steps for pack in step.packs for clip in pack.clips]


def epoch_steps(plan: Plan) -> int:
    return sum(len(plan.steps(0, w)) for w in range(len(plan.windows(0))))


def test_the_clips_are_the_same_for_any_number_of_ranks(corpus: list[str], pool: Pool) -> None:
    plan = make_plan(corpus)
    count = epoch_steps(plan)
    alone = [sorted(map(identity, clips_of([step]))) for step in load(plan, pool, 0, 1, count)]
    assert sum(map(len, alone)) == 24 and count > 1
    for ranks in (2, 3):
        together = [load(plan, pool, rank, ranks, count) for rank in range(ranks)]
        assert [sorted(map(identity, clips_of(list(steps)))) for steps in zip(*together, strict=True)] == alone


def test_accumulation_changes_the_packs_and_not_the_clips(corpus: list[str], pool: Pool) -> None:
    plan = make_plan(corpus)
    apart, together = load(plan, pool, 0, 1, 2), load(plan, pool, 0, 1, 2, accumulation=1)
    assert [len(step.packs) for step in apart] == [4, 4]
    assert [len(step.packs) for step in together] == [1, 1]
    assert sorted(map(identity, clips_of(apart))) == sorted(map(identity, clips_of(together)))


def test_clips_have_the_planned_frames_size_and_one_of_the_captions(corpus: list[str], pool: Pool) -> None:
    plan = make_plan(corpus)
    clips = clips_of(load(plan, pool, 0, 1, epoch_steps(plan)))
    assert {c.visit.sample for c in clips} == set(range(24))
    for clip in clips:
        frames, height, width = clip.visit.size
        assert clip.video_TCHW.shape == (frames, 3, height, width)
        assert clip.caption in plan.index.captions(clip.visit.sample)[0]
        assert clip.key == plan.index.key[clip.visit.sample]
    one = next(c for c in clips if plan.index.frames[c.visit.sample] == 33 and c.visit.crop[3] not in (24, 40))
    taken = source_frames(one.visit, 16.0)
    direct = pool.decode(*plan.index.member(one.visit.sample), taken, one.visit.resize, one.visit.crop).result()
    assert np.array_equal(one.video_TCHW.permute(0, 2, 3, 1).numpy(), direct)


def test_each_visit_draws_its_caption_anew(corpus: list[str], pool: Pool) -> None:
    plan = make_plan(corpus)
    clips = clips_of(load(plan, pool, 0, 1, 6 * epoch_steps(plan)))
    drawn = [c.caption.startswith("a block of light") for c in clips if c.visit.sample % 2]
    assert 0.25 < np.mean(drawn) < 0.75


def test_clips_that_are_kept_are_the_same_and_decoded_once(
    corpus: list[str], pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(corpus)
    steps = 4 * epoch_steps(plan)
    plain = load(plan, pool, 0, 1, steps)
    asked: list[tuple[object, ...]] = []
    decode = pool.decode

    def counted(*request: Any, **more: Any) -> Any:
        asked.append(request[2])
        return decode(*request, **more)

    monkeypatch.setattr(pool, "decode", counted)
    assert list(map(identity, clips_of(load(plan, pool, 0, 1, steps)))) == list(map(identity, clips_of(plain)))
    without = len(asked)
    asked.clear()
    kept = load(plan, pool, 0, 1, steps, cache_bytes=64 << 20)
    assert list(map(identity, clips_of(kept))) == list(map(identity, clips_of(plain)))
    parts = {(v.sample, v.first, v.frames, v.resize, v.crop) for v in (clip.visit for clip in clips_of(plain))}
    assert len(parts) <= len(asked) < without, "each part is decoded once, or again while it is being decoded"
    asked.clear()
    load(plan, pool, 0, 1, steps, cache_bytes=1)
    assert len(asked) == without, "no room"


def test_positions_come_with_the_steps_and_a_resumed_loader_goes_on(corpus: list[str], pool: Pool) -> None:
    plan = make_plan(corpus)
    count = epoch_steps(plan) + 1
    whole = load(plan, pool, 0, 1, count)
    assert [step.position for step in whole] == [*(Position(0, 0, s) for s in range(count - 1)), Position(1, 0, 0)]
    resumed = load(make_plan(corpus), pool, 0, 1, count - 1, start=Position(0, 0, 1))
    assert list(map(identity, clips_of(resumed))) == list(map(identity, clips_of(whole[1:])))


def damage(plan: Plan, row: int) -> None:
    """Flip a byte of a sample's video after it was indexed."""
    path, _, (offset, size, _) = plan.index.member(row)
    data = bytearray(Path(path).read_bytes())
    data[offset + size // 2] ^= 0xFF
    Path(path).write_bytes(data)


def test_a_damaged_sample_is_refused_by_name_and_everything_else_arrives(own_corpus: list[str], pool: Pool) -> None:
    plan = make_plan(own_corpus)
    damage(plan, 10)
    steps = load(plan, pool, 0, 1, epoch_steps(plan))
    refused = [refusal for step in steps for refusal in step.refused]
    assert [(r.sample, r.shard, r.key, r.cause) for r in refused] == [(10, own_corpus[1], "00010", "checksum")]
    assert sorted(s for step in steps for s in step.samples) == [n for n in range(24) if n != 10]


def test_a_shard_that_vanished_refuses_its_samples_and_no_others(own_corpus: list[str], pool: Pool) -> None:
    plan = make_plan(own_corpus)
    Path(own_corpus[2]).unlink()
    steps = load(plan, pool, 0, 1, epoch_steps(plan))
    refused = [refusal for step in steps for refusal in step.refused]
    assert sorted(r.sample for r in refused) == list(range(16, 24))
    assert {r.cause for r in refused} == {"missing"}
    assert sorted(s for step in steps for s in step.samples) == list(range(16))


def test_what_an_earlier_attempt_refused_is_refused_again(corpus: list[str], pool: Pool) -> None:
    """A time-out then must not be a clip now, or the replayed step would be another one."""
    plan = make_plan(corpus)
    first = load(plan, pool, 0, 1, 1)[0]
    row = first.samples[0]
    known = {(tuple(first.position), row): Refusal(row, "shard", "key", "timeout", "then")}
    again = load(plan, pool, 0, 1, 2, known=known)
    assert again[0].refused == list(known.values())
    assert sorted(again[0].samples) == sorted(set(first.samples) - {row})
    assert again[1].refused == [], "only that step"


def test_captions_are_drawn_by_weight() -> None:
    weights = (("long", 3.0), ("short", 1.0))
    drawn = [draw_caption(["short", "long", "other"], weights, seed) for seed in range(2000)]
    assert 0.22 < drawn.count(0) / 2000 < 0.28 and drawn.count(2) == 0
    alike = [draw_caption(["short", "long"], (), seed) for seed in range(2000)]
    assert 0.46 < np.mean(alike) < 0.54
    assert {draw_caption(["a", "b"], weights, seed) for seed in range(50)} == {0, 1}, "none of them has a weight"
    assert {draw_caption([], weights, seed) for seed in range(50)} == {0}, "a single caption, in a txt"


CASES = [(shards, ranks, workers) for shards in range(1, 10) for ranks in range(1, 5) for workers in range(4)]
SAMPLED = {(1, 4, 1), (2, 3, 2), (9, 2, 3), (3, 4, 0)}
_PARAMETERS = [
    pytest.param(*case, marks=[] if case in SAMPLED else pytest.mark.campaign, id="-".join(map(str, case)))
    for case in CASES
]


@pytest.fixture(scope="module")
def nine_shards(
    tmp_path_factory: pytest.TempPathFactory, write_samples: Any, make_sample: Callable[[int], dict[str, Any]]
) -> list[str]:
    """Shards of one to three samples, images all: what counts here is who gets which."""
    folder, numbers = tmp_path_factory.mktemp("nine"), itertools.count()
    shards = [
        write_samples(folder / f"{s}.tar", [make_sample(4 * next(numbers)) for _ in range(1 + s % 3)]) for s in range(9)
    ]
    index_shards(shards, workers=1)
    return shards


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, Pool]]:
    """A pool of one, two and three workers, for all cases."""
    with Pool(1, timeout_s=600) as one, Pool(2, timeout_s=600) as two, Pool(3, timeout_s=600) as three:
        yield {1: one, 2: two, 3: three}


@pytest.mark.parametrize(("shards", "ranks", "workers"), _PARAMETERS)
def test_unequal_shards_hang_no_rank(
    nine_shards: list[str], pools: dict[int, Pool], shards: int, ranks: int, workers: int
) -> None:
    """The first epoch, which is what validation runs through too, and the second, of each rank in turn.

    Each rank takes as many steps of as many passes, and together they see each sample once. The configuration refuses
    to go without workers.
    """
    if workers == 0:
        config = Config(run_dir="x", steps=1, data=DataConfig({"s": SourceConfig(nine_shards[:shards])}, workers=0))
        with pytest.raises(InputError, match=r"data\.workers=0 must be above 0"):
            check(config)
        return
    plan = make_plan(nine_shards[:shards])
    for epoch in (0, 1):
        count = sum(len(plan.steps(epoch, w)) for w in range(len(plan.windows(epoch))))
        start = Position(epoch, 0, 0)
        steps = [load(plan, pools[workers], rank, ranks, count, start=start) for rank in range(ranks)]
        assert {tuple((step.position, len(step.packs)) for step in mine) for mine in steps} == {
            tuple((Position(epoch, 0, n), -(-4 // ranks)) for n in range(count))
        }
        arrived = sorted(sample for mine in steps for step in mine for sample in step.samples)
        assert arrived == list(range(len(plan.index)))
