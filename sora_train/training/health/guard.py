"""Stop conditions of a run: signals, and too many samples that can't be used."""

from __future__ import annotations

import signal
from types import FrameType

from sora_train.core.cli import InputError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_WATCHED = 1000  # window, in samples, of the share of bad ones


class Guard:
    """Records stop signals, so that the run can finish its step and save. A second Ctrl-C stops it at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # which nohup set
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    @property
    def wants_stop(self) -> bool:
        """True once a stop signal was received."""
        return self.received is not None


class BadShare:
    """Share of refused samples among the last thousand, from counts over all ranks."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._recent: list[tuple[int, int]] = []

    def add(self, arrived: int, refused: int, causes: dict[str, int]) -> None:
        """Count a step. Raises InputError, on all ranks at the same step, if the share exceeds the limit."""
        self._recent.append((arrived, refused))
        while sum(a + r for a, r in self._recent[1:]) >= _WATCHED:
            self._recent.pop(0)
        total, bad = (sum(a + r for a, r in self._recent), sum(r for _, r in self._recent))
        if bad > self.limit * total and total >= min(_WATCHED, 100):
            top = ", ".join(f"{cause} {count}" for cause, count in sorted(causes.items(), key=lambda c: -c[1])[:3])
            raise InputError(
                f"{bad} of the last {total} samples could not be used (data.max_bad_fraction={self.limit}); "
                f"this rank saw: {top or 'none of them'}; quarantine.jsonl names each"
            )
