"""Pack documents into rows, and order the rows of each epoch.

A document is an image with its questions. Documents are assigned longest first, each to the row with the fewest tokens
so far, over as few rows as hold them within a token budget (Graham 1969, "longest processing time first"). All rows
then have nearly the same length, so batches need little padding, and each row mixes long and short documents.

Which row the i-th longest document is assigned to depends on the lengths alone, so every epoch has the same number of
rows. Documents of equal length, and the rows, are shuffled each epoch with the seed. Within a window of steps, rows are
then ordered by length, so that those of a micro-batch are about equally long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from typing import Any

import numpy as np
from numpy.typing import NDArray

PRECISION = 0.005  # the search for the fewest rows stops within half a percent of the smallest feasible number


@dataclass(frozen=True)
class Plan:
    """The rows of an epoch: row r holds documents `order[starts[r] : starts[r + 1]]`."""

    order: NDArray[np.int64]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> list[int]:
        documents: list[int] = self.order[self.starts[row] : self.starts[row + 1]].tolist()
        return documents


class Packing:
    """The assignment of documents to rows, the same in every epoch.

    Args:
        lengths: tokens of each document, none above the budget.
        budget: limit on the tokens of a row; None: one row per document.
        seed: seed of the shuffles, with the epoch.
        repeats: how often an epoch contains each document (None: once). Fractions are rounded over all documents of a
            length: 0.5 is half of them, different ones each epoch; 1.5 is all of them, and half of them again.
    """

    def __init__(
        self, lengths: Sequence[int], budget: int | None, seed: int, repeats: Sequence[float] | None = None
    ) -> None:
        self.lengths, self.seed = np.asarray(lengths, dtype=np.int64), seed
        self._sampler = _DocumentSampler(self.lengths, repeats)
        descending = self._sampler.lengths.tolist()
        if budget is None:
            self._row = np.arange(len(descending))
        else:
            if descending and descending[0] > budget:
                raise ValueError(f"a document of {descending[0]} tokens does not fit a row of {budget}")
            self._row = _fewest_rows(descending, budget)

    def __len__(self) -> int:
        """Return the number of rows of an epoch."""
        return int(self._row.max(initial=-1)) + 1

    def plan(self, epoch: int, step_rows: int = 1, window: int = 1) -> Plan:
        """Return the rows of an epoch.

        Args:
            step_rows: rows of an optimizer step, over all ranks.
            window: number of steps among which rows of similar length are exchanged, in shuffled order; 1: each step
                has the rows that it would have without grouping, sorted by length; 0: no grouping.
        """
        generator = np.random.default_rng([self.seed, epoch])
        documents = self._sampler.sample(generator)
        row = generator.permutation(len(self))[self._row]
        if step_rows * window > 1:
            tokens = np.bincount(row, weights=self._sampler.lengths, minlength=len(self))
            row = np.argsort(_group_by_length(tokens, step_rows, window, generator))[row]
        starts = np.concatenate([[0], np.bincount(row, minlength=len(self)).cumsum()])
        return Plan(documents[np.argsort(row, kind="stable")], starts)


def _group_by_length(
    tokens: NDArray[Any], step_rows: int, window: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Return the rows of an epoch in the order in which they are trained on.

    Args:
        tokens: tokens of each row, in shuffled order.
    """
    ordered = []
    for start in range(0, len(tokens), step_rows * window):
        rows = start + np.argsort(-tokens[start : start + step_rows * window], kind="stable")
        steps = [rows[first : first + step_rows] for first in range(0, len(rows), step_rows)]
        last = [steps.pop()] if len(steps[-1]) < step_rows else []  # the epoch's last step, which may be incomplete
        ordered += [steps[number] for number in generator.permutation(len(steps))] + last
    return np.concatenate([np.zeros(0, dtype=np.int64), *ordered])


class _DocumentSampler:
    """Sample the documents of an epoch, longest first: a fixed number of each length, from all of that length.

    Attributes:
        lengths: tokens of an epoch's documents, in descending order.
    """

    def __init__(self, lengths: NDArray[np.int64], repeats: Sequence[float] | None) -> None:
        times = np.ones(len(lengths)) if repeats is None else np.asarray(repeats, dtype=np.float64)
        copies = np.ceil(times).astype(np.int64)
        self._document = np.repeat(np.arange(len(lengths)), copies)
        # Number of each copy of a document: full copies come before the one that only some documents get.
        self._copy = np.arange(len(self._document)) - np.repeat(np.cumsum(copies) - copies, copies)
        # Documents with the same length and repeats form a group; groups are sorted by length, longest first.
        kinds, group = np.unique(np.stack([-lengths, times], axis=1), axis=0, return_inverse=True)
        self._group = group.reshape(-1)[self._document]
        due = np.bincount(group.reshape(-1), minlength=len(kinds)) * kinds[:, 1] if len(lengths) else np.zeros(0)
        taken = np.zeros(len(kinds), dtype=np.int64)
        for repeat in np.unique(times):  # a group's rounding error carries over to the next one
            same = kinds[:, 1] == repeat
            taken[same] = np.diff(np.floor(np.cumsum(due[same]) + 0.5 + 1e-9), prepend=0)
        candidates = np.bincount(self._group, minlength=len(kinds))
        rank = np.arange(len(self._document)) - np.repeat(np.cumsum(candidates) - candidates, candidates)
        self._taken = rank < np.repeat(taken, candidates)
        self.lengths = np.repeat(-kinds[:, 0].astype(np.int64), taken)

    def sample(self, generator: np.random.Generator) -> NDArray[np.int64]:
        """Return an epoch's documents, in the order of `lengths`."""
        shuffled = generator.permutation(len(self._document))
        ordered = shuffled[np.lexsort((self._copy[shuffled], self._group[shuffled]))]
        return self._document[ordered][self._taken]


def split_questions(lengths: Sequence[int], room: int | None, most: int | None) -> Iterator[tuple[int, int]]:
    """Split the questions of an image into runs, one per document: yield (first, end) of each.

    Args:
        lengths: tokens of each question.
        room: limit on the tokens of a run (a longer question is a run alone); None: no limit.
        most: limit on the questions of a run; None: no limit.
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
    """Return the row of each document, for nearly the fewest rows within the budget (binary search)."""
    if not descending:
        return np.zeros(0, dtype=np.int64)
    least = -(-sum(descending) // budget)
    # Twice the least always suffices: the shortest row is then at most half full whenever a short document comes.
    low, high = least - 1, 2 * least
    best = _assign(descending, high, budget)
    assert best is not None
    while high - low > max(1, PRECISION * high):
        middle = (low + high) // 2
        rows = _assign(descending, middle, budget)
        if rows is None:
            low = middle
        else:
            high, best = middle, rows
    return np.asarray(best, dtype=np.int64)


def _assign(descending: list[int], rows: int, budget: int) -> list[int] | None:
    """Assign each document to the shortest of `rows` rows; return its row, or None if one exceeds the budget."""
    heap = [(0, row) for row in range(min(rows, len(descending)))]
    assigned = []
    for length in descending:
        tokens, row = heap[0]
        if tokens + length > budget:
            return None
        heapreplace(heap, (tokens + length, row))
        assigned.append(row)
    return assigned
