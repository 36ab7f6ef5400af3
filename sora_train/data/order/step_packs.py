"""Assignment of a step's items to packs, so that all slots have the same load.

In the order of falling cost, each item is assigned to the pack with the smallest load that has enough free tokens
(Graham 1969, longest processing time first); then swaps between packs of large and small load reduce the rest. Items
that exceed a slot first get packs of 2, 4, ... slots, the fewest for which their load per slot is small enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace

_NEIGHBOURS = 4  # cheap packs that a dear pack tries to swap with
_ROUNDS = 6
_CLOSE = 1004  # thousandths of the mean load: packs up to here are left alone


@dataclass(frozen=True)
class Items:
    """Tokens of all items, and the load of each in a pack of 1, 2, 4, ... slots, all loads in one unit."""

    tokens: list[int]
    loads: dict[int, list[int]]  # by number of slots
    max_tokens: int  # of a slot


class Packs:
    """The packs of a step, by number: the slots that each takes, its items, its free tokens and its load so far."""

    def __init__(self, max_tokens: int, widths: list[int]) -> None:
        self.widths, self.items = widths, [list[int]() for _ in widths]
        self.room, self.load = [width * max_tokens for width in widths], [0] * len(widths)


def _widths(dealt: list[int], items: Items, slots: int) -> list[int]:
    """The slots of each pack of a step: every item that outweighs a slot gets the fewest that make it light enough, in
    a pack beside others where there is room."""
    whole, widths = items.loads[1], list(items.loads)
    fair = sum(whole[item] for item in dealt) * _CLOSE // (1000 * slots)
    shared: list[tuple[int, int, int]] = []  # slots, room and load of each pack
    free = slots
    for item in dealt if len(widths) > 1 else ():
        size = items.tokens[item]
        light = (w for w in widths if items.loads[w][item] <= fair and w * items.max_tokens >= size)
        width = next(light, widths[-1])
        if width == 1:
            continue
        for n, (wide, room, load) in enumerate(shared):
            with_it = load + items.loads[wide][item]
            if wide >= width and room >= size and with_it <= fair:
                shared[n] = wide, room - size, with_it
                break
        else:
            while width > free:
                width //= 2
            if width > 1:
                shared.append((width, width * items.max_tokens - size, items.loads[width][item]))
                free -= width
    return [width for width, *_ in shared] + [1] * free


def deal(dealt: list[int], items: Items, slots: int) -> tuple[Packs, list[int]]:
    """Each item (dearest first) to the pack with room that has the least load with it; returns the packs, and the items
    that found none."""
    packs = Packs(items.max_tokens, _widths(dealt, items, slots))
    numbers = {width: [n for n, w in enumerate(packs.widths) if w == width] for width in items.loads}
    open_packs = [_Open(packs, items.loads[width], found) for width, found in numbers.items() if found]
    left = []
    for item in dealt:
        size = items.tokens[item]
        found = [(one.least + one.loads[item], place) for place, one in enumerate(open_packs) if one.fits(size)]
        if found:
            open_packs[min(found)[1]].put(item, size)
        else:
            left.append(item)
    _even_out(packs, items)
    return packs, left


class _Open:
    """Packs of one width, ordered by load: an item goes to the first of them that has enough free tokens.

    Items arrive in the order of falling cost, so a pack that is too full for one item may still fit a later one.
    """

    def __init__(self, packs: Packs, loads: list[int], numbers: list[int]) -> None:
        self.packs, self.loads = packs, loads
        self._lightest = [(0, n) for n in numbers]
        self._parked: list[tuple[int, int]] = []  # packs that had no room for an earlier, larger item: (-room, pack)

    def fits(self, size: int) -> bool:
        """Tell whether a pack has enough free tokens; the one with the smallest load is moved to the front."""
        packs = self.packs
        while self._parked and -self._parked[0][0] >= size:
            number = heappop(self._parked)[1]
            heappush(self._lightest, (packs.load[number], number))
        while self._lightest and packs.room[self._lightest[0][1]] < size:
            number = heappop(self._lightest)[1]
            heappush(self._parked, (-packs.room[number], number))
        return bool(self._lightest)

    @property
    def least(self) -> int:
        """Load of the pack at the front."""
        return self._lightest[0][0]

    def put(self, item: int, size: int) -> None:
        """Add an item to the pack at the front."""
        packs, number = self.packs, self._lightest[0][1]
        packs.items[number].append(item)
        packs.room[number] -= size
        packs.load[number] += self.loads[item]
        heapreplace(self._lightest, (packs.load[number], number))


def _even_out(packs: Packs, items: Items) -> None:
    """Move or swap items between the packs of largest and smallest load while that lowers the larger load."""
    load, room, width = packs.load, packs.room, packs.widths
    close = sum(a * w for a, w in zip(load, width, strict=True)) * _CLOSE // (1000 * sum(width))
    for _ in range(_ROUNDS):
        ranked = sorted(range(len(width)), key=lambda n: (-load[n], n))
        if load[ranked[0]] <= close:
            return
        changed = False
        for dear in ranked:
            if load[dear] <= close:
                break
            best = min((_best_swap(dear, cheap, packs, items)
                        for cheap in ranked[-_NEIGHBOURS:] if load[cheap] < load[dear]), default=None)  # fmt: skip
            if best is None or best[0] >= load[dear]:
                continue
            _, cheap, give, take = best
            for number, comes, goes in ((dear, take, give), (cheap, give, take)):
                of = items.loads[width[number]]
                for item, sign in ((goes, -1), (comes, 1)):
                    if item >= 0:
                        load[number] += sign * of[item]
                        room[number] -= sign * items.tokens[item]
            packs.items[dear].remove(give)
            packs.items[cheap].append(give)
            if take >= 0:
                packs.items[cheap].remove(take)
                packs.items[dear].append(take)
            changed = True
        if not changed:
            return


def _best_swap(dear: int, cheap: int, packs: Packs, items: Items) -> tuple[int, int, int, int]:
    """The larger load after the best swap, the other pack, the item to give, and the item to take for it (-1: none)."""
    load, tokens = packs.load, items.tokens
    best = (load[dear], cheap, -1, -1)
    high, low, free, back = load[dear], load[cheap], packs.room[cheap], packs.room[dear]
    here, there = items.loads[packs.widths[dear]], items.loads[packs.widths[cheap]]
    for give in packs.items[dear]:
        less, more, size = here[give], there[give], tokens[give]
        for take in (-1, *packs.items[cheap]):
            falls, rises, grown = less, more, size
            if take >= 0:
                falls, rises, grown = less - here[take], more - there[take], size - tokens[take]
            if falls > 0 and low + rises < high and -back <= grown <= free:
                worse = max(high - falls, low + rises)
                if worse < best[0]:
                    best = (worse, cheap, give, take)
    return best
