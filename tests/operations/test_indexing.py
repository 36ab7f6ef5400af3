"""Every node has every index: made once, handed on, adopted from beside the shard, and refused where shards differ.

Nodes are processes with caches of their own, each the first rank of its node.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sora_train.data.index.index import load_index
from sora_train.data.index.places import index_path
from sora_train.operations.indexing import share_out
from tests.data.servers import WebServer
from tests.operations.index_ranks import SHORT

pytest.importorskip("aiohttp", reason="sora_train[storage] is not installed")
ROOT = Path(__file__).parents[2]
Ranks = Callable[..., list[list[object]]]


@pytest.fixture
def server(own_corpus: list[str]) -> Iterator[WebServer]:
    server = WebServer(Path(own_corpus[0]).parent)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def ranks(python: str, tmp_path: Path) -> Ranks:
    """Start ranks with these numbers on their nodes; of each, what it indexed and the index or error that it has."""

    def start(local: tuple[int, ...], shards: list[str], slow_s: float = 0.0) -> list[list[object]]:
        numbers = ",".join(map(str, local))
        command = [python, "-m", "tests.operations.index_ranks", str(tmp_path), numbers, str(slow_s), *shards]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=280)
        return [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(len(local))]

    return start


def test_nodes_share_the_work_and_all_have_every_index(
    server: WebServer, own_corpus: list[str], tmp_path: Path, corpus: list[str], ranks: Ranks
) -> None:
    index_path(own_corpus[0]).unlink()
    index_path(own_corpus[1]).unlink()  # the third lies beside its shard
    shards = [f"{server.url}/{Path(shard).name}" for shard in own_corpus]
    local = (0, 1, 0)
    found = ranks(local, shards, slow_s=1.5 * SHORT.total_seconds())
    assert [made for made, _ in found] == [["train-000000.tar"], [], ["train-000001.tar"]], "each once, on its node"
    assert {fingerprint for _, fingerprint in found} == {load_index(corpus).fingerprint}
    assert len(list((tmp_path / "node-1/index").iterdir())) == len(list((tmp_path / "node-2/index").iterdir())) == 3
    shutil.rmtree(tmp_path / "node-2")
    (tmp_path / "rendezvous").unlink(missing_ok=True)
    again = ranks(local, shards)
    assert [made for made, _ in again] == [[], [], []], "a node that is new is given what another has"
    assert {fingerprint for _, fingerprint in again} == {load_index(corpus).fingerprint}


def test_a_shard_that_differs_between_nodes_is_refused_on_all(
    own_corpus: list[str], tmp_path: Path, ranks: Ranks
) -> None:
    for node in (1, 2):
        shutil.copytree(Path(own_corpus[0]).parent, tmp_path / f"disk-{node}")
    index_path(str(tmp_path / "disk-1/train-000000.tar")).unlink()
    index_path(str(tmp_path / "disk-2/train-000000.tar")).unlink()
    shutil.copy(own_corpus[1], tmp_path / "disk-2/train-000000.tar")
    found = ranks((0, 0), ["train-000000.tar"])
    said = "error: train-000000.tar differs between the nodes of this run; give all of them the same files"
    assert {error for _, error in found} == {said}


def test_what_one_node_cannot_read_is_said_on_all(server: WebServer, ranks: Ranks) -> None:
    found = ranks((0, 0), [f"{server.url}/train-000000.tar", f"{server.url}/none.tar"])
    assert len({said for _, said in found}) == 1 and "none.tar: missing" in found[0][1]


def test_work_is_shared_out_and_what_a_node_has_is_not_made_again() -> None:
    assert share_out({0: ["a", "b", "c", "d"], 8: ["a", "b", "c", "d"]}) == {"a": 0, "b": 8, "c": 0, "d": 8}
    assert share_out({0: ["a", "b"], 8: [], 16: ["b"]}) == {"a": 8, "b": 8}
    assert share_out({0: [], 8: []}) == {}
