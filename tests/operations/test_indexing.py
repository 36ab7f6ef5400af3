"""Every node has every index: made once, handed on, adopted from beside the shard, and refused where shards differ.

Nodes are processes with caches of their own, each the first rank of its node.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from sora_train.config.schema import Probe
from sora_train.core.cli import InputError
from sora_train.core.world import World
from sora_train.data.index import make as indexes
from sora_train.data.index.index import load_index
from sora_train.data.index.places import index_path
from sora_train.data.read.decode import LIMITS
from sora_train.data.read.store import Store
from sora_train.data.shards import Wanted
from sora_train.operations.indexing import index_everywhere, share_out
from tests.data.servers import WebServer

pytest.importorskip("aiohttp", reason="sora_train[storage] is not installed")
SHORT = timedelta(seconds=1)  # the time-out of the run's collectives
Found = list[tuple[list[str], str]]


@pytest.fixture
def server(own_corpus: list[str]) -> Iterator[WebServer]:
    server = WebServer(Path(own_corpus[0]).parent)
    yield server
    server.shutdown()
    server.server_close()


def _rank(rank: int, local: tuple[int, ...], folder: str, shards: list[str], slow_s: float, answers: Any) -> None:
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", None, len(local), rank)
    dist.distributed_c10d._set_pg_timeout(SHORT)
    node = sum(number == 0 for number in local[: rank + 1])
    world = World(rank, len(local), local[rank], 2)
    store = Store(Path(folder) / f"node-{node}", 64 << 20)
    made: list[str] = []
    true = indexes._index

    def slowly(shard: str, *more: Any) -> None:
        made.append(shard.rpartition("/")[2])
        time.sleep(slow_s)
        true(shard, *more)

    indexes._index = slowly
    if (disk := Path(folder) / f"disk-{node}").is_dir():
        os.chdir(disk)
    try:
        index_everywhere(Wanted(shards, store, LIMITS, Probe.packets), world)
        answers[rank] = (sorted(made), load_index(shards, store).fingerprint)
    except InputError as error:
        answers[rank] = (sorted(made), f"error: {error}")
    dist.destroy_process_group()


def ranks(tmp_path: Path, local: tuple[int, ...], shards: list[str], slow_s: float = 0.0) -> Found:
    """Start ranks with these numbers on their nodes; of each, what it indexed and the index or error that it has."""
    with mp.Manager() as manager:
        answers = manager.dict()
        mp.start_processes(_rank, (local, str(tmp_path), shards, slow_s, answers), len(local), start_method="spawn")
        return [answers[rank] for rank in range(len(local))]


def test_nodes_share_the_work_and_all_have_every_index(
    server: WebServer, own_corpus: list[str], tmp_path: Path, corpus: list[str]
) -> None:
    index_path(own_corpus[0]).unlink()
    index_path(own_corpus[1]).unlink()  # the third lies beside its shard
    shards = [f"{server.url}/{Path(shard).name}" for shard in own_corpus]
    local = (0, 1, 0)
    found = ranks(tmp_path, local, shards, slow_s=3 * SHORT.total_seconds())
    assert [made for made, _ in found] == [["train-000000.tar"], [], ["train-000001.tar"]], "each once, on its node"
    assert {fingerprint for _, fingerprint in found} == {load_index(corpus).fingerprint}
    assert len(list((tmp_path / "node-1/index").iterdir())) == len(list((tmp_path / "node-2/index").iterdir())) == 3
    shutil.rmtree(tmp_path / "node-2")
    (tmp_path / "rendezvous").unlink(missing_ok=True)
    again = ranks(tmp_path, local, shards)
    assert [made for made, _ in again] == [[], [], []], "a node that is new is given what another has"
    assert {fingerprint for _, fingerprint in again} == {load_index(corpus).fingerprint}


def test_a_shard_that_differs_between_nodes_is_refused_on_all(own_corpus: list[str], tmp_path: Path) -> None:
    for node in (1, 2):
        shutil.copytree(Path(own_corpus[0]).parent, tmp_path / f"disk-{node}")
    index_path(str(tmp_path / "disk-1/train-000000.tar")).unlink()
    index_path(str(tmp_path / "disk-2/train-000000.tar")).unlink()
    shutil.copy(own_corpus[1], tmp_path / "disk-2/train-000000.tar")
    found = ranks(tmp_path, (0, 0), ["train-000000.tar"])
    said = "error: train-000000.tar differs between the nodes of this run; give all of them the same files"
    assert {error for _, error in found} == {said}


def test_what_one_node_cannot_read_is_said_on_all(server: WebServer, tmp_path: Path) -> None:
    found = ranks(tmp_path, (0, 0), [f"{server.url}/train-000000.tar", f"{server.url}/none.tar"])
    assert len({said for _, said in found}) == 1 and "none.tar: missing" in found[0][1]


def test_work_is_shared_out_and_what_a_node_has_is_not_made_again() -> None:
    assert share_out({0: ["a", "b", "c", "d"], 8: ["a", "b", "c", "d"]}) == {"a": 0, "b": 8, "c": 0, "d": 8}
    assert share_out({0: ["a", "b"], 8: [], 16: ["b"]}) == {"a": 8, "b": 8}
    assert share_out({0: [], 8: []}) == {}
