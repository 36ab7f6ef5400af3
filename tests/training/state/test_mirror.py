"""The mirror holds what the run folder holds, gives it back to the bit, and whatever fails there hurts nothing here."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sora_train.core.cli import InputError
from sora_train.training.engine.power_ema import PowerEmas, Snapshots, combined
from sora_train.training.state.checkpoint import Checkpoints
from sora_train.training.state.checkpoint_format import verify
from sora_train.training.state.files import digest_of
from sora_train.training.state.mirror import Mirror
from tests import stubs
from tests.training.state.test_checkpoint import assert_same, flat, loaded, pieces, state, whole

pytestmark = pytest.mark.usefixtures("process_group")
Make = Callable[..., Mirror]


@pytest.fixture(scope="module")
def bucket() -> Iterator[dict[str, Any]]:
    """An S3 server with a bucket `runs`; yields the options that reach it."""
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    secrets = {"key": "id", "secret": "hush-hush"}
    boto3.client(
        "s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1", aws_access_key_id="id",
        aws_secret_access_key="hush-hush",
    ).create_bucket(Bucket="runs")  # fmt: skip
    yield {"endpoint_url": f"http://{host}:{port}", "client_kwargs": {"region_name": "us-east-1"}, **secrets}
    server.stop()


@pytest.fixture(params=["file", "s3"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Makes the mirror of the run folder of a name, every one at the same URL of the test's own."""
    s3 = request.param == "s3"
    options = request.getfixturevalue("bucket") if s3 else {}
    url = f"s3://runs/{tmp_path.name}/a" if s3 else f"file://{tmp_path}/elsewhere/a"
    return lambda name, keep=3, keep_every=0: Mirror(url, folder(tmp_path, name), keep, keep_every, options)


def local(tmp_path: Path, name: str, keep: int = 3, keep_every: int = 0) -> Mirror:
    """The same for tests that look at what lies in the mirror, `tmp_path/elsewhere`."""
    return Mirror(f"file://{tmp_path}/elsewhere", folder(tmp_path, name), keep, keep_every, {})


def folder(tmp_path: Path, name: str) -> Path:
    (tmp_path / name / "checkpoints").mkdir(parents=True, exist_ok=True)
    return tmp_path / name


def save(mirror: Mirror, *steps: int) -> Checkpoints:
    """Save steps in the mirror's run folder, each in the mirror before the next."""
    checkpoints = Checkpoints(mirror.run_dir / "checkpoints", mirror.keep, mirror.keep_every, mirror)
    for step in steps:
        checkpoints.save(step, pieces(*whole(step), None), state(step))
        assert checkpoints.wait()
        settle(mirror)
    return checkpoints


def settle(mirror: Mirror) -> None:
    done = threading.Event()
    mirror._do(done.set)
    assert done.wait(60)


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def test_an_empty_run_folder_gets_the_newest_checkpoint_back_to_the_bit(make: Make, tmp_path: Path) -> None:
    mirror = make("old")
    assert mirror.restore() is None, "nothing there yet"
    (mirror.run_dir / "config.yaml").write_text("steps: 7\n")
    save(mirror, 10, 20)
    assert mirror.failed == 0 and mirror.finish(60)
    fetched = make("new").restore()
    assert fetched == tmp_path / "new/checkpoints/step-00000020"
    assert verify(fetched) is None
    assert_same(loaded(fetched), flat(20))
    assert {p.name: p.read_bytes() for p in fetched.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "old/checkpoints/step-00000020").iterdir()
    }
    assert (tmp_path / "new/config.yaml").read_text() == "steps: 7\n"
    assert names(tmp_path / "new/checkpoints") == ["step-00000020"]
    assert make("new").restore() is None, "a folder that has checkpoints keeps to them"


def test_the_manifest_comes_last_and_retention_is_that_of_the_run_folder(make: Make, tmp_path: Path) -> None:
    mirror = make("run", keep=2, keep_every=20)
    order: list[str] = []
    put = mirror._put
    mirror._put = lambda path, name: (order.append(name), put(path, name))[1]  # type: ignore[method-assign]
    save(mirror, 10, 20, 30, 40, 50)
    assert order[-1] == "step-00000050/manifest.json"
    assert set(order[order.index("step-00000050/rank-0.safetensors") :]) == {
        f"step-00000050/{name}" for name in ("rank-0.safetensors", "state.json", "manifest.json")
    }
    assert mirror.failed == 0
    assert sorted(mirror._found()) == ["step-00000020", "step-00000040", "step-00000050"]
    assert names(tmp_path / "run/checkpoints") == ["step-00000020", "step-00000040", "step-00000050"]


