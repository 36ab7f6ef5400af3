"""Finds the checkpoints that were trained on given samples, by the ledgers of runs, which list each step's samples."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

import numpy as np

from sora_train.config.files import read_yaml
from sora_train.core.cli import InputError
from sora_train.core.lines import entries
from sora_train.data.index.index import load_index
from sora_train.data.index.patterns import expand
from sora_train.data.read.store import Store

_STEP = re.compile(r"step-(\d+)")


def checkpoints_that_saw(run_dir: str, shards: Collection[Path], keys: Collection[str]) -> list[str]:
    """The checkpoints of a run that were written after a step with a sample of these keys in these shards.

    Raises InputError for a folder that holds no run, or whose shards aren't indexed as they were.
    """
    run = Path(run_dir)
    if not (run / "config.yaml").is_file():
        raise InputError(f"{run_dir} holds no run (there is no {run / 'config.yaml'})")
    rows = set(_rows(run, shards, keys).tolist())
    if not rows:
        return []
    first = min((e["step"] for path in sorted((run / "ledger").glob("rank-*.jsonl")) for e in entries(path)
                 if rows & set(e["samples"])), default=None)  # fmt: skip
    found = sorted((run / "checkpoints").glob("step-*"))
    return [str(path) for path in found if first is not None and (m := _STEP.search(path.name)) and int(m[1]) >= first]


def _rows(run: Path, shards: Collection[Path], keys: Collection[str]) -> np.ndarray:
    """The samples as the run's ledger numbers them: rows of the index of its training shards."""
    tree = read_yaml(run / "config.yaml")
    store = Store()
    named = [shard for source in tree.data.sources.values() for shard in expand(list(source.shards), store)]
    ours = {os.path.realpath(shard) for shard in shards}
    if not any(os.path.realpath(shard) in ours for shard in named):
        return np.zeros(0, np.int64)
    index = load_index(named, store, allow_empty=True, captioned=False)
    mine = np.array([os.path.realpath(shard) in ours for shard in named])[np.asarray(index.shard)]
    return np.flatnonzero(mine & np.isin(index.columns["key"].astype(str), sorted(keys)))
