"""Clips: the shots of films as items of their own, and which of them a rule and near-duplicates leave."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from data_tools.curation.duplicates import Hashed, Near, find_near
from data_tools.curation.rules import Rule
from data_tools.curation.stage import Item, Outcome
from data_tools.media_files import key_of

_OF_FILM = ("shots", "scores", "id", "slow")  # fields of a film that its clips don't have
Results = list[tuple[Item, Outcome]]


def clips_of(films: Sequence[Item]) -> Results:
    """Every shot of the films, with its scores, or dropped for the reason that its stage gave."""
    found: Results = []
    for film in films:
        shared = {name: value for name, value in film.items() if name not in _OF_FILM}
        for number, (shot, scores) in enumerate(zip(film["shots"], film["scores"], strict=True)):
            sample = sample_name(film, shot)
            clip = shared | shot | (scores or {})
            clip |= {"sample": sample, "id": key_of(sample), "key": key_of(sample)}
            clip["shot"] = f"{film['sha256']}/{_part_of(film, number)}"
            found.append((clip, {"dropped": [shot["reason"], shot["detail"]]} if shot["reason"] else {"kept": {}}))
    return found


def sample_name(film: Item, shot: Item) -> str:
    """The name of a clip, by which it is known in shards: its film, the film's content, and where it begins."""
    return f"{film['name']}#{film['sha256'][:16]}-{shot['start']}"


def _part_of(film: Item, number: int) -> int:
    """The first shot in a row of those that follow one another without a frame between: parts of one long shot."""
    while number and film["shots"][number - 1]["end"] == film["shots"][number]["start"]:
        number -= 1
    return number


def without_copies(films: Sequence[Item]) -> Results:
    """The films, of which those that have the bytes of an earlier one are dropped."""
    first: dict[str, str] = {}
    found: Results = []
    for film in films:
        other = first.setdefault(film["sha256"], film["name"])
        same = other != film["name"]
        found.append((film, {"dropped": ["copy", f"the same bytes as {other}"]} if same else {"kept": {}}))
    return found


def without_near(clips: Sequence[Item], stored: Collection[str], near: float, review: float) -> tuple[Results, Near]:
    """The clips, of which those that are near a preferred one are dropped.

    Those that are in shards are preferred to others, then larger and longer ones.
    """

    def preference(clip: Item) -> tuple[bool, float, int, str]:
        top, bottom, left, right = clip["border"]
        pixels = (clip["height"] - top - bottom) * (clip["width"] - left - right)
        return clip["key"] not in stored, -pixels, clip["start"] - clip["end"], clip["key"]

    ordered = sorted(clips, key=preference)
    hashed = [Hashed.of(clip["key"], clip["hashes"], clip["mirrored_hashes"], clip["shot"]) for clip in ordered]
    found = find_near(hashed, near, review)
    results: Results = []
    for clip in clips:
        other = found.dropped.get(clip["key"])
        detail = f"{other[1]:g} of 64 bits from {other[0]}" if other else ""
        results.append((clip, {"dropped": ["near duplicate", detail]} if other else {"kept": {}}))
    return results, found


def by_rule(clips: Sequence[Item], rule: Rule) -> Results:
    """The clips, of which those that don't meet the rule are dropped by its first part that they miss."""
    return [
        (clip, {"dropped": [f"not {reason}", _values(clip, reason)]} if reason else {"kept": {}})
        for clip, reason in zip(clips, rule.reasons(clips), strict=True)
    ]


def _values(clip: Item, reason: str) -> str:
    names = [word for word in reason.replace("(", " ").replace(")", " ").split() if word in clip]
    return ", ".join(f"{name} is {'unknown' if clip[name] is None else format(clip[name], '.4g')}" for name in names)
