"""Settings that cannot be combined with a pretrained model: further rules for `config/compatibility.py`."""

from __future__ import annotations

from collections.abc import Sequence

from vlmvqa.config.compatibility import Rule, RunRequest
from vlmvqa.extras.pretrained.model import PretrainedSettings


def _name(request: RunRequest) -> str:
    assert isinstance(request.model, PretrainedSettings)
    return request.model.pretrained


RULES: Sequence[Rule] = (
    Rule(
        lambda r: r.questions_per_row not in (None, 1),
        lambda r: (
            f"{_name(r)} takes one question per row, and data.questions_per_row="
            f"{r.questions_per_row}; set data.questions_per_row=1"
        ),
    ),
    Rule(
        lambda r: r.row_tokens is not None,
        lambda r: f"data.row_tokens={r.row_tokens}: rows of {_name(r)} are not packed; set data.row_tokens=null",
    ),
    Rule(
        lambda r: r.cached,
        lambda r: f"data.feature_cache: cached features are not supported for {_name(r)}; leave data.feature_cache out",
    ),
)