@pytest.mark.parametrize("damage", ["no manifest", "flip", "cut", "no file", "manifest changed", "names outside"])
def test_what_is_half_or_damaged_there_is_not_taken(tmp_path: Path, damage: str) -> None:
    save(local(tmp_path, "old"), 1, 2)
    newest = tmp_path / "elsewhere/step-00000002"
    file = newest / "rank-0.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-3] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-1])
    elif damage == "no file":
        file.unlink()
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
    else:
        manifest = json.loads((newest / "manifest.json").read_text())
        del manifest["sha256"]
        own = digest_of(manifest)
        manifest["files"] = {f"../{name}": record for name, record in manifest["files"].items()}
        own = own if damage == "manifest changed" else digest_of(manifest)
        (newest / "manifest.json").write_text(json.dumps(manifest | {"sha256": own}))
    fetched = local(tmp_path, "new").restore()
    assert fetched is not None and fetched.name == "step-00000001" and verify(fetched) is None
    Checkpoints(fetched.parent, 3)  # as the start does
    assert names(fetched.parent) == ["step-00000001"]
    assert [path.parent for path in tmp_path.glob("new/**/rank-0*")] == [fetched]
    (tmp_path / "elsewhere/step-00000001/state.json").write_text("{}")
    (newest / "manifest.json").touch()
    with pytest.raises(InputError, match="every checkpoint in checkpoint.mirror=file.* is damaged"):
        local(tmp_path, "newer").restore()


def test_an_upload_that_fails_is_counted_told_and_made_up_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mirror = local(tmp_path, "run")
    (tmp_path / "elsewhere").write_text("in the way")
    checkpoints = save(mirror, 1)
    assert mirror.failed == 1 and "training goes on" in caplog.text and "elsewhere" in caplog.text
    assert checkpoints.newest() == tmp_path / "run/checkpoints/step-00000001"
    (tmp_path / "elsewhere").unlink()
    save(mirror, 2)
    assert mirror.failed == 1 and sorted(mirror._found()) == ["step-00000002"]
    mirror.offer(tmp_path / "run/checkpoints/step-00000001")  # as a restart does with its newest
    settle(mirror)
    assert mirror.failed == 1 and sorted(mirror._found()) == ["step-00000001"], "2 is of a way turned back from"


def test_a_break_inside_an_upload_leaves_the_older_one_and_the_next_cleans_up(tmp_path: Path) -> None:
    mirror = local(tmp_path, "run")
    save(mirror, 1)
    put = mirror._put

    def broken(path: Path, name: str) -> None:
        if name.endswith("state.json"):
            raise ConnectionResetError(name)
        put(path, name)

    mirror._put = broken  # type: ignore[method-assign]
    save(mirror, 2)
    assert mirror.failed == 1
    assert mirror._found()["step-00000002"] == {"rank-0.safetensors"}
    fetched = local(tmp_path, "new").restore()
    assert fetched is not None and fetched.name == "step-00000001"
    (tmp_path / "new/mirror.json").rename(tmp_path / "run/mirror.json")
    mirror._put = put  # type: ignore[method-assign]
    save(mirror, 3)
    assert sorted(mirror._found()) == ["step-00000001", "step-00000003"]


