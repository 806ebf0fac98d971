"""Bars with an estimate for what takes long: on a terminal only, and of the first rank's work only.

In a log file a bar would be thousands of lines of itself, so there it is silent; what a training says at its logging
steps stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from vlmvqa import ranks


def bar(
    items: Iterable[Any] | None = None,
    *,
    doing: str,
    unit: str,
    total: int | None = None,
    shown: bool = True,
    **more: Any,
) -> tqdm[Any]:
    """tqdm's bar, over `items` or to be updated; gone when it is done.

    Args:
        doing: what takes the time ("packing val").
        unit: what is counted.
        shown: False: the caller wants none.
        more: tqdm's own arguments.
    """
    hidden = None if shown and ranks.is_first() else True  # None: where stderr is no terminal
    return tqdm(items, desc=doing, unit=f" {unit}", total=total, disable=hidden, **{"leave": False, **more})


@contextmanager
def loading_bar() -> Iterator[None]:
    """Show our bar in place of transformers' "Loading weights", and only if loading takes more than a second."""
    from transformers.utils.logging import set_tqdm_hook

    def ours(_: Any, given: tuple[Any, ...], __: dict[str, Any]) -> tqdm[Any]:
        return bar(*given, doing="loading weights", unit="tensors", delay=1.0)

    before = set_tqdm_hook(ours)
    try:
        yield
    finally:
        set_tqdm_hook(before)
