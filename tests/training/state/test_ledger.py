"""The ledger names what was consumed and refused; a replay takes its refusals from there."""

from __future__ import annotations

import json
from pathlib import Path

from sora_train.core.batch import Refusal
from sora_train.training.state.ledger import Ledger

BAD = Refusal(7, "s.tar", "00007", "timeout", "no answer")


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def written(run_dir: Path) -> Ledger:
    """Two ranks take three steps; rank 1 refuses a sample in each of the last two."""
    ledgers = [Ledger(run_dir, rank) for rank in range(2)]
    for step in (1, 2, 3):
        ledgers[0].write(step, (0, 0, step - 1), [10 * step], [])
        ledgers[1].write(step, (0, 0, step - 1), [10 * step + 1], [BAD] if step > 1 else [])
    return ledgers[0]


def test_every_rank_writes_its_samples_and_refusals(tmp_path: Path) -> None:
    written(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "ledger/rank-1.jsonl").read_text().splitlines()]
    assert [(e["step"], e["position"], e["samples"]) for e in lines] == [
        (1, [0, 0, 0], [11]), (2, [0, 0, 1], [21]), (3, [0, 0, 2], [31])
    ]  # fmt: skip
    refusal = {"sample": 7, "shard": "s.tar", "key": "00007", "cause": "timeout", "detail": "no answer"}
    assert [e["refused"] for e in lines] == [[], [refusal], [refusal]]
    quarantine = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    named = {"shard": "s.tar", "key": "00007", "cause": "timeout", "detail": "no answer"}
    assert quarantine == [{"step": 2, **named}, {"step": 3, **named}]


def test_what_the_index_refused_stands_first_and_once(tmp_path: Path) -> None:
    for _ in range(2):  # as a resumed run does
        Ledger(tmp_path, 0).refused_before([BAD])
    written(tmp_path).cut(2)
    Ledger(tmp_path, 0).refused_before([BAD])
    assert steps_in(tmp_path / "quarantine.jsonl") == [0, 2]


def test_a_replay_knows_the_refusals_of_all_ranks_after_its_checkpoint(tmp_path: Path) -> None:
    ledger = written(tmp_path)
    assert ledger.replayed(0) == {((0, 0, 1), 7): BAD, ((0, 0, 2), 7): BAD}
    assert ledger.replayed(2) == {((0, 0, 2), 7): BAD}
    assert ledger.replayed(3) == {}


def test_what_is_about_to_be_taken_again_is_forgotten_everywhere(tmp_path: Path) -> None:
    written(tmp_path).cut(2)
    assert steps_in(tmp_path / "ledger/rank-0.jsonl") == steps_in(tmp_path / "ledger/rank-1.jsonl") == [1, 2]
    assert steps_in(tmp_path / "quarantine.jsonl") == [2]
    Ledger(tmp_path, 5).write(3, (0, 0, 2), [1], [])
    assert steps_in(tmp_path / "ledger/rank-5.jsonl") == [3]


def test_a_torn_last_line_is_ignored_and_cut_off(tmp_path: Path) -> None:
    ledger = written(tmp_path)
    path = tmp_path / "ledger/rank-1.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    assert ledger.replayed(0) == {((0, 0, 1), 7): BAD}
    ledger.cut(3)
    Ledger(tmp_path, 1).write(3, (0, 0, 2), [31], [])
    assert steps_in(path) == [1, 2, 3]


def test_a_resume_after_a_million_lines_reads_the_ends_of_the_files(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, 0)
    for rank in range(4):
        line = f'{{"step": %d, "position": [0, 0, %d], "samples": [{rank}], "refused": []}}\n'
        with (tmp_path / f"ledger/rank-{rank}.jsonl").open("w") as file:
            file.writelines(line % (step, step) for step in range(1, 250_001))
        Ledger(tmp_path, rank).write(250_001, (0, 0, 250_001), [], [BAD] if rank == 2 else [])
    before = int(Path("/proc/self/io").read_text().split()[1])  # bytes read so far
    assert ledger.replayed(249_990) == {((0, 0, 250_001), 7): BAD}
    ledger.cut(249_990)
    assert int(Path("/proc/self/io").read_text().split()[1]) - before < 1 << 20
    for rank in range(4):
        with (tmp_path / f"ledger/rank-{rank}.jsonl").open("rb") as file:
            file.seek(-100, 2)
            assert json.loads(file.readlines()[-1])["step"] == 249_990


def test_an_empty_folder_is_a_new_run(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, 0)
    ledger.cut(0)
    assert ledger.replayed(0) == {}
