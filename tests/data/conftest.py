"""How the tests here give single requests to decode processes a deadline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sora_train.data.read import pool
from tests.data.deadlines import Deadlines


@pytest.fixture
def deadlines(monkeypatch: pytest.MonkeyPatch) -> Deadlines:
    """Set the function from a request to the seconds that it is given, in place of the pool's own."""
    true = pool._Child.ask

    def choose(seconds: Callable[[dict[str, Any]], float]) -> None:
        def ask(child: pool._Child, request: dict[str, Any], handed: bytes | None, timeout_s: float) -> dict[str, Any]:
            return true(child, request, handed, seconds(request))

        monkeypatch.setattr(pool._Child, "ask", ask)

    return choose
