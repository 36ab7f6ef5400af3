"""The doctor's findings, one fault at a time; pairs by value; the command on one machine, and on two ranks."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest

from sora_train import doctor
from sora_train.core.cli import InputError
from sora_train.operations import checks
from sora_train.operations.checks import FAILURE, OK, WARNING
from sora_train.operations.links import judge, rounds
from tests.data.servers import WebServer

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("count", [2, 3, 6, 7])
def test_rounds_hold_every_pair_once_and_nobody_twice(count: int) -> None:
    played = list(rounds(count))
    assert sorted(pair for one in played for pair in one) == list(combinations(range(count), 2))
    for one in played:
        places = [place for pair in one for place in pair]
        assert len(places) == len(set(places))


def test_a_slow_machine_is_named() -> None:
    speeds = {pair: 1e9 if 2 in pair else 10e9 for pair in combinations(range(6), 2)}
    names = [f"node-{n}" for n in range(6)]
    found = judge(speeds, names)
    assert found[0].status == OK and found[0].value == 10.0
    assert len([f for f in found if f.check == "slow pair"]) == 5
    assert found[-1].status == FAILURE and "node-2 is in 5 of 5 slow pairs" in found[-1].detail
    assert len(judge(dict.fromkeys(speeds, 1e9), names)) == 1


def test_the_decoder_is_tried() -> None:
    (found,) = checks.decoders()
    assert found.status == OK and found.detail.startswith("10 of 10 frames")


def test_shards_are_looked_for_and_read(corpus: list[str], tmp_path: Path) -> None:
    (found,) = checks.shard_reads(corpus)
    assert found.detail.startswith("3 shard(s), read at") and found.value and found.value > 0
    (missing,) = checks.shard_reads([str(tmp_path / "no-*.tar")])
    assert missing.status == FAILURE and "no shard at" in missing.detail


def test_remote_shards_are_read_too(own_corpus: list[str]) -> None:
    pytest.importorskip("aiohttp", reason="sora_train[storage] is not installed")
    server = WebServer(Path(own_corpus[0]).parent)
    try:
        (found,) = checks.shard_reads([f"{server.url}/{Path(own_corpus[0]).name}"])
        assert found.detail.startswith("1 shard(s), read at") and found.value and found.value > 0
        (missing,) = checks.shard_reads([f"{server.url}/no-000000.tar"])
        assert missing.status == FAILURE and "no-000000.tar" in missing.detail
    finally:
        server.shutdown()
        server.server_close()


def test_a_stale_build_lock_is_found_and_a_held_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "op").mkdir()
    with (tmp_path / "op" / "lock").open("w"):
        assert [f.status for f in checks.build_locks()] == [OK]
    (found,) = checks.build_locks()
    assert found.status == FAILURE and str(tmp_path / "op" / "lock") in found.detail


def test_the_checkpoint_folder_is_written_to_and_left_as_it_was(tmp_path: Path) -> None:
    (found,) = checks.writable(str(tmp_path / "run"))
    assert found.status == OK and not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    (refused,) = checks.writable(str(tmp_path / "file"))
    assert refused.status == FAILURE and "Not a directory" in refused.detail


def test_wandb_that_does_not_answer_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://localhost:9")
    (found,) = checks.wandb(1.0)
    assert found.status == WARNING and "offline" in found.detail


def test_the_command_reports_and_answers_by_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://localhost:9")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "none"))
    out = tmp_path / "report.json"
    monkeypatch.setattr("sys.argv", ["doctor", f"run_dir={tmp_path / 'run'}", f"json={out}"])
    assert doctor.main() == 0
    (findings,) = json.loads(out.read_text()).values()
    named = {f["check"] for f in findings}
    assert {"python", "packages", "decoder", "disk", "open files", "build locks", "wandb"} <= named
    assert os.uname().nodename in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["doctor", f"run_dir={tmp_path / 'run'}", f"shards=[{tmp_path}/no.tar]"])
    assert doctor.main() == 1


def test_a_check_that_breaks_is_a_finding_and_the_others_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[checks.Finding]:
        raise RuntimeError("uncorrectable ECC\nerror")
        yield

    monkeypatch.setattr(checks, "gpus", broken)
    monkeypatch.setenv("WANDB_BASE_URL", "http://localhost:9")
    found = {f.check: f for f in checks.machine([], "runs")}
    assert found["GPUs"].status == FAILURE and found["GPUs"].detail.endswith("RuntimeError: uncorrectable ECC error")
    assert found["wandb"].status == WARNING  # the last one


def test_a_report_without_a_folder_is_refused_before_any_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["doctor", "json=no/such/folder/report.json"])
    with pytest.raises(InputError, match="there is no folder"):
        doctor.main()


def test_two_ranks_report_together_and_the_odd_one_is_named(python: str, tmp_path: Path) -> None:
    """Rank 1 plays a second machine that has a stale build lock and another NCCL setting than the first."""
    (tmp_path / "theirs" / "op").mkdir(parents=True)
    (tmp_path / "theirs" / "op" / "lock").touch()
    odd = f"export LOCAL_RANK=0 TORCH_EXTENSIONS_DIR={tmp_path}/theirs NCCL_ALGO=Tree"
    shell = f'export LOCAL_WORLD_SIZE=1; [ $RANK = 0 ] || {odd}; exec "$0" -m sora_train.doctor "$@"'
    out = tmp_path / "report.json"
    done = subprocess.run(
        [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python", "sh", "-c",
         shell, python, f"run_dir={tmp_path}/run", f"json={out}"],
        cwd=ROOT, capture_output=True, text=True, timeout=800,
        env=os.environ | {
            "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_BASE_URL": "http://localhost:9", "NCCL_ALGO": "Ring"
        },
    )  # fmt: skip
    host = os.uname().nodename
    assert done.returncode == 1, done.stderr
    found = json.loads(out.read_text())
    assert set(found) == {host, f"{host}, rank 1", "between ranks"}
    failures = {(place, f["check"], f["detail"]) for place in found for f in found[place] if f["status"] == FAILURE}
    lock = f"stale, remove it: {tmp_path}/theirs/op/lock (1 in all)"
    differs = "rank 1 has variable NCCL_ALGO = 'Tree', others 'Ring'"
    assert failures >= {(f"{host}, rank 1", "build locks", lock), ("between ranks", "agreement", differs)}
    assert f"failure: {host}, rank 1: build locks: {lock}" in done.stdout  # beside a table that may fold it
    speeds = {f["check"]: f["value"] for f in found["between ranks"]}
    assert speeds["pairs"] > 0 and speeds["all-reduce"] > 0 and speeds["clocks"] < 5