def test_a_store_that_lacks_or_does_not_answer_stops_only_a_run_without_checkpoints(
    bucket: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gone = Mirror("s3://no-such-bucket/a", folder(tmp_path, "run"), 3, 0, bucket)
    with pytest.raises(InputError, match="no-such-bucket.*; mend it, or set checkpoint.mirror=null"):
        gone.restore()
    save(gone, 1)
    assert gone.failed == 1 and gone.restore() is None
    assert "the next checkpoint tries again" in caplog.text and "hush-hush" not in caplog.text


def test_two_runs_never_mix(tmp_path: Path) -> None:
    old = local(tmp_path, "old")
    save(old, 1)
    save(Mirror(f"file://{tmp_path}/third", folder(tmp_path, "other"), 3, 0, {}), 5)
    with pytest.raises(InputError, match="belongs to another run"):
        local(tmp_path, "other").restore()
    new = local(tmp_path, "new")
    assert new.restore() is not None
    save(new, 2)
    save(old, 3)  # the run that was gone on with elsewhere is still alive
    assert (old.failed, new.failed) == (1, 0) and sorted(new._found()) == ["step-00000001", "step-00000002"]
    with pytest.raises(InputError, match="gone on with in another run folder"):
        local(tmp_path, "old").restore()
    assert local(tmp_path, "new").restore() is None


def test_a_copy_of_a_run_folder_is_refused_and_a_moved_one_goes_on(tmp_path: Path) -> None:
    old = local(tmp_path, "old")
    save(old, 1)
    shutil.copytree(tmp_path / "old", tmp_path / "copy")
    with pytest.raises(InputError, match=f"belongs to {tmp_path}/old, of which {tmp_path}/copy is a copy"):
        local(tmp_path, "copy").restore()
    save(old, 2)
    assert old.failed == 0 and sorted(old._found()) == ["step-00000001", "step-00000002"]
    (tmp_path / "old").rename(tmp_path / "moved")
    assert local(tmp_path, "moved").restore() is None, "its checkpoints are there"
    shutil.copytree(tmp_path / "moved", tmp_path / "elsewhere2")  # to another file system, say
    shutil.rmtree(tmp_path / "moved")
    other = local(tmp_path, "elsewhere2")
    assert other.restore() is None
    save(other, 3)
    assert other.failed == 0 and "step-00000003" in other._found()


def test_a_rollback_takes_the_later_ones_away_there_too(tmp_path: Path) -> None:
    mirror = local(tmp_path, "run")
    checkpoints = save(mirror, 1, 2, 3)
    (tmp_path / "elsewhere/notes.txt").write_text("not ours")
    checkpoints.discard_after(1)
    settle(mirror)
    assert names(tmp_path / "elsewhere") == ["notes.txt", "run.json", "step-00000001"]


def test_snapshots_go_along_and_come_back(make: Make, tmp_path: Path) -> None:
    """All that the run folder keeps, thinned out alike; those up to the checkpoint that is fetched come with it."""
    mirror = make("old")
    part = stubs.fragment("net/w", torch.arange(50.0))
    emas = PowerEmas([part], [0.05, 0.1])
    snapshots = Snapshots(mirror.run_dir, emas, 10, 3, mirror)

    def snapshot(*steps: int) -> None:
        for step in steps:
            part.master.add_(step)
            emas.update()
            snapshots.save(step, [part], None, {"net/w": [50]})
            assert snapshots.wait()
            settle(mirror)

    snapshot(10, 20)
    save(mirror, 20)
    snapshot(30, 40)
    assert mirror.failed == 0
    here = names(mirror.run_dir / "snapshots")
    assert [f"snapshots/{name}" for name in here] == sorted(mirror._found("snapshots"))
    assert here == ["step-00000020", "step-00000040"] and sorted(mirror._found()) == ["step-00000020"]
    save(mirror, 40)
    snapshots.discard_after(20)
    settle(mirror)
    assert sorted(mirror._found("snapshots")) == ["snapshots/step-00000020"] and len(mirror._found()) == 2
    snapshot(30, 40, 50)
    new = make("new")
    fetched = new.restore()
    assert fetched is not None and fetched.name == "step-00000040"
    assert names(tmp_path / "new/snapshots") == ["step-00000020", "step-00000040"]
    shutil.rmtree(tmp_path / "old/snapshots/step-00000050")
    ours, theirs = (combined(tmp_path / name, 0.07)[0]["w"] for name in ("old", "new"))
    assert torch.equal(ours, theirs)


def test_a_damaged_snapshot_there_is_left_out_and_the_checkpoint_comes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mirror = local(tmp_path, "old")
    part = stubs.fragment("net/w", torch.zeros(50))
    snapshots = Snapshots(mirror.run_dir, PowerEmas([part], [0.1]), 10, 3, mirror)
    for step in (10, 20):
        snapshots.save(step, [part], None, {"net/w": [50]})
        assert snapshots.wait()
    save(mirror, 20)
    (tmp_path / "elsewhere/snapshots/step-00000010/rank-0.safetensors").write_bytes(b"")
    assert local(tmp_path, "new").restore() is not None
    assert "snapshots/step-00000010 is damaged" in caplog.text
    Snapshots(tmp_path / "new", PowerEmas([part], [0.1]), 10, 3)  # as the start does: clears what was begun
    assert names(tmp_path / "new/snapshots") == ["step-00000020"]


def test_saves_do_not_wait_for_a_slow_store_and_what_is_uploaded_stays_until_it_is_there(tmp_path: Path) -> None:
    mirror = local(tmp_path, "run", keep=1)
    gate, put = threading.Event(), mirror._put

    def slow(path: Path, name: str) -> None:
        if name == "step-00000001/state.json":
            assert gate.wait(60)
        put(path, name)

    mirror._put = slow  # type: ignore[method-assign]
    checkpoints = Checkpoints(tmp_path / "run/checkpoints", 1, 0, mirror)
    for step in (1, 2, 3, 4):
        while mirror.busy is None and step == 2:  # the thread begins
            threading.Event().wait(0.01)
        checkpoints.save(step, pieces(*whole(step), None), state(step))
        assert checkpoints.wait()
    assert names(tmp_path / "run/checkpoints") == ["step-00000001", "step-00000004"]
    assert not mirror.finish(0.1)
    gate.set()
    assert mirror.finish(60) and mirror.failed == 0
    assert sorted(mirror._found()) == ["step-00000004"], "2 and 3 were overtaken, and 1 went by retention"


def test_what_is_there_already_is_not_uploaded_again(tmp_path: Path) -> None:
    save(local(tmp_path, "run"), 1)
    before = (tmp_path / "elsewhere/step-00000001/rank-0.safetensors").stat().st_mtime_ns
    again = local(tmp_path, "run")
    again.offer(tmp_path / "run/checkpoints/step-00000001")
    assert again.finish(60) and again.failed == 0
    assert (tmp_path / "elsewhere/step-00000001/rank-0.safetensors").stat().st_mtime_ns == before


def test_a_url_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="checkpoint.mirror=nonsense://x: .*install sora_train"):
        Mirror("nonsense://x", tmp_path, 3, 0, {})
    assert names(tmp_path) == []
