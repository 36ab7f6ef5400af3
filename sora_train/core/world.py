"""Who am I: the one reader of the environment that torchrun sets."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from sora_train.core.cli import InputError


@dataclass(frozen=True)
class World:
    """Places of this process in the job; a lone process is rank 0 of 1."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0  # how often torchrun or the launch script has started this again by itself
    sequence: int = 1  # ranks that share the tokens of a pack; neighbours

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that speaks for all."""
        return self.rank == 0

    @property
    def sequence_rank(self) -> int:
        """Which part of its packs' tokens this rank holds."""
        return self.rank % self.sequence

    @property
    def data_rank(self) -> int:
        """Which data-parallel group this rank belongs to: the ranks of a group see the same packs."""
        return self.rank // self.sequence

    @property
    def data_size(self) -> int:
        """Data-parallel groups of the job."""
        return self.size // self.sequence

    def with_sequence(self, degree: int) -> World:
        """The same places in groups of `degree` ranks. Raises InputError where the ranks don't divide."""
        if self.size % degree:
            raise InputError(f"parallel.sequence={degree} doesn't divide the {self.size} rank(s)")
        return replace(self, sequence=degree)

    @property
    def launched(self) -> bool:
        """Whether a launcher (torchrun) started this process."""
        return "TORCHELASTIC_RUN_ID" in os.environ


def from_environment() -> World:
    """Read RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE; a plain `python -m` start has none of them."""
    env = os.environ
    return World(
        rank=int(env.get("RANK", 0)),
        size=int(env.get("WORLD_SIZE", 1)),
        local_rank=int(env.get("LOCAL_RANK", 0)),
        local_size=int(env.get("LOCAL_WORLD_SIZE", 1)),
        restarts=int(env.get("TORCHELASTIC_RESTART_COUNT", 0)) + int(env.get("SORA_RESTARTS", 0)),
    )
