"""Blind votes of people on pairs of videos: a page that needs no server, and strengths from the votes it exports."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from sora_train.core.cli import InputError
from sora_train.core.page import page
from sora_train.core.seeds import below, order, uniform
from sora_train.evaluation.folder import read_prompts, videos_in

_SIDE, _PLACE, _PAIR, _AGAIN = range(4)  # streams of the seed
_ROUNDS, _TOLERANCE = 10_000, 1e-10

_TEMPLATE = """
<p id=told>Which video is better? Keys: <b>1</b> left, <b>2</b> right, <b>3</b> alike. Votes stay in this browser until
you save them.</p>
<p id=prompt></p>
<div class=grid><figure><video id=left controls loop muted autoplay playsinline></video></figure>
<figure><video id=right controls loop muted autoplay playsinline></video></figure></div>
<p><button id=b1>left</button> <button id=b2>right</button> <button id=b3>alike</button>
<span id=count></span> <button id=save>save votes</button></p>
<style>video { width: min(44vw, 560px) } button { font: inherit; padding: .3em 1em }</style>
<script>
const trials = {{ trials|tojson }}, name = {{ name|tojson }};
let votes = JSON.parse(localStorage.getItem(name) || "[]");
const at = id => document.getElementById(id);
function show() {
  const done = votes.length >= trials.length;
  at("count").textContent = votes.length + " of " + trials.length;
  for (const id of ["b1", "b2", "b3"]) at(id).disabled = done;
  if (done) { at("prompt").textContent = "All done. Save your votes, and hand the file over."; return; }
  const trial = trials[votes.length];
  at("prompt").textContent = trial.prompt;
  for (const side of ["left", "right"]) at(side).src = trial[side];
}
function vote(choice) {
  if (votes.length >= trials.length) return;
  votes.push({trial: votes.length, choice: choice});
  localStorage.setItem(name, JSON.stringify(votes));
  show();
}
at("b1").onclick = () => vote("left"); at("b2").onclick = () => vote("right"); at("b3").onclick = () => vote("alike");
addEventListener("keydown", e => { const c = {1: "left", 2: "right", 3: "alike"}[e.key]; if (c) vote(c); });
at("save").onclick = () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify({page: name, votes: votes})], {type: "application/json"}));
  link.download = name + "-votes.json"; link.click();
};
show();
</script>
"""


@dataclass(frozen=True)
class Pair:
    """One question: the same prompt by two models, `left` and `right` as shown."""

    name: str
    prompt: str
    left: str  # folders
    right: str
    again: bool = False  # repeats an earlier question with the sides exchanged, to measure a person's consistency


@dataclass(frozen=True)
class Strength:
    """A model's strength: the log odds of a win; a strength higher by 1 wins e : 1. The mean of all models is 0."""

    model: str
    value: float
    low: float
    high: float
    votes: int


def pairs_of(folders: Sequence[str], prompts: str | None, count: int, seed: int, repeats: float) -> list[Pair]:
    """Draw at most `count` pairs of videos of the same name in two of the folders.

    `seed` determines pairs, order and sides. A share `repeats` of the pairs is repeated later with the sides exchanged.
    Raises InputError for fewer than two folders, or folders without common names.
    """
    if len(set(folders)) < 2:
        raise InputError("votes compare two folders of videos or more; give side_by_side=[A,B]")
    texts = read_prompts(prompts) if prompts else {}
    common = sorted(set.intersection(*(set(videos_in(folder)) for folder in folders)))
    if not common:
        raise InputError(f"{', '.join(folders)} have no video of one name")
    every = [(n, a, b) for n in range(len(common)) for a in range(len(folders)) for b in range(a)]
    found = []
    for place in order(seed, _PAIR, np.arange(len(every)))[:count]:
        name, a, b = every[place]
        sides = (folders[a], folders[b]) if uniform(seed, _SIDE, int(place)) < 0.5 else (folders[b], folders[a])
        found.append(Pair(common[name], str(texts.get(common[name], {}).get("caption", "")), *sides))
    chosen = order(seed, _AGAIN, np.arange(len(found)))[: round(repeats * len(found))]
    for first in [found[n] for n in chosen]:
        after = found.index(first) + 1
        later = after + int(below(len(found) - after + 1, seed, _PLACE, len(found)))
        found.insert(later, Pair(first.name, first.prompt, first.right, first.left, True))
    return found


