"""Split names with an optional part, such as `train[:10%]`; the syntax is the same for every dataset.

val[:10%], val[100:200], val[-500:]    a slice, in file order
val[random:1000]                       a fixed random sample: the one that HELM selects
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlmvqa.errors import InputError, suggest

BOUND = r"-?\d+(?:_\d+)*|-?\d+(?:\.\d+)?%"
PART = rf"random:(?P<random>\d+)|(?P<start>{BOUND})?:(?P<stop>{BOUND})?"
SPLIT = re.compile(rf"(?P<name>[^\[\]]*)(?:\[(?:{PART})\])?")


@dataclass(frozen=True)
class Slice:
    """A split, or a part of one.

    Attributes:
        text: the split as written in the config, for errors.
        start, stop: the bounds as written, "10%" or "100"; None where the slice is open.
        max_samples: limit on the number of selected records, from the start of the slice.
        random_count: size of a random sample; None: no sampling.
    """

    text: str
    name: str
    start: str | None = None
    stop: str | None = None
    max_samples: int | None = None
    random_count: int | None = None

    def indices(self, total: int, where: Path | str, unit: str = "questions") -> range | list[int]:
        """Return the selected indices, ascending.

        Percentages are rounded to the nearest index, as in `datasets`. A random sample equals HELM's for that number
        of instances (`downsample_eval_instances` of crfm-helm 0.5.16); a smaller sample is a subset of a larger one.

        Args:
            total: the number of records to select from, in file order.
            where, unit: the file and what is counted, for errors.

        Raises:
            InputError: the slice is empty, or extends beyond the total.
        """
        if self.random_count is not None:
            if not 0 < self.random_count <= total:
                raise InputError(
                    f"{where}: '{self.text}' cannot be sampled from its {total} {unit}; choose another number."
                )
            count = min(self.random_count, self.max_samples or self.random_count)
            return sorted(np.random.RandomState(0).permutation(total)[:count].tolist())

        def index(bound: str) -> int:
            number = float(bound[:-1]) * total / 100 if bound.endswith("%") else int(bound)
            if abs(number) > total:
                raise InputError(f"{where}: '{self.text}' reaches beyond its {total} {unit}; choose a smaller slice.")
            return round(number)

        selected = range(total)[index(self.start or "0") : index(self.stop) if self.stop else None]
        if not selected:
            raise InputError(f"{where}: '{self.text}' selects none of its {total} {unit}; choose a larger slice.")
        return selected[: self.max_samples]


def parse_split(split: str, known: Iterable[str], benchmark: str, max_samples: int | None = None) -> Slice:
    """Parse a split as written in a config.

    Raises:
        InputError: the split is not `known`, its slice is malformed, or `max_samples` is below 1.
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
    count = match["random"]
    return Slice(split, name, match["start"], match["stop"], max_samples, None if count is None else int(count))


def _parts_of(known: list[str]) -> str:
    """Return the advice to evaluate on a part of the training split if there is no evaluation split."""
    if len(known) > 1 and ("train" not in known or "val" in known):
        return ""
    split = known[0] if len(known) == 1 else "train"
    return f"; train and evaluate on parts of {split}: data.train_split={split}[:90%] data.eval_split={split}[90%:]"
