"""Packing beside what others do, from the same simulated clips: balance of the slots, and departure from the mix.

    python -m benchmarks.packing [clips=20000]

Three stages of training see the same clips: 2-16 s log-normal (median 4.5, deviation of the logarithm 0.65), 240p to
1080p, 16:9 60%, 9:16 22%, 1:1 8%, 4:3 10%, at 12 fps; a VAE of 8x8x4, patches of 2, and the cost of a width of 3,072:
24 * 3072 * L + 4 * L^2. All numbers come from hashes, so the table is the same everywhere but for its times.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from statistics import NormalDist

import numpy as np

from benchmarks.report import write
from sora_train.core.cost import Cost, Geometry
from sora_train.core.seeds import uniform
from sora_train.data.order.packing import pack, spans
from sora_train.data.order.visits import fit_sizes

SLOTS, WINDOW, FILL = 64, 4096, 0.9
MOST = 8  # slots of a pack, where packs may take several
CAPS = (1.0, 1.5, 2.0, 3.0, 4.0)  # of the longest clip
STAGES = {"256p": 256 * 455, "480p": 480 * 853, "up to 720p": 720 * 1280}
LENGTHS = (25, 49, 73, 97, 145, 193)  # frames of the buckets
HEIGHTS = (144, 240, 360, 480, 720)
ASPECTS = (16 / 9, 9 / 16, 1.0, 4 / 3, 3 / 4)
_GEOMETRY, _COST = Geometry(4, 8, 2), Cost(24 * 3072, 4)

Steps = list[list[list[int]]]


@dataclass
class Clips:
    """Simulated clips of one stage; `cost` in forward FLOPs per unit of width."""

    frames: np.ndarray
    height: np.ndarray
    width: np.ndarray
    tokens: np.ndarray
    max_pixels: int

    @property
    def cost(self) -> np.ndarray:
        """Cost of each clip."""
        return cost_of(self.tokens)


def cost_of(tokens: np.ndarray) -> np.ndarray:
    """Cost of clips of these lengths."""
    return _COST.per_token * tokens + _COST.per_pair * tokens**2


def simulate(count: int, max_pixels: int) -> Clips:
    """Clips of one stage, the same for every stage but for their size."""
    n, normal = np.arange(count), NormalDist()
    low, high = (normal.cdf(np.log(s / 4.5) / 0.65) for s in (2, 16))
    drawn = low + uniform(1, n) * (high - low)
    seconds = 4.5 * np.exp(0.65 * np.array([normal.inv_cdf(u) for u in drawn.tolist()]))
    height = np.array([240, 360, 480, 720, 1080])[_pick((0.15, 0.2, 0.25, 0.25, 0.15), uniform(2, n))]
    aspect = np.array(ASPECTS)[_pick((0.6, 0.22, 0.08, 0.1), uniform(3, n))]
    tall = np.where(aspect < 1, np.rint(height / aspect), height).astype(np.int64)
    wide = np.where(aspect < 1, height, np.rint(height * aspect)).astype(np.int64)
    frames = 1 + (np.floor(seconds * 12).astype(np.int64) - 1) // _GEOMETRY.temporal_stride * _GEOMETRY.temporal_stride
    return Clips(frames, tall, wide, _tokens(frames, tall, wide, max_pixels), max_pixels)


def _pick(shares: tuple[float, ...], drawn: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.cumsum(shares), drawn, side="right")


def _tokens(frames: np.ndarray, height: np.ndarray, width: np.ndarray, max_pixels: int) -> np.ndarray:
    crop = fit_sizes(height, width, max_pixels, _GEOMETRY.multiple, "crop")[1]
    return (1 + (frames - 1) // 4) * crop[:, 2] * crop[:, 3] // _GEOMETRY.multiple**2


def ours(clips: Clips, cap: int, most: int = 1) -> tuple[Steps, np.ndarray]:
    """Windows of the default size, packed as training does it."""
    steps: Steps = []
    for start in range(0, len(clips.tokens), WINDOW):
        part = slice(start, start + WINDOW)
        packed = pack(clips.tokens[part], clips.cost[part], SLOTS, cap, FILL, start, most=most)
        steps += [[[start + i for i in slot] for slot in step] for step in packed]
    return steps, clips.tokens


def shared(clips: Clips, cap: int) -> tuple[Steps, np.ndarray]:
    """The same with packs of several slots, whose ranks share the pack's tokens."""
    return ours(clips, cap, MOST)


