"""Progress bars, shown only on a terminal and only by rank 0.

In a log file, a bar would be thousands of lines; training prints its logging steps there.
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
    """Return a tqdm bar over `items`, or one to update by hand; it disappears when it is finished.

    Args:
        items: the items to iterate over.
        doing: the bar's label ("packing val").
        unit: the name of the counted items.
        total: the number of items, if `items` has no length.
        shown: False disables the bar.
        more: further arguments of tqdm.
    """
    hidden = None if shown and ranks.is_first() else True  # None: hide it if stderr is not a terminal
    return tqdm(items, desc=doing, unit=f" {unit}", total=total, disable=hidden, **{"leave": False, **more})


@contextmanager
def loading_bar() -> Iterator[None]:
    """Replace transformers' "Loading weights" bar in the block by ours, shown if loading takes over a second."""
    from transformers.utils.logging import set_tqdm_hook

    def replacement(_: Any, arguments: tuple[Any, ...], __: dict[str, Any]) -> tqdm[Any]:
        return bar(*arguments, doing="loading weights", unit="tensors", delay=1.0)

    before = set_tqdm_hook(replacement)
    try:
        yield
    finally:
        set_tqdm_hook(before)
