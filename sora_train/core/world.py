"""Rank and world size of this process, from torchrun's environment variables (read here and nowhere else)."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from sora_train.core.cli import InputError


@dataclass(frozen=True)
class World:
    """Rank of this process in the job and on its node; a single process is rank 0 of 1."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0  # automatic restarts so far, by torchrun or the launch script
    sequence: int = 1  # degree of sequence parallelism: so many consecutive ranks share the tokens of a pack

    @property
    def is_main(self) -> bool:
        """True on rank 0, which logs and writes for the whole job."""
        return self.rank == 0

    @property
    def sequence_rank(self) -> int:
        """Rank within the sequence-parallel group: the number of the token part that this rank holds."""
        return self.rank % self.sequence

    @property
    def data_rank(self) -> int:
        """Number of this rank's sequence-parallel group; the ranks of a group get the same packs."""
        return self.rank // self.sequence

    @property
    def data_size(self) -> int:
        """Number of sequence-parallel groups: the data-parallel degree."""
        return self.size // self.sequence

    def with_sequence(self, degree: int) -> World:
        """Copy with sequence-parallel groups of `degree` ranks. Raises InputError if they don't divide the ranks."""
        if self.size % degree:
            raise InputError(f"parallel.sequence={degree} doesn't divide the {self.size} rank(s)")
        return replace(self, sequence=degree)

    @property
    def launched(self) -> bool:
        """True if torchrun started this process."""
        return "TORCHELASTIC_RUN_ID" in os.environ


def from_environment() -> World:
    """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; without them (plain `python -m`) it is rank 0 of 1."""
    env = os.environ
    return World(
        rank=int(env.get("RANK", 0)),
        size=int(env.get("WORLD_SIZE", 1)),
        local_rank=int(env.get("LOCAL_RANK", 0)),
        local_size=int(env.get("LOCAL_WORLD_SIZE", 1)),
        restarts=int(env.get("TORCHELASTIC_RESTART_COUNT", 0)) + int(env.get("SORA_RESTARTS", 0)),
    )
