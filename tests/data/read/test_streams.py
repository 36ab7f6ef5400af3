"""Shards without random access are streamed once into the cache of the node; other object stores through fsspec."""

from __future__ import annotations

import fcntl
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sora_train.config.schema import DataConfig
from sora_train.core.cli import InputError
from sora_train.data.index.index import load_index
from sora_train.data.index.make import index_shards
from sora_train.data.index.patterns import expand
from sora_train.data.read.cache import Cache
from sora_train.data.read.commands import printed
from sora_train.data.read.decode import DecodeError
from sora_train.data.read.pool import Pool
from sora_train.data.read.store import Store
from tests.data.read.test_bad_files import clips_of, epoch
from tests.data.servers import WebServer

pytest.importorskip("aiohttp", reason="sora_train[storage] is not installed")


@pytest.fixture
def make_server(own_corpus: list[str]) -> Iterator[Any]:
    made = []

    def make(**how: Any) -> WebServer:
        made.append(WebServer(Path(own_corpus[0]).parent, **how))
        return made[-1]

    yield make
    for server in made:
        server.shutdown()
        server.server_close()


def clips(shards: list[str], store: Store) -> dict[str, str]:
    with Pool(1, store=store) as pool:
        return clips_of(epoch(load_index(shards, store), pool))


@pytest.fixture
def local(own_corpus: list[str]) -> dict[str, str]:
    """The clips of the first shard, read from the disk."""
    return clips(own_corpus[:1], Store())


@pytest.mark.parametrize(
    "how", [{"ranges": False}, {"refuses": 416}, {"refuses": 405}, {"ranges": False, "sizes": False}]
)
def test_a_server_without_ranges_is_streamed_once_and_read_from_the_cache(
    make_server: Any, local: dict[str, str], tmp_path: Path, how: dict[str, Any]
) -> None:
    server, store = make_server(**how), Store(tmp_path / "cache", 64 << 20, timeout_s=60.0)
    shards = [f"{server.url}/train-000000.tar"]
    index_shards(shards, 1, store)
    assert clips(shards, store) == local and len(local) == 8
    assert store.read(shards[0], 512, 100) == Path(server.folder / "train-000000.tar").read_bytes()[512:612]
    if not server.sizes:
        return  # GET is asked for the size as well, and nothing tells when it is another shard
    asked = [wanted for path, wanted in server.asked if path.endswith(".tar")]
    assert asked.count("") == 1 and len(asked) <= 3, "one stream, when a range was not to be had"
    assert clips(shards, store) == local
    assert len([path for path, _ in server.asked if path.endswith(".tar")]) == len(asked), "all from the cache"
    (server.folder / "train-000000.tar").write_bytes((server.folder / "train-000001.tar").read_bytes())
    index_shards(shards, 1, fresh := Store(tmp_path / "cache", 64 << 20, timeout_s=60.0))
    assert load_index(shards, fresh).key.tolist() == [f"{n:05d}" for n in range(8, 16)], "not of the copy of before"


def test_a_stream_that_breaks_is_begun_again(make_server: Any, local: dict[str, str], tmp_path: Path) -> None:
    server, store = make_server(ranges=False), Store(tmp_path / "cache", 64 << 20, timeout_s=60.0)
    shard = f"{server.url}/train-000000.tar"
    server.faults += [0.0, "short", 503, "reset"]  # the range, then the stream
    assert store.read(shard, 1000, 2000) == Path(server.folder / "train-000000.tar").read_bytes()[1000:3000]
    assert [wanted for _, wanted in server.asked] == ["bytes=1000-2999", "", "", "", ""]
    assert not [path for path in (tmp_path / "cache" / "arriving").iterdir() if path.suffix != ".lock"]


