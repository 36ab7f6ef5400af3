"""Builds samples from candidates: cuts out parts of files, probes media in parallel, and reads the usable ones."""

from __future__ import annotations

import shutil
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from data_tools.candidates import Candidate, Refusals
from data_tools.captions import Refused
from data_tools.cut import cut_file
from data_tools.media_files import digest, extension_of, hash_of, media_extension
from data_tools.progress import progress
from data_tools.shard_writer import Mark, Members
from sora_train.config.schema import Probe
from sora_train.data.read.decode import DecodeError
from sora_train.data.read.pool import Pool

Sample = tuple[Candidate, tuple[Mark, Members]]
_KINDS = {"not_a_video": "not a video", "empty": "empty file", "missing": "unreadable"}
_CUTS = ".cut-"  # prefix of temporary folders of parts; those left by a killed run are removed


class SampleBuilder:
    """Builds the members of samples of a folder. Parts of files are stored in a temporary folder of `out`."""

    def __init__(self, folder: Path, out: Path, workers: int, probe: Probe, refusals: Refusals) -> None:
        self.folder, self.out, self.workers, self.probe, self.refusals = folder, out, workers, probe, refusals
        self._source = ("", "")  # the last file of which parts were taken, and its hash
        for left in out.glob(f"{_CUTS}*"):
            shutil.rmtree(left)

    def build(self, candidates: Sequence[Candidate], what: str) -> Iterator[Sample]:
        """Yield the usable candidates in order, each with its mark and members; refuse the others.

        `what` labels the progress bar.
        """
        if not candidates:
            return
        with ExitStack() as stack:
            pool = stack.enter_context(Pool(self.workers))
            advance = stack.enter_context(progress(len(candidates), what))
            rest = self._files(candidates, stack)
            waiting: deque[tuple[Candidate, Path | Refused, Future[dict[str, Any]] | None]] = deque()
            for _ in candidates:
                for candidate, file in islice(rest, 8 * self.workers - len(waiting)):
                    waiting.append((candidate, file, self._probed(pool, file)))
                candidate, file, figures = waiting.popleft()
                try:
                    yield candidate, self._made(candidate, file, figures)
                except DecodeError as error:
                    self.refusals.add(candidate.name, Refused(_KINDS.get(error.cause, "undecodable"), str(error)))
                except OSError as error:
                    self.refusals.add(candidate.name, Refused("unreadable", error.strerror or str(error)))
                except Refused as reason:
                    self.refusals.add(candidate.name, reason)
                advance(1)

    def _probed(self, pool: Pool, file: Path | Refused) -> Future[dict[str, Any]] | None:
        """Start to probe a file; None for a refused one. A probe that hangs is aborted."""
        if isinstance(file, Refused):
            return None
        pixels, whole = self.probe is not Probe.packets, self.probe is Probe.all
        return pool.probe(str(file), extension_of(file.name), pixels=pixels, whole=whole)

    def _made(
        self, candidate: Candidate, file: Path | Refused, figures: Future[dict[str, Any]] | None
    ) -> tuple[Mark, Members]:
        if isinstance(file, Refused) or figures is None:
            raise file if isinstance(file, Refused) else AssertionError(candidate.name)
        figures.result()
        source = self.folder / candidate.file
        stat, data = source.stat(), file.read_bytes()
        if candidate.part is None:
            hashed = digest(data)
        else:
            if self._source[0] != candidate.file:
                self._source = candidate.file, hash_of(source)
            hashed = self._source[1]
            file.unlink()
        mark = Mark(stat.st_size, stat.st_mtime_ns, hashed, digest(candidate.text) if candidate.extension else "")
        text = [(candidate.extension, candidate.text)] if candidate.extension else []
        return mark, [(media_extension(file.name) or "", data), *text]

    def _files(self, candidates: Sequence[Candidate], stack: ExitStack) -> Iterator[tuple[Candidate, Path | Refused]]:
        """Yield each candidate, in order, with its file or its part as a file. Parts are cut ahead, in parallel."""
        if all(candidate.part is None for candidate in candidates):
            yield from ((candidate, self.folder / candidate.file) for candidate in candidates)
            return
        self.out.mkdir(parents=True, exist_ok=True)
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=_CUTS, dir=self.out)))
        threads = stack.enter_context(ThreadPoolExecutor(self.workers))
        groups = enumerate(list(group) for _, group in groupby(candidates, lambda candidate: candidate.file))
        waiting: deque[Future[list[tuple[Candidate, Path | Refused]]]] = deque()
        while True:
            for number, group in islice(groups, 2 * self.workers - len(waiting)):
                waiting.append(threads.submit(self._cut, group, place / str(number)))
            if not waiting:
                return
            yield from waiting.popleft().result()

    def _cut(self, group: list[Candidate], place: Path) -> list[tuple[Candidate, Path | Refused]]:
        """Cut the parts of one file into the folder `place`. Returns each candidate with its file or refusal."""
        parts = [candidate.part for candidate in group if candidate.part is not None]
        if not parts:
            return [(candidate, self.folder / candidate.file) for candidate in group]
        place.mkdir()
        wrong = iter(enumerate(cut_file(self.folder / group[0].file, parts, place)))
        found: list[tuple[Candidate, Path | Refused]] = []
        for candidate in group:
            if candidate.part is None:
                found.append((candidate, self.folder / candidate.file))
                continue
            number, reason = next(wrong)
            found.append((candidate, Refused("part", reason) if reason else place / f"{number}.mp4"))
        return found
