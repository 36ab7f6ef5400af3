"""The benchmark of scaling: its arithmetic by value, and its small form whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.scaling import Case, Options, cases, least_bytes, part_rows, speed_rows
from benchmarks.step_parts import kind_of, parts_of

ROOT = Path(__file__).parents[1]


def _event(name: str, start: float, end: float, thread: int = 1, own: float | None = None, **more: Any) -> Any:
    span = SimpleNamespace(start=start, end=end)
    own = end - start if own is None else own
    return SimpleNamespace(name=name, time_range=span, thread=thread, self_cpu_time_total=own, is_async=False, **more)


def test_a_step_is_divided_by_what_its_time_goes_into() -> None:
    """Microseconds: 0 to 100, with products 10-30, another operation 30-40, and an update of 60-70 in 55-90."""
    events = [
        _event("part: step", 0, 100), _event("part: update", 55, 90), _event("aten::linear", 10, 30, own=2),
        _event("aten::addmm", 12, 30), _event("aten::mul", 30, 40), _event("aten::_fused_adamw_", 60, 70),
        _event("gloo:all_reduce", 40, 58, thread=2, input_shapes=[[1000], [24]], input_dtypes=["float"] * 2),
        _event("aten::mm", 0, 100, thread=3),
    ]  # fmt: skip
    found = parts_of(events, ranks=4)
    expected = {
        "products": 20,
        "attention": 0,
        "elementwise": 10,
        "update": 10,
        "waiting for collectives": 18,
        "host": 42,
    }
    assert found.seconds == pytest.approx({name: us / 1e6 for name, us in expected.items()})
    assert found.calls == {"all_reduce": 1} and found.sent == 2 * 4 * 1024 * 3 / 4
    assert found.collective_s == pytest.approx({"all_reduce": 18e-6})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", "products"), ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("sora_train::packed_attention_backward", "attention"), ("aten::mul", "elementwise"), ("gloo:all_reduce", ""),
    ],
)  # fmt: skip
def test_operations_have_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def _values(ms: float, cpu_ms: float, sent: float) -> dict[str, Any]:
    seconds = dict.fromkeys(("products", "attention", "elementwise", "update", "waiting for collectives", "host"), 1e-3)
    parts = {"seconds": seconds, "calls": {"all_reduce": 3}, "collective_s": {"all_reduce": 2e-3}, "sent": sent}
    return {"seconds": [ms / 1e3, ms / 1e3, 9.0], "cpu_seconds": [cpu_ms / 1e3] * 3, "parts": parts, "bytes": 2**20}


def test_efficiency_is_against_one_rank_of_the_same_way() -> None:
    found = {
        Case("small", "fp32", 1): {"zero1": _values(100, 90, 0)},
        Case("small", "fp32", 2): {"zero1": _values(125, 198, 1.5 * 2**20)},
    }
    one, two = speed_rows(found)
    assert one[:5] == ("small, fp32", "1", "zero1", "100.0", "")
    assert two == ("small, fp32", "2", "zero1", "125.0", "80%", "99.0", "+10%", "3", "1.5", "1.50")
    assert part_rows(found) == [("small, fp32", "2", "zero1", *["1.0"] * 6, "all_reduce 2.0")]


def test_the_least_is_what_the_algorithm_needs() -> None:
    assert least_bytes("zero1", 8.0, 4) == least_bytes("ddp", 8.0, 4) == 12.0
    assert least_bytes("zero3", 8.0, 4) == 18.0 and least_bytes("ddp", 8.0, 1) == 0.0
    assert len(list(cases(Options()))) == 2 * 2 * 3


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_the_small_form_runs_whole() -> None:
    command = [sys.executable, "-m", "benchmarks.scaling", "tiny=true", "ranks=[1,2]", "rounds=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.count(" | ") > 5]
    assert len(rows) == 2 * 2 * 6 + 2 * 6
