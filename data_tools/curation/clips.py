"""Turns the shots of films into clips, and drops clips by a rule and as near-duplicates."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from data_tools.curation.duplicates import Hashed, Near, find_near
from data_tools.curation.embed import from_text
from data_tools.curation.rules import Rule
from data_tools.curation.stage import Item, Outcome
from data_tools.media_files import key_of

_OF_FILM = ("shots", "scores", "id", "slow")  # fields of a film that its clips don't have
Results = list[tuple[Item, Outcome]]


def clips_of(films: Sequence[Item]) -> Results:
    """Turn every shot of the films into a clip with its scores; shots that have a reason to be dropped are dropped."""
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
    """The name of a clip in shards: its film's name, the start of the film's SHA-256, and the clip's first frame."""
    return f"{film['name']}#{film['sha256'][:16]}-{shot['start']}"


def _part_of(film: Item, number: int) -> int:
    """Number of the first part of the long shot that a shot is part of; parts have no frames between them."""
    while number and film["shots"][number - 1]["end"] == film["shots"][number]["start"]:
        number -= 1
    return number


def without_copies(films: Sequence[Item]) -> Results:
    """Drop films that have the same bytes as an earlier one. Returns all films with their outcomes."""
    first: dict[str, str] = {}
    found: Results = []
    for film in films:
        other = first.setdefault(film["sha256"], film["name"])
        same = other != film["name"]
        found.append((film, {"dropped": ["copy", f"the same bytes as {other}"]} if same else {"kept": {}}))
    return found


def preferred(clips: Sequence[Item], stored: Collection[str]) -> list[Item]:
    """Sort clips by preference: first those that are in shards (keys `stored`), then larger ones, then longer ones."""

    def preference(clip: Item) -> tuple[bool, float, int, str]:
        top, bottom, left, right = clip["border"]
        pixels = (clip["height"] - top - bottom) * (clip["width"] - left - right)
        return clip["key"] not in stored, -pixels, clip["start"] - clip["end"], clip["key"]

    return sorted(clips, key=preference)


def without_near(clips: Sequence[Item], stored: Collection[str], near: float, review: float) -> tuple[Results, Near]:
    """Drop clips that are near-duplicates of a preferred one. Returns all clips with their outcomes, and the pairs.

    Args:
        clips: Clips in any order.
        stored: Keys of the clips in shards.
        near: Mean number of differing bits, of 64, up to which clips are dropped.
        review: The same, up to which pairs are listed for review.
    """
    found = find_near([hashed(clip) for clip in preferred(clips, stored)], near, review)
    results: Results = []
    for clip in clips:
        other = found.dropped.get(clip["key"])
        detail = f"{other[1]:g} of 64 bits from {other[0]}" if other else ""
        results.append((clip, {"dropped": ["near duplicate", detail]} if other else {"kept": {}}))
    return results, found


def hashed(clip: Item) -> Hashed:
    """The hashes of a clip."""
    return Hashed.of(clip["key"], clip["hashes"], clip["mirrored_hashes"], clip["shot"])


def without_alike(clips: Sequence[Item], stored: Collection[str], cosine: float) -> Results:
    """Drop clips whose feature vector is close to that of a preferred clip, except parts of the same shot."""
    kept: list[Item] = []
    dropped: dict[str, str] = {}
    bank_ND = np.zeros((len(clips), len(from_text(clips[0]["vector"])) if clips else 0), np.float32)
    for clip in preferred(clips, stored):
        vector_D = from_text(clip["vector"])
        cosines = bank_ND[: len(kept)] @ vector_D
        near = [int(n) for n in np.flatnonzero(cosines >= cosine) if kept[n]["shot"] != clip["shot"]]
        if near:
            best = max(near, key=lambda n: float(cosines[n]))
            dropped[clip["key"]] = f"cosine {cosines[best]:.3f} with {kept[best]['key']}"
            continue
        bank_ND[len(kept)] = vector_D
        kept.append(clip)
    return [
        (clip, {"dropped": ["alike", dropped[clip["key"]]]} if clip["key"] in dropped else {"kept": {}})
        for clip in clips
    ]


def by_rule(clips: Sequence[Item], rule: Rule) -> Results:
    """Drop clips that don't meet the rule; the reason is the first part of the rule that a clip doesn't meet."""
    return [
        (clip, {"dropped": [f"not {reason}", _values(clip, reason)]} if reason else {"kept": {}})
        for clip, reason in zip(clips, rule.reasons(clips), strict=True)
    ]


def _values(clip: Item, reason: str) -> str:
    names = [word for word in reason.replace("(", " ").replace(")", " ").split() if word in clip]
    return ", ".join(f"{name} is {'unknown' if clip[name] is None else format(clip[name], '.4g')}" for name in names)
