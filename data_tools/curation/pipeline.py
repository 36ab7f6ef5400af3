"""Runs the stages in order, from the films of a folder to shards. `data_tools/curate.py` is the command."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.candidates import say
from data_tools.curation import captions, cut, embed, look, output, probe, scores, shots
from data_tools.curation.beside import caption_beside
from data_tools.curation.caption_folder import check_folder
from data_tools.curation.clips import (
    by_rule,
    clips_of,
    hashed,
    preferred,
    without_alike,
    without_copies,
    without_near,
)
from data_tools.curation.duplicates import HashIndex, Near
from data_tools.curation.engine import Engine, take_through
from data_tools.curation.find import find_films
from data_tools.curation.forbidden import list_parameters
from data_tools.curation.ledger import Ledger, write_text
from data_tools.curation.licences import Licences
from data_tools.curation.outcomes import Outcomes
from data_tools.curation.rules import Rule
from data_tools.curation.settings import Settings
from data_tools.curation.stage import Item, Outcome, Stage, code_version
from data_tools.media_files import key_of
from data_tools.shard_writer import Journal
from sora_train.core.cli import InputError

REPORT = "report.html"
HASHES, SETTLED = "hashes.parquet", "settled.json"


@dataclass
class Curated:
    """Outcome of a run of the pipeline."""

    outcomes: Outcomes
    films: list[Item] = field(default_factory=list)  # films that passed all stages of films
    clips: list[Item] = field(default_factory=list)  # clips that have scores
    near: Near | None = None
    stored: set[str] = field(default_factory=set)  # keys of clips in shards
    added: int = 0


class Pipeline:
    """Runs the films of a folder through all stages; results that the ledger has are taken from it.

    Args:
        settings: Options of the command.
        licences: Rights in the films.
        engine: Runs the stages on films and clips.
    """

    def __init__(self, settings: Settings, licences: Licences, engine: Engine) -> None:
        self.settings, self.licences, self.engine = settings, licences, engine
        self.out = Path(settings.out)
        self.ledger = Ledger(self.out)
        self.rule = Rule(settings.keep)
        self.done = Curated(Outcomes(settings.strict))
        # a missing model is reported now, not after hours of decoding
        if settings.captions and settings.has_model and not captions.is_server(settings.captions):
            check_folder(settings.captions)
        self._embedding = embed.stage(settings.near_model) if settings.near_model else None

    def run(self) -> Curated:
        """Run all stages. Raises InputError if the folder has no film, or the disk is full."""
        found, said = find_films(Path(self.settings.videos), self.licences, self.out)
        for line in said:
            say(line)
        if not found:
            raise InputError(f"no film in {self.settings.videos}")
        films = self._keep("rights", "film", found)
        self.done.films = self._looked_at(films)
        kept = self._chosen(self.done.films)
        if self.settings.until == "scores":
            return self.done
        self._write(kept)
        return self.done

    def stages(self) -> list[Stage]:
        """Build the stages of films and clips, except `embed` and `captions`."""
        s = self.settings
        forbidden = list_parameters(s.forbidden)
        return [
            probe.stage(s.short_side, forbidden), look.stage(s.cut_threshold, forbidden),
            shots.stage(s.min_seconds, s.max_seconds, s.trim, s.short_side), scores.stage(),
            cut.stage(s.crf, s.gop, s.max_side, s.stills if s.has_model else 0, s.cut == "copy"),
        ]  # fmt: skip

    def _looked_at(self, films: list[Item]) -> list[Item]:
        first, *others = self.stages()[:4]
        films = self._take(first, films, "film")
        films = self._keep("copies", "film", without_copies(films))
        for stage in others:
            films = self._take(stage, films, "film")
        return films

    def _chosen(self, films: Sequence[Item]) -> list[Item]:
        """Select the clips that meet the rule and aren't duplicates, and write scores, sources and hashes."""
        s = self.settings
        self.done.clips = self._keep("clips", "clip", clips_of(films))
        output.write_scores(self.out, self.done.clips)
        output.write_sources(self.out, films, code_version(tuple(m for stage in self.stages() for m in stage.modules)))
        kept = self._keep("rule", "clip", by_rule(self.done.clips, self.rule))
        self.done.stored = _keys(self._journal())
        settled = self._settled()
        results, self.done.near = without_near(kept, settled, s.near, s.review)
        kept = self._keep("duplicates", "clip", results)
        if self._embedding is not None:
            kept = self._take(self._embedding, kept, "clip")
            kept = self._keep("alike", "clip", without_alike(kept, settled, s.near_cosine))
        index = HashIndex()
        for clip in preferred(kept, settled):
            index.add(hashed(clip))
        index.write(self.out / HASHES)
        return kept

    def _write(self, clips: list[Item]) -> None:
        """Cut, caption and store the clips that are in no shard yet."""
        new = [clip for clip in clips if clip["key"] not in self.done.stored]
        if new:
            new = self._take(self.stages()[4], new, "clip")
            if self.settings.cut == "copy":
                copied = sum(clip["copied"] for clip in new)
                say(f"{copied} of {len(new)} clips hold their film's own packets; the others took encoding")
            new = self._captioned(new)
        journal = self._journal()
        self.done.added = output.write_shards(journal, self.ledger, new, int(self.settings.shard_size * 2**20))
        self.done.stored = _keys(journal)
        write_text(self.out / SETTLED, json.dumps(sorted(self.done.stored)))
        refused = output.check_shards(journal, self.settings.workers_or_all) if journal.shards else {}
        self._keep("index", "clip", [_indexed(key, refused) for key in sorted(self.done.stored)])

    def _captioned(self, clips: list[Item]) -> list[Item]:
        s = self.settings
        if not s.has_model:
            if s.captions != "beside":
                return clips
            return self._keep("captions", "clip", [caption_beside(clip, Path(s.videos)) for clip in clips])
        assert s.captions is not None
        model = captions.model_of(s.captions, s.model)
        try:
            threads = captions.Threads(s.requests if captions.is_server(s.captions) else 1)
            return self._keep("captions", "clip", take_through(captions.stage(model), clips, self.ledger, threads))
        finally:
            model.close()

    def _take(self, stage: Stage, items: list[Item], unit: str) -> list[Item]:
        return self._keep(stage.name, unit, take_through(stage, items, self.ledger, self.engine))

    def _keep(self, stage: str, unit: str, results: list[tuple[Item, Outcome]]) -> list[Item]:
        kept = self.done.outcomes.pass_through(stage, unit, results)
        say(str(self.done.outcomes.yields[-1]))
        return kept

    def _settled(self) -> set[str]:
        """Keys of the clips that were in shards at the end of the last run that wasn't killed.

        Clips that a killed run stored don't count, so that resuming it chooses among near-duplicates as one
        uninterrupted run does.
        """
        path = self.out / SETTLED
        return set(json.loads(path.read_text())) if path.is_file() else set()

    def _journal(self) -> Journal:
        made = {stage.name: dict(stage.parameters) for stage in self.stages() if stage.name in ("shots", "cut")}
        captioned = self.settings.captions if self.settings.captions in (None, "none", "beside") else "model"
        return Journal(self.out, {"curated": 1, **made, "captions": captioned or "none"})


def _keys(journal: Journal) -> set[str]:
    """Keys of the clips in shards."""
    return {key_of(sample) for sample in journal.samples}


def _indexed(key: str, refused: Mapping[str, str]) -> tuple[Item, Outcome]:
    """A clip in a shard with its outcome: failed if the index refused it."""
    item = {"id": key, "name": key}
    return item, {"failed": ["refused by the index", refused[key]]} if key in refused else {"kept": {}}
