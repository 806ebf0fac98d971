"""Which documents share a row, and in which order the rows come.

A document is an image with its questions. Documents are dealt out longest first, each to the row that is shortest so
far, over as few rows as hold them within a budget of tokens (Graham 1969, "longest processing time first"). All rows of
a run are then nearly equally long, so a batch is hardly padded, and each mixes long documents with short ones.

To which row the i-th longest document goes depends on the lengths alone: every epoch has the same number of rows. Which
of the equally long documents it is, and the order of the rows, is drawn anew each epoch from the seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapreplace

import numpy as np
from numpy.typing import NDArray

PRECISION = 0.005  # of the number of rows: half a percent more than the fewest that were found to do


@dataclass(frozen=True)
class Plan:
    """The rows of an epoch: row r holds documents `order[starts[r] : starts[r + 1]]`."""

    order: NDArray[np.int64]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> list[int]:
        found: list[int] = self.order[self.starts[row] : self.starts[row + 1]].tolist()
        return found


class Packing:
    """The rows of every epoch.

    Args:
        lengths: tokens of each document, none above the budget.
        budget: tokens a row, at most; None: a row for each document.
        seed: with the epoch, all that the order is drawn from.
        repeats: how often an epoch has each document (None: once). Of a fraction, as many as it comes to: 0.5 is half
            of the documents of every length, other ones in each epoch; 1.5 is all of them, and half of them again.
    """

    def __init__(
        self, lengths: Sequence[int], budget: int | None, seed: int, repeats: Sequence[float] | None = None
    ) -> None:
        self.lengths, self.seed = np.asarray(lengths, dtype=np.int64), seed
        self._copies = _Copies(self.lengths, repeats)
        descending = self._copies.lengths.tolist()
        if budget is None:
            self._row = np.arange(len(descending))
        else:
            if descending and descending[0] > budget:
                raise ValueError(f"a document of {descending[0]} tokens does not fit a row of {budget}")
            self._row = _fewest_rows(descending, budget)

    def __len__(self) -> int:
        """Rows an epoch."""
        return int(self._row.max(initial=-1)) + 1

    def plan(self, epoch: int) -> Plan:
        drawn = np.random.default_rng([self.seed, epoch])
        documents = self._copies.draw(drawn)
        row = drawn.permutation(len(self))[self._row]
        starts = np.concatenate([[0], np.bincount(row, minlength=len(self)).cumsum()])
        return Plan(documents[np.argsort(row, kind="stable")], starts)


class _Copies:
    """The documents of an epoch, the longest first: always so many of each length, drawn from all that are as long.

    Attributes:
        lengths: tokens of an epoch's documents, in descending order.
    """

    def __init__(self, lengths: NDArray[np.int64], repeats: Sequence[float] | None) -> None:
        times = np.ones(len(lengths)) if repeats is None else np.asarray(repeats, dtype=np.float64)
        copies = np.ceil(times).astype(np.int64)
        self._document = np.repeat(np.arange(len(lengths)), copies)
        # The number of each copy of a document: whole copies come before the one that only some are given.
        self._copy = np.arange(len(self._document)) - np.repeat(np.cumsum(copies) - copies, copies)
        # Documents of one length, that are given as often, make a group; groups stand in the order of their lengths.
        kinds, group = np.unique(np.stack([-lengths, times], axis=1), axis=0, return_inverse=True)
        self._group = group.reshape(-1)[self._document]
        due = np.bincount(group.reshape(-1), minlength=len(kinds)) * kinds[:, 1] if len(lengths) else np.zeros(0)
        taken = np.zeros(len(kinds), dtype=np.int64)
        for often in np.unique(times):  # what a group's rounding leaves is the next one's
            same = kinds[:, 1] == often
            taken[same] = np.diff(np.floor(np.cumsum(due[same]) + 0.5 + 1e-9), prepend=0)
        candidates = np.bincount(self._group, minlength=len(kinds))
        place = np.arange(len(self._document)) - np.repeat(np.cumsum(candidates) - candidates, candidates)
        self._taken = place < np.repeat(taken, candidates)
        self.lengths = np.repeat(-kinds[:, 0].astype(np.int64), taken)

    def draw(self, drawn: np.random.Generator) -> NDArray[np.int64]:
        """An epoch's documents, in the order of `lengths`."""
        shuffled = drawn.permutation(len(self._document))
        ordered = shuffled[np.lexsort((self._copy[shuffled], self._group[shuffled]))]
        return self._document[ordered][self._taken]


def split(lengths: Sequence[int], room: int | None, most: int | None) -> Iterator[tuple[int, int]]:
    """Cut the questions of an image into runs of at most `most` questions and `room` tokens: (first, end) of each.

    A question longer than the room is a run of its own.
    """
    first = taken = 0
    for end, length in enumerate(lengths):
        full = (room is not None and taken + length > room) or (most is not None and end - first >= most)
        if full and end > first:
            yield first, end
            first, taken = end, 0
        taken += length
    if len(lengths) > first:
        yield first, len(lengths)


def _fewest_rows(descending: list[int], budget: int) -> NDArray[np.int64]:
    """The row of each length, for about the fewest rows within the budget."""
    if not descending:
        return np.zeros(0, dtype=np.int64)
    least = -(-sum(descending) // budget)
    low, high = least - 1, 2 * least  # so many always do: none is then more than half full when a short one comes
    best = _deal(descending, high, budget)
    assert best is not None
    while high - low > max(1, PRECISION * high):
        middle = (low + high) // 2
        dealt = _deal(descending, middle, budget)
        if dealt is None:
            low = middle
        else:
            high, best = middle, dealt
    return np.asarray(best, dtype=np.int64)


def _deal(descending: list[int], rows: int, budget: int) -> list[int] | None:
    """The row of each length, when each goes to the shortest row so far; None: one grew beyond the budget."""
    shortest = [(0, row) for row in range(min(rows, len(descending)))]
    dealt = []
    for length in descending:
        tokens, row = shortest[0]
        if tokens + length > budget:
            return None
        heapreplace(shortest, (tokens + length, row))
        dealt.append(row)
    return dealt
