"""Finds training clips that samples repeat, by perceptual hashes of frames compared at every shift in time.

A frame's hash has 64 bits: whether each low-frequency DCT coefficient is above the median. It is computed for the
picture without its borders and for its mirror image. The distance of two videos is the mean number of different bits
over the overlapping frames, at the best shift. Re-encoded, shifted, mirrored and letterboxed copies are found; copies
cropped by a tenth or more are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.table import Table
from scipy.fft import dctn

from sora_train.core.page import embedded, page
from sora_train.evaluation.pixels import luma

COPY = 8.0  # mean bits of 64 up to which a video counts as a copy; unrelated real clips had 17 and more
_RATE = 2.0  # hashes a second
_SIDE, _KEPT = 32, 8
_LEAST = 3  # frames that must overlap
_BORDER = 6.0  # of 255: rows and columns that vary less than this, in time and place, are borders

_TEMPLATE = """<p>{{ copies }} of {{ samples }} samples repeat a training clip (mean distance of hashes at most
{{ limit }} of 64 bits).</p><table><tr><th>distance</th><th>sample</th><th>nearest training clip</th>
<th>shift, s</th></tr>
{% for row in rows %}<tr><td>{{ "%.1f"|format(row.distance) }}</td><td>{{ row.sample }}<br>
{% if row.left %}<video controls loop muted playsinline src="{{ row.left }}"></video>{% endif %}</td>
<td>{{ row.clip }}<br>
{% if row.right %}<video controls loop muted playsinline src="{{ row.right }}"></video>{% endif %}</td>
<td>{{ "%.1f"|format(row.shift_s) }}</td></tr>{% endfor %}</table>"""


@dataclass(frozen=True)
class Match:
    """The training clip that is nearest to a sample."""

    sample: str
    clip: str
    distance: float
    shift_s: float
    mirrored: bool


def hashes(frames_THWC: np.ndarray, fps: float) -> np.ndarray:
    """Compute the hashes `(2, T', 64)`, bool, of frames taken at 2 a second: of the frames, and of their mirror images.

    For a video that would give fewer than four frames, more are taken, if necessary all.
    """
    step = max(1, round(fps / _RATE)) if fps else 1
    while step > 1 and len(frames_THWC) // step < _LEAST + 1:
        step -= 1
    grey_THW = luma(_inside(frames_THWC[::step]))
    return np.stack([np.array([_hash(frame) for frame in view]) for view in (grey_THW, grey_THW[:, :, ::-1])])


def _inside(frames_THWC: np.ndarray) -> np.ndarray:
    """The frames without flat borders."""
    grey_THW = luma(frames_THWC)
    busy = grey_THW.std(axis=(0, 2)) > _BORDER, grey_THW.std(axis=(0, 1)) > _BORDER
    spans = []
    for flags in busy:
        places = np.flatnonzero(flags)
        enough = len(places) and places[-1] - places[0] >= len(flags) // 2
        spans.append(slice(places[0], places[-1] + 1) if enough else slice(None))
    return frames_THWC[:, spans[0], spans[1]]


def _hash(grey_HW: np.ndarray) -> np.ndarray:
    small = Image.fromarray(grey_HW.astype(np.float32)).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    low = dctn(np.asarray(small, np.float64), norm="ortho")[:_KEPT, :_KEPT].ravel()
    return low > np.median(low[1:])


def distance(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, int, bool]:
    """Compute the least mean Hamming distance over all shifts and both views.

    Args:
        ours: Hashes of a sample, `(2, T, 64)`.
        theirs: Hashes of a training clip, `(2, T', 64)`.

    Returns:
        The distance in bits, the shift in hashes, and whether the mirrored sample is the nearer one.
    """
    best = (64.0, 0, False)
    other = theirs[0]
    for mirrored, view in enumerate(ours):
        least = min(_LEAST, len(view), len(other))
        for shift in range(least - len(view), len(other) - least + 1):
            a = view[max(0, -shift) : len(other) - shift]
            b = other[max(0, shift) : shift + len(view)]
            if len(a) >= max(1, least):
                bits = float((a != b).sum(1).mean())
                best = min(best, (bits, shift, bool(mirrored)))
    return best


def nearest_clips(samples: Mapping[str, np.ndarray], clips: Iterable[tuple[str, np.ndarray]]) -> list[Match]:
    """Find the nearest training clip of every sample; returns the matches, smallest distance first.

    Args:
        samples: Result of `hashes` by name of the sample.
        clips: Names of training clips with their results of `hashes`.
    """
    best = {name: Match(name, "", 64.0, 0.0, False) for name in samples}
    for clip, theirs in clips:
        for name, ours in samples.items():
            bits, shift, mirrored = distance(ours, theirs)
            if bits < best[name].distance:
                best[name] = Match(name, clip, bits, shift / _RATE, mirrored)
    return sorted(best.values(), key=lambda match: match.distance)


def matches_table(found: Iterable[Match], most: int = 20) -> Table:
    """Build a table of the first `most` matches."""
    out = Table(title=f"nearest training clips; at most {COPY:g} of 64 bits is a copy")
    for head in ("distance", "sample", "training clip", "shift, s", "mirrored"):
        out.add_column(head)
    for match in list(found)[:most]:
        cells = [match.sample, match.clip, f"{match.shift_s:.1f}", "yes" if match.mirrored else ""]
        out.add_row(f"{match.distance:.1f}", *cells)
    return out


def matches_page(found: list[Match], samples: Mapping[str, Path], clips: Mapping[str, Path], most: int = 20) -> str:
    """Render the first `most` matches as an HTML page with video players.

    Args:
        found: Matches, smallest distance first.
        samples: Paths of the samples by name.
        clips: Paths of the training clips by name.
        most: Number of matches on the page.
    """
    rows = [
        {
            "distance": m.distance, "sample": m.sample, "clip": m.clip, "shift_s": m.shift_s,
            "left": embedded(samples[m.sample]) if m.sample in samples else "",
            "right": embedded(clips[m.clip]) if m.clip in clips else "",
        }
        for m in found[:most]
    ]  # fmt: skip
    copies = sum(match.distance <= COPY for match in found)
    return page(
        "Nearest training clips",
        _TEMPLATE,
        {"rows": rows, "copies": copies, "samples": len(found), "limit": f"{COPY:g}"},
    )