def program(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "show.sh"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_command_that_is_named_is_run_once_a_node_and_gives_the_same_clips(
    own_corpus: list[str], local: dict[str, str], tmp_path: Path
) -> None:
    show = program(tmp_path, f'echo run >> {tmp_path}/runs\nexec cat "$1"')
    data = DataConfig(commands=[str(show)])
    data.cache.folder = str(tmp_path / "cache")
    store = Store.of(data)
    shards = expand([f"pipe:{show} {Path(own_corpus[0]).parent}/train-00000{{0..1}}.tar"], store)
    assert [shard[-10:] for shard in shards] == ["000000.tar", "000001.tar"]
    index_shards(shards, 1, store)
    assert load_index(shards, store).fingerprint == load_index(own_corpus[:2]).fingerprint
    assert {key: pixels for key, pixels in clips(shards, store).items() if key in local} == local
    assert (tmp_path / "runs").read_text().split() == ["run", "run"]
    store.cache.drop(shards[0])  # type: ignore[union-attr]
    assert clips(shards[:1], Store.of(data)) == local, "what left the cache is streamed again"
    assert len((tmp_path / "runs").read_text().split()) == 3


def test_of_several_processes_one_runs_the_command(own_corpus: list[str], tmp_path: Path) -> None:
    show = program(tmp_path, f'echo run >> {tmp_path}/runs\nsleep 0.5\nexec cat "$1"')
    code = (
        "import sys\nfrom pathlib import Path\nfrom sora_train.data.read.store import Store\n"
        "store = Store(Path(sys.argv[1]), 1 << 26, commands=[sys.argv[2]])\n"
        "print(len(store.read(f'pipe:{sys.argv[2]} {sys.argv[3]}', 512, 1000)))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "cache"), str(show), own_corpus[0]]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=280)[0].strip() for process in running] == ["1000"] * 3
    assert (tmp_path / "runs").read_text().split() == ["run"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("cat {tar}", "commands in shard names are not run"),
        ("./show.sh {tar}", "commands in shard names are not run"),
        ("{show} {tar}; touch {marker}", "no shell reads it, so ';' means nothing"),
        ("{show} $(touch {marker})", "no shell reads it"),
        ("{show} {tar} | tee {marker}", "no shell reads it"),
        ("{show} 'a", "is no command: No closing quotation"),
        ("", "commands in shard names are not run"),
    ],
)
def test_other_commands_are_refused_and_nothing_of_them_runs(
    own_corpus: list[str], tmp_path: Path, command: str, message: str
) -> None:
    show, marker = program(tmp_path, 'exec cat "$1"'), tmp_path / "marker"
    shard = "pipe:" + command.format(show=show, tar=own_corpus[0], marker=marker)
    store = Store(tmp_path / "cache", commands=[str(show)])
    for use in (lambda: expand([shard], store), lambda: store.read(shard, 0, 10), lambda: store.size(shard)):
        with pytest.raises(InputError, match=message):
            use()
    assert not marker.exists()


def test_a_command_that_fails_or_is_silent_is_named_and_killed(tmp_path: Path) -> None:
    fails = program(tmp_path, "echo half a shard\nexit 3")
    store = Store(tmp_path / "cache", tries=2, commands=[str(fails)])
    with pytest.raises(InputError, match="exit 3"):
        index_shards([f"pipe:{fails} x"], 1, store)
    with pytest.raises(OSError, match="sleep printed nothing for 0.3 s"):
        list(printed(["sleep", "3600"], 0.3))
    assert not [path for path in (tmp_path / "cache").glob("*/*") if path.suffix != ".lock"], "half a shard is not kept"


def test_a_shard_larger_than_the_cache_is_refused_with_its_key(own_corpus: list[str], tmp_path: Path) -> None:
    store = Store(tmp_path / "cache", 10_000, commands=["cat"])
    with pytest.raises(InputError, match="more bytes than data.cache.gib"):
        store.read(f"pipe:cat {shlex.quote(own_corpus[0])}", 0, 100)
    with pytest.raises(InputError, match="data.cache.folder"):
        Store(commands=["cat"]).read(f"pipe:cat {own_corpus[0]}", 0, 100)


def test_what_a_killed_process_was_fetching_is_swept_away_and_what_is_under_way_is_not(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1000)
    cache.put("a", bytes(600))
    arriving = tmp_path / "arriving"
    arriving.mkdir()
    for name in ("dead", "alive"):
        (arriving / name).write_bytes(bytes(100))
    with (arriving / "alive.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cache.put("b", bytes(600))
    assert [path.name for path in arriving.iterdir() if path.suffix != ".lock"] == ["alive"]
    assert cache.get("a") is None and cache.get("b") == bytes(600)


def test_threads_that_want_the_same_shard_share_one_stream(tmp_path: Path) -> None:
    cache, streams = Cache(tmp_path, 1000), []

    def pieces() -> Iterator[bytes]:
        streams.append(1)
        time.sleep(0.1)
        yield from (b"a" * 10, b"b" * 10)

    threads = [threading.Thread(target=cache.fill, args=("name", pieces)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(streams) == 1 and cache.get("name", 8, 4) == b"aabb" and cache.size("name") == 20


def test_shards_on_a_hub_come_as_from_the_disk(make_server: Any, local: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    server = make_server()
    store = Store(tmp_path / "cache", options={"hf": {"endpoint": server.url, "token": False}}, tries=2)
    shards = expand(["hf://datasets/films/own/train-00000[0].tar"], store)
    assert shards == ["hf://datasets/films/own/train-000000.tar"]
    index_shards(shards, 1, store)
    assert clips(shards, store) == local
    headers = [wanted for path, wanted in server.asked if "/resolve/main/train-000000.tar" in path]
    assert "bytes=1024-1535" in headers, "by ranges, and nothing ahead"
    (server.folder / "train-000000.tar").write_bytes((server.folder / "train-000001.tar").read_bytes())
    with pytest.raises(InputError, match="no current index"):
        load_index(shards, Store(tmp_path / "cache", options=store.options))


def test_a_bucket_of_google_comes_through_whatever_fsspec_has_for_it(
    own_corpus: list[str], local: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    class Bucket(MemoryFileSystem):
        protocol = "gs"
        store: dict[str, Any] = {}
        pseudo_dirs = [""]

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return path.removeprefix("gs://").strip("/")  # without a slash before the bucket, as gcsfs has it

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "gs", Bucket)
    Bucket().pipe("gs://films/a/train-000000.tar", Path(own_corpus[0]).read_bytes())
    store = Store(tmp_path / "cache", tries=2)
    shards = expand(["gs://films/a/train-*.tar"], store)
    assert shards == ["gs://films/a/train-000000.tar"]
    index_shards(shards, 1, store)
    assert clips(shards, store) == local
    with pytest.raises(DecodeError, match="missing"):
        store.read("gs://films/none.tar", 0, 10)


def test_a_kind_of_store_whose_package_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InputError, match=r"gs:// needs another package.*install sora_train\[storage\]"):
        Store(tmp_path).size("gs://bucket/x.tar")