def write_votes_page(pairs: Sequence[Pair], out: Path) -> None:
    """Write the page and, beside it, the key `NAME.key.json`, which tells the folders of each pair.

    The key must not be given to voters.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    files = {folder: videos_in(folder) for pair in pairs for folder in (pair.left, pair.right)}
    trials = [
        {
            "prompt": pair.prompt,
            **{
                side: os.path.relpath(files[folder][pair.name], out.parent)
                for side, folder in (("left", pair.left), ("right", pair.right))
            },
        }
        for pair in pairs
    ]
    out.write_text(page("Side by side", _TEMPLATE, {"trials": trials, "name": out.stem}), encoding="utf-8")
    out.with_suffix(".key.json").write_text(json.dumps([asdict(pair) for pair in pairs], indent=1) + "\n")


def read_votes(key: str, files: Sequence[str]) -> tuple[list[tuple[str, str, float]], tuple[int, int]]:
    """Read files of votes with the key of their page.

    Returns:
        For every vote (model, other model, points of the first: 1, 0.5 or 0), without repeated pairs; and for repeated
        pairs (number that agree with the first vote, number of all).

    Raises:
        InputError: The files don't belong to the key.
    """
    try:
        pairs = [Pair(**pair) for pair in json.loads(Path(key).read_text())]
        sheets = [json.loads(Path(file).read_text())["votes"] for file in files]
        points = {"left": 1.0, "right": 0.0, "alike": 0.5}
        found, agree, again = [], 0, 0
        for votes in sheets:
            first: dict[tuple[str, frozenset[str]], tuple[str, float]] = {}
            for vote in votes:
                pair, point = pairs[vote["trial"]], points[vote["choice"]]
                about = (pair.name, frozenset((pair.left, pair.right)))
                if pair.again and about in first:
                    left, before = first[about]
                    again, agree = again + 1, agree + (point == (before if left == pair.left else 1.0 - before))
                    continue
                first[about] = (pair.left, point)
                found.append((pair.left, pair.right, point))
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"these are no votes for {key}: {type(error).__name__}: {error}") from error
    return found, (agree, again)


def strengths(votes: Sequence[tuple[str, str, float]]) -> list[Strength]:
    """Compute Bradley-Terry strengths by maximum likelihood with 95% intervals from the Fisher information.

    R. Bradley and M. Terry, "Rank analysis of incomplete block designs", Biometrika 39 (1952); fitted by the
    minorisation of D. Hunter, Annals of Statistics 32 (2004). A tie counts as half a win for each. Half a tie is added
    for every two models, so that the strength of a model without defeats is finite.

    Args:
        votes: Votes as returned by `read_votes`.

    Returns:
        The strengths, strongest model first.

    Raises:
        InputError: There are votes on fewer than two models.
    """
    models = sorted({name for vote in votes for name in vote[:2]})
    if len(models) < 2:
        raise InputError("strengths take votes on two models or more")
    size = len(models)
    wins = 0.25 * (1 - np.eye(size))
    for first, second, point in votes:
        a, b = models.index(first), models.index(second)
        wins[a, b] += point
        wins[b, a] += 1.0 - point
    games, total = wins + wins.T, wins.sum(1)
    worth = np.ones(size)
    for _ in range(_ROUNDS):
        updated = total / (games / (worth[:, None] + worth[None, :])).sum(1)
        updated /= np.exp(np.log(updated).mean())
        done, worth = bool(np.abs(np.log(updated / worth)).max() < _TOLERANCE), updated
        if done:
            break
    chance = worth[:, None] / (worth[:, None] + worth[None, :])
    weight = games * chance * chance.T
    information = np.diag(weight.sum(1)) - weight
    error = 1.959964 * np.sqrt(np.diag(np.linalg.pinv(information)))
    value = np.log(worth)
    counted = [sum(name in vote[:2] for vote in votes) for name in models]
    found = [
        Strength(name, float(v), float(v - e), float(v + e), n)
        for name, v, e, n in zip(models, value, error, counted, strict=True)
    ]
    return sorted(found, key=lambda one: -one.value)


def strengths_table(found: Sequence[Strength], repeats: tuple[int, int]) -> Table:
    """Build a table with a line per model. `repeats`: number of repeats that agree, number of all."""
    title = "strengths (1 more wins e : 1)" + (f"; {repeats[0]} of {repeats[1]} repeats agree" if repeats[1] else "")
    out = Table(title=title)
    for head in ("videos", "strength (95% interval)", "votes"):
        out.add_column(head)
    for one in found:
        out.add_row(one.model, f"{one.value:+.2f} ({one.low:+.2f} to {one.high:+.2f})", str(one.votes))
    return out


def as_json(found: Sequence[Strength], repeats: tuple[int, int]) -> Mapping[str, Any]:
    """Convert the strengths to a map for a JSON file. `repeats`: number of repeats that agree, number of all."""
    return {"strengths": [asdict(one) for one in found], "repeats_agree": repeats[0], "repeats": repeats[1]}
