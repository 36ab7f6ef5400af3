"""Remote shards give the same clips as local ones, through faults; the cache keeps its size."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sora_train.config.schema import DataConfig
from sora_train.core.cli import InputError
from sora_train.data.index.files import upload_index
from sora_train.data.index.index import load_index
from sora_train.data.index.make import index_shards
from sora_train.data.index.patterns import expand
from sora_train.data.index.places import index_path
from sora_train.data.read.cache import Cache
from sora_train.data.read.decode import DecodeError
from sora_train.data.read.pool import Pool
from sora_train.data.read.store import Store
from tests.data.read.test_bad_files import clips_of, epoch
from tests.data.servers import WebServer

pytest.importorskip("aiohttp", reason="sora_train[storage] is not installed")


@pytest.fixture
def server(own_corpus: list[str]) -> Iterator[WebServer]:
    server = WebServer(Path(own_corpus[0]).parent)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache", 64 << 20, timeout_s=60.0)


def remote(server: WebServer, count: int = 1) -> list[str]:
    return expand([f"{server.url}/train-{{000000..{count - 1:06d}}}.tar"])


def test_remote_shards_give_the_same_index_and_clips_as_local_ones(
    server: WebServer, store: Store, corpus: list[str]
) -> None:
    shards = remote(server, 2)
    index_shards(shards, 1, store)
    index = load_index(shards, store)
    assert index.fingerprint == load_index(corpus[:2]).fingerprint
    assert all(index_path(shard, store).is_relative_to(store.cache.folder) for shard in shards)  # type: ignore[union-attr]
    with Pool(1, store=store) as pool:
        clips = clips_of(epoch(index, pool))
        asked = len(server.asked)
        assert clips_of(epoch(index, pool)) == clips
        assert len(server.asked) == asked, "the second time all comes from the cache"
    with Pool(1) as pool:
        assert clips == clips_of(epoch(load_index(corpus[:2]), pool))


def test_an_index_that_lies_beside_a_remote_shard_is_taken_if_it_is_of_that_shard(
    server: WebServer, store: Store, own_corpus: list[str]
) -> None:
    shards = remote(server, 2)
    shutil.copy(index_path(own_corpus[0]), index_path(own_corpus[1]))  # another shard's
    index_shards(shards, 1, store)
    read = {path: set() for path, _ in server.asked}  # type: ignore[var-annotated]
    for path, wanted in server.asked:
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        read[path].add(int(last) - int(first) + 1)
    assert read["/train-000000.tar"] == {512}, "only headers, to see that the index is its own"
    assert max(read["/train-000001.tar"]) == Path(own_corpus[1]).stat().st_size
    assert load_index(shards, store).fingerprint == load_index_of(own_corpus)


def load_index_of(shards: list[str]) -> str:
    for shard in shards[:2]:
        index_path(shard).unlink()
    index_shards(shards[:2], 1)
    return load_index(shards[:2]).fingerprint


def test_an_index_of_a_remote_shard_that_was_replaced_is_made_anew(
    server: WebServer, store: Store, own_corpus: list[str]
) -> None:
    shards = remote(server)
    index_shards(shards, 1, store)
    assert load_index(shards, store).key[0] == "00000"
    shutil.copy(own_corpus[1], own_corpus[0])
    with pytest.raises(InputError, match="no current index"):
        load_index(shards, store)


@pytest.mark.parametrize("faults", [[503, 500], ["reset"], ["short", "short"], [429, "reset", "short"]])
def test_faults_that_pass_are_tried_again(server: WebServer, store: Store, own_corpus: list[str], faults: list) -> None:
    server.faults += faults
    whole = Path(own_corpus[0]).read_bytes()
    assert store.read(remote(server)[0], 1000, 5000) == whole[1000:6000]
    assert len(server.asked) == len(faults) + 1
    assert all(wanted == "bytes=1000-5999" for _, wanted in server.asked)


def test_a_server_that_stalls_is_given_up_in_time(server: WebServer, tmp_path: Path) -> None:
    impatient = Store(tmp_path / "cache", tries=2, timeout_s=0.5)
    server.faults += [3.0, 3.0]
    with pytest.raises(DecodeError) as caught:
        impatient.read(remote(server)[0], 0, 100)
    assert caught.value.cause == "network" and "TimeoutError" in str(caught.value)


def test_what_stays_broken_or_is_not_there_has_a_cause(server: WebServer, tmp_path: Path) -> None:
    store = Store(tmp_path / "cache", tries=2, timeout_s=60.0)
    server.faults += [503] * 2
    for shard, cause in ((remote(server)[0], "network"), (f"{server.url}/none.tar", "missing")):
        with pytest.raises(DecodeError) as caught:
            store.read(shard, 0, 100)
        assert caught.value.cause == cause
    with pytest.raises(InputError, match="none.tar: missing"):
        index_shards([f"{server.url}/none.tar"], 1, store)


def test_a_damaged_copy_in_the_cache_is_fetched_anew(server: WebServer, store: Store) -> None:
    shards = remote(server)
    index_shards(shards, 1, store)
    index = load_index(shards, store)
    with Pool(1, store=store) as pool:
        clips = clips_of(epoch(index, pool))
        for path in store.cache.folder.glob("??/*"):  # type: ignore[union-attr]
            path.write_bytes(bytes(path.stat().st_size))
        steps = epoch(index, pool)
    assert clips_of(steps) == clips and not [r for step in steps for r in step.refused]


def test_a_bucket_gives_the_same_bytes_and_names(
    own_corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    boto3 = pytest.importorskip("boto3")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
        client.create_bucket(Bucket="films")
        client.upload_file(own_corpus[0], "films", "a/train-000000.tar")
        options = {"s3": {"endpoint_url": f"http://{host}:{port}", "client_kwargs": {"region_name": "us-east-1"}}}
        store = Store(tmp_path / "cache", options=options, tries=2)
        shards = expand(["s3://films/a/train-*.tar"], store)
        assert shards == ["s3://films/a/train-000000.tar"]
        index_shards(shards, 1, store)
        index = load_index(shards, store)
        assert index.fingerprint == load_index(own_corpus[:1]).fingerprint
        with Pool(1, store=store) as pool:
            assert len(clips_of(epoch(index, pool))) == 8
            environment = Path(f"/proc/{pool._children[0].process.pid}/environ").read_bytes()  # type: ignore[union-attr]
            assert b"hush-hush" not in environment
        elsewhere = Store(tmp_path / "other", options=options, tries=2)
        with pytest.raises(InputError, match="no current index"):
            load_index(shards, elsewhere)
        upload_index(shards[0], store)
        assert load_index(shards, elsewhere).fingerprint == index.fingerprint, "taken from beside the shard"
        with pytest.raises(InputError, match=r"http://x/a.index.parquet can't be written"):
            elsewhere.put("http://x/a.index.parquet", b"")
    finally:
        server.stop()


@pytest.mark.parametrize(
    "shard", ["pipe:cat x.tar", "PIPE:touch y", "ssh://host/x.tar", "file:///etc/passwd", "ftp://x/y.tar", "exec://x"]
)
def test_commands_and_unknown_kinds_of_source_are_refused(shard: str) -> None:
    for use in (lambda: expand([shard]), lambda: Store().read(shard, 0, 1), lambda: Store().size(shard)):
        with pytest.raises(InputError, match="commands in shard names are not run|no such kind of source"):
            use()


def test_the_cache_never_grows_beyond_its_size_and_drops_what_was_longest_unused(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1000)
    for number in range(9):
        cache.put(str(number), bytes([number]) * 100)
        os.utime(cache._path(str(number)), ns=(number, number))
    assert cache.get("0") == bytes(100), "and is the latest used now"
    cache.put("big", b"x" * 500)
    kept = [name for name in "012345678" if cache.get(name) is not None]
    assert kept == ["0", "6", "7", "8"] and cache.get("big") == b"x" * 500
    cache.put("too big", b"x" * 950)
    assert cache.get("too big") is None
    assert sum(path.stat().st_size for path in tmp_path.glob("??/*")) <= 1000


def test_processes_share_a_cache_and_keep_it_whole(tmp_path: Path) -> None:
    code = (
        "import random, sys\nfrom pathlib import Path\nfrom sora_train.data.read.cache import Cache\n"
        "cache, rng = Cache(Path(sys.argv[1]), 200_000), random.Random(int(sys.argv[2]))\n"
        "for _ in range(300):\n"
        "    n = rng.randrange(60)\n"
        "    data = cache.get(str(n))\n"
        "    assert data is None or data == bytes([n]) * (1000 + 100 * n), n\n"
        "    cache.put(str(n), bytes([n]) * (1000 + 100 * n))\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(n)]) for n in range(3)]
    assert [process.wait(timeout=280) for process in running] == [0, 0, 0]
    used = sum(path.stat().st_size for path in tmp_path.glob("??/*"))
    assert 100_000 < used <= 200_000
    assert not list(tmp_path.glob("??/.*")), "nothing half written is left"


def test_a_run_without_remote_shards_makes_no_cache(tmp_path: Path, corpus: list[str]) -> None:
    data = DataConfig(workers=1)
    data.cache.folder = str(tmp_path / "cache")
    with Pool.of(data) as pool:
        assert len(clips_of(epoch(load_index(corpus[:1], pool.store), pool))) == 8
    assert not (tmp_path / "cache").exists()
