"""Combinations of pretrained models with other settings that cannot work (`config/compatibility.py`)."""

from __future__ import annotations

from collections.abc import Iterator

from vlmvqa.config.compatibility import RunRequest
from vlmvqa.extras.pretrained.model import PretrainedSettings


def conflicts(r: RunRequest) -> Iterator[str]:
    """Yield an error message for each."""
    assert isinstance(r.model, PretrainedSettings)
    name = r.model.pretrained
    if r.questions_per_row not in (None, 1):
        yield (
            f"{name} answers one question per row, and data.questions_per_row={r.questions_per_row}; "
            "set data.questions_per_row=1"
        )
    if r.row_tokens is not None:
        yield f"data.row_tokens={r.row_tokens}: rows of {name} are not packed; set data.row_tokens=null"
    if r.cached:
        yield f"data.feature_cache: {name} trains with its own encoder; leave the cache out"
