"""The shards of a run: its lists expanded, indexed, and planned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sora_train.config.cost import balancing_cost, geometry
from sora_train.config.registry import METHODS
from sora_train.config.schema import Config, Probe, clip_rate
from sora_train.data.index.consolidated import load_consolidated
from sora_train.data.index.index import Index, load_index
from sora_train.data.index.make import index_shards, missing_index
from sora_train.data.index.patterns import expand
from sora_train.data.index.side_tables import SideTables
from sora_train.data.order.curriculum import Stages, build_stages
from sora_train.data.order.filters import Filter, Weight, both
from sora_train.data.order.plan import Plan, PlanInputs
from sora_train.data.read.decode import Limits
from sora_train.data.read.encoded import require
from sora_train.data.read.store import Store


@dataclass(frozen=True)
class Wanted:
    """The shards that a run reads, and the requirements on their indexes."""

    shards: Sequence[str]
    store: Store
    limits: Limits
    probe: Probe | None

    def missing(self, shards: Sequence[str]) -> list[str]:
        """Those of some shards that have no index here."""
        return missing_index(shards, self.store, self.limits, self.probe)

    def make(self, shards: Sequence[str]) -> None:
        """Index some shards."""
        index_shards(shards, None, self.store, self.limits, self.probe)


class Shards:
    """The shard lists of a run, expanded; made before any process group, so that a missing shard costs a moment."""

    def __init__(self, config: Config) -> None:
        limits = config.data.limits
        self.store = Store.of(config.data)
        self.training: list[str] = []
        self.source_of: list[str] = []  # each training shard's
        self.filters: list[str] = []
        for name, source in config.data.sources.items():
            Filter(config.data.filter)  # wrong ones are answered here
            Filter(source.filter, f"data.sources.{name}.filter")
            found = expand(source.shards, self.store)
            self.training += found
            self.source_of += [name] * len(found)
            self.filters += [both(config.data.filter, source.filter)] * len(found)
        Weight(config.data.weight or "1")
        self.validation = expand(config.data.validation, self.store)
        for table in config.data.side_tables:
            expand([table], self.store, "side table", "data.side_tables")
        allowed = Limits(limits.pixels, limits.frames, limits.bytes)
        self.captioned: bool = METHODS.get(config.method).reads_captions
        self.wanted = Wanted(self.training + self.validation, self.store, allowed, config.data.probe)

    def index(self) -> None:
        """Index the shards that have no index yet, in this process."""
        self.wanted.make(self.wanted.shards)

    def plan(self, config: Config) -> Stages:
        """The plan of the training shards."""
        inputs = plan_inputs(config, self.filters, config.flow.tasks)
        index = self.load(config)
        require(index.encoded(), config, "data.sources")
        return build_stages(index, self.source_of, config.data, inputs)

    def load(self, config: Config) -> Index:
        """The index of the training shards, with the columns of the side tables."""
        d = config.data
        if d.index:
            return load_consolidated(d.index, self.training, self.store, d.side_tables, self.captioned)
        index = load_index(self.training, self.store, d.max_bad_fraction, captioned=self.captioned)
        return SideTables(d.side_tables, self.store).join(index)

    def held_out(self, config: Config) -> Plan | None:
        """The plan of the validation shards, if there are any."""
        if not self.validation:
            return None
        filters = [config.data.filter] * len(self.validation)
        index = load_index(self.validation, self.store, captioned=self.captioned)
        tables = SideTables(config.data.side_tables, self.store)
        index = tables.join(index, asked=Filter(config.data.filter).columns)  # the filter holds for validation too
        require(index.encoded(), config, "data.validation")
        return Plan(index, plan_inputs(config, filters, {"text_to_video": 1.0}))


def with_length(config: Config, plan: Stages) -> Config:
    """The configuration with `steps` of the plan's `epochs`, where these are given."""
    return config if config.epochs is None else replace(config, steps=plan.plans[0].count(config.epochs))


def plan_inputs(config: Config, filters: list[str], tasks: dict[str, float]) -> PlanInputs:
    """Inputs of the plan from a configuration, for shards with these filters."""
    d = config.data
    weighted = tuple(sorted((task, weight) for task, weight in tasks.items() if weight > 0))
    return PlanInputs(
        seed=config.seed, slots=d.slots, max_tokens=d.max_tokens, fill=d.fill, window=d.window,
        fps=clip_rate(d.fps), max_frames=d.max_frames, max_pixels=d.max_pixels, fit=d.fit.value, tasks=weighted,
        repeats=(1.0,) * len(filters), geometry=geometry(config), cost=balancing_cost(config), filters=tuple(filters),
        captions=tuple(sorted(d.captions.items())), weight=d.weight, pack_slots=d.pack_slots,
    )  # fmt: skip