def _into_steps(packs: list[list[int]]) -> Steps:
    return [packs[n : n + SLOTS] for n in range(0, len(packs) // SLOTS * SLOTS, SLOTS)]


def stream_order(clips: Clips, cap: int, items: list[int] | None = None) -> tuple[Steps, np.ndarray]:
    """Clips as they come; a pack is closed when the next doesn't fit."""
    packs: list[list[int]] = [[]]
    room = cap
    for item in range(len(clips.tokens)) if items is None else items:
        size = int(clips.tokens[item])
        if size > room:
            packs.append([])
            room = cap
        packs[-1].append(item)
        room -= size
    return _into_steps(packs), clips.tokens


def look_ahead(clips: Clips, cap: int) -> tuple[Steps, np.ndarray]:
    """The largest of the next 32 clips that fits goes into the pack."""
    packs: list[list[int]] = [[]]
    room, waiting, coming = cap, list[int](), iter(range(len(clips.tokens)))
    while True:
        waiting += list(islice(coming, 32 - len(waiting)))
        if not waiting:
            return _into_steps(packs), clips.tokens
        fitting = [item for item in waiting if clips.tokens[item] <= room]
        if not fitting:
            packs.append([])
            room = cap
            continue
        item = max(fitting, key=lambda i: clips.tokens[i])
        waiting.remove(item)
        packs[-1].append(item)
        room -= int(clips.tokens[item])


def sorted_clips(clips: Clips, cap: int) -> tuple[Steps, np.ndarray]:
    """Clips sorted by cost: slots of a step are alike, and steps are not."""
    return stream_order(clips, cap, np.argsort(-clips.cost, kind="stable").tolist())


def buckets(clips: Clips, cap: int) -> tuple[Steps, np.ndarray]:
    """As Open-Sora does it: clips are cut to a bucket's length, size and aspect; a rank takes as many of one bucket as
    the cap holds; batches in the order they fill, the last of each bucket dropped. Returns steps and tokens kept."""
    lengths, areas = np.array(LENGTHS), np.array([h * h * 16 // 9 for h in HEIGHTS])
    length = np.maximum(np.searchsorted(lengths, clips.frames, side="right") - 1, 0)
    area = np.searchsorted(areas, np.minimum(clips.height * clips.width, clips.max_pixels) * 1.001, side="right") - 1
    area = np.maximum(area, 0)
    aspect = np.abs(np.log((clips.width / clips.height)[:, None] / np.array(ASPECTS))).argmin(1)
    ratio = np.array(ASPECTS)[aspect]
    multiple = _GEOMETRY.multiple
    h = np.maximum(1, np.rint(np.sqrt(areas[area] / ratio) / multiple)).astype(np.int64)
    w = np.maximum(1, np.rint(np.sqrt(areas[area] * ratio) / multiple)).astype(np.int64)
    tokens = np.where(clips.frames >= LENGTHS[0], (1 + (lengths[length] - 1) // 4) * h * w, 0)  # too short: dropped
    filling: dict[tuple[int, int, int], list[int]] = {}
    batches = []
    for item in np.flatnonzero(tokens).tolist():
        batch = filling.setdefault((int(length[item]), int(area[item]), int(aspect[item])), [])
        batch.append(item)
        if len(batch) == max(1, cap // int(tokens[item])):
            batches.append(list(batch))
            batch.clear()
    return _into_steps(batches), tokens


def figures(clips: Clips, steps: Steps, cap: int, tokens: np.ndarray, most: int = 1) -> dict[str, float]:
    """Balance, departure and use of the budget; `tokens` are what a clip has after the policy cut it."""
    octave = np.frexp(clips.cost.astype(np.float64))[1]
    octave, kinds = octave - octave.min(), int(octave.max() - octave.min()) + 1
    mix = np.bincount(octave, clips.tokens, kinds) / clips.tokens.sum()
    loads = np.array([[cost_of(tokens[s[n]]).sum() / width for n, width in spans(s, most)] for s in steps])
    items = [np.concatenate([np.asarray(slot, dtype=np.int64) for slot in step]) for step in steps]
    shares = [np.bincount(octave[i], tokens[i], kinds) / tokens[i].sum() for i in items]
    departures = [np.abs(share - mix).sum() / 2 for share in shares]
    used = [tokens[i].sum() / (cap * SLOTS) for i in items]
    return {
        "balance": float((loads.mean(1) / loads.max(1)).mean()),
        "by_time": float(loads.mean(1).sum() / loads.max(1).sum()),
        "departure": float(np.mean(departures)),
        "farthest": float(np.max(departures)),
        "kept": float(tokens[np.concatenate(items)].sum() / clips.tokens.sum()),
        "used": float(np.mean(used)),
    }


POLICIES: dict[str, Callable[[Clips, int], tuple[Steps, np.ndarray]]] = {
    "**ours**": ours,
    f"**ours, `data.pack_slots={MOST}`**": shared,
    "packing, stream order": stream_order,
    "packing, look-ahead 32": look_ahead,
    "buckets, 6 lengths x 5 sizes x 5 aspects": buckets,
    "sorted clips": sorted_clips,
}


def main() -> None:
    """Simulate, pack, and write the table."""
    count = int(dict(a.split("=") for a in sys.argv[1:]).get("clips", 20_000))
    rows, spent = [], []
    for stage, max_pixels in STAGES.items():
        clips = simulate(count, max_pixels)
        longest = int(clips.tokens.max())
        for name, policy in POLICIES.items():
            cells = []
            for times in CAPS:
                cap, started = int(times * longest), time.process_time()
                steps, tokens = policy(clips, cap)
                spent += [(time.process_time() - started) / count * 1e6] if policy in (ours, shared) else []
                cells.append(figures(clips, steps, cap, tokens, MOST if policy is shared else 1))
            two = cells[CAPS.index(2.0)]
            curve = [f"{c['balance']:.1%}, {c['departure']:.2f} ({c['farthest']:.2f})" for c in cells]
            rows.append((stage, name, f"{two['kept']:.1%}", f"{two['used']:.1%}", f"{two['by_time']:.1%}", *curve))
    about = (
        f"{count:,} clips, simulated as the head of packing.py says; {SLOTS} slots; caps in multiples of the longest "
        "clip. Each cell: balance (mean over max FLOPs of the slots of a step, averaged over steps), then departure "
        "(total-variation distance of a step's token share by octave of clip cost from that of the whole mix: mean "
        "over steps, in brackets the farthest step). Kept: source tokens trained on, at 2x; streams lose their last, "
        "partial step, buckets what they cut off. Nothing is padded: clips of a bucket all have its size. A pack of "
        "several slots counts in each of them with its share of the FLOPs. Ours: "
        f"windows of {WINDOW:,} clips, fill {FILL}; {min(spent):.1f} to {max(spent):.1f} us of CPU per clip."
    )
    caps = [f"{c:g}x" for c in CAPS]
    header = ("stage", "policy", "kept", "budget used at 2x", "balance at 2x, weighted by time", *caps)
    write("Packing: balance of 64 slots, and departure from the mix", about, header, rows)


if __name__ == "__main__":
    main()
