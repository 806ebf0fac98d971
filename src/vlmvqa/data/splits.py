"""`train[:10%]`: the name of a split and a part of it, the same way for every source.

val[:10%], val[100:200], val[-500:]    a slice, in file order
val[random:1000]                       so many drawn by chance, always the same ones: those that HELM draws
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlmvqa.errors import InputError, suggest

BOUND = r"-?\d+(?:_\d+)*|-?\d+(?:\.\d+)?%"
PART = rf"random:(?P<drawn>\d+)|(?P<start>{BOUND})?:(?P<stop>{BOUND})?"
SPLIT = re.compile(rf"(?P<name>[^\[\]]*)(?:\[(?:{PART})\])?")


@dataclass(frozen=True)
class Slice:
    """Some of a split.

    Attributes:
        text: as it was given, for errors.
        name: the split's.
        start, stop: the bounds as they were given, "10%" or "100"; None where the slice is open.
        max_samples: at most so many of the slice, the first.
        drawn: how many are drawn by chance; None where none are.
    """

    text: str
    name: str
    start: str | None = None
    stop: str | None = None
    max_samples: int | None = None
    drawn: int | None = None

    def chosen(self, total: int, where: Path | str, unit: str = "questions") -> range | list[int]:
        """The numbers, from 0 and ascending, of what is selected.

        Percentages are rounded to the nearest, as `datasets` does. Of a draw, fewer are some of the same: HELM's own
        (`downsample_eval_instances` of crfm-helm 0.5.16) for as many instances.

        Args:
            total: what there is to select from, in file order.
            where: how an error names the file.
            unit: what is counted.

        Raises:
            InputError: the slice selects nothing, or reaches beyond the total.
        """
        if self.drawn is not None:
            if not 0 < self.drawn <= total:
                raise InputError(
                    f"{where}: '{self.text}' cannot be drawn from its {total} {unit}; choose another number."
                )
            some = min(self.drawn, self.max_samples or self.drawn)
            return sorted(np.random.RandomState(0).permutation(total)[:some].tolist())
        numbers: list[int | None] = []
        for bound in (self.start, self.stop):
            if bound is None:
                numbers.append(None)
                continue
            number = float(bound[:-1]) * total / 100 if bound.endswith("%") else int(bound)
            if abs(number) > total:
                raise InputError(f"{where}: '{self.text}' reaches beyond its {total} {unit}; choose a smaller slice.")
            numbers.append(round(number))
        found = range(total)[slice(*numbers)]
        if not found:
            raise InputError(f"{where}: '{self.text}' selects none of its {total} {unit}; choose a larger slice.")
        return found[: self.max_samples]


def parse_split(split: str, known: Iterable[str], benchmark: str, max_samples: int | None = None) -> Slice:
    """A split as it is written in a config: `train`, `val[:10%]`, `val[100:200]`, `val[random:1000]`.

    Args:
        known: the names that there are.
        benchmark: how an error names the data set.

    Raises:
        InputError: there is no such split, its slice is malformed, or `max_samples` selects nothing.
    """
    known = list(known)
    match = SPLIT.fullmatch(split)
    name = split.partition("[")[0]
    if name not in known:
        remedy = suggest(name, known) or _parts_of(known)
        raise InputError(f"{benchmark} has no split '{name}', only {', '.join(known)}{remedy or '.'}")
    if match is None:
        like = f"{name}[:10%], {name}[100:200] or {name}[random:1000]"
        raise InputError(f"the slice in '{split}' is malformed; write it like {like}.")
    if max_samples is not None and max_samples < 1:
        raise InputError(f"max_samples={max_samples} selects nothing; use 1 or more, or null for all questions.")
    drawn = match["drawn"]
    return Slice(split, name, match["start"], match["stop"], max_samples, None if drawn is None else int(drawn))


def _parts_of(known: list[str]) -> str:
    """The advice to evaluate on a part of the training split, if there is no split to evaluate on."""
    if len(known) > 1 and ("train" not in known or "val" in known):
        return ""
    split = known[0] if len(known) == 1 else "train"
    return f"; train and evaluate on parts of {split}: data.train_split={split}[:90%] data.eval_split={split}[90%:]"
