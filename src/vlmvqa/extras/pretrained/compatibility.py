"""Settings that cannot be combined with a pretrained model: further rules for `config/compatibility.py`."""

from __future__ import annotations

from vlmvqa.config.compatibility import Conflicts, RunRequest
from vlmvqa.extras.pretrained.model import PretrainedSettings


def conflicts(r: RunRequest) -> Conflicts:
    """Return each condition under which a pretrained model cannot train, and its error message."""
    assert isinstance(r.model, PretrainedSettings)
    name = r.model.pretrained
    return [
        (
            r.questions_per_row not in (None, 1),
            f"{name} takes one question per row, and data.questions_per_row={r.questions_per_row}; "
            "set data.questions_per_row=1",
        ),
        (
            r.row_tokens is not None,
            f"data.row_tokens={r.row_tokens}: rows of {name} are not packed; set data.row_tokens=null",
        ),
        (r.copy_images, f"copy_images=true: rows of {name} already hold one question each; leave it out"),
        (r.static_cache, f"decoding.static_cache=true is not supported for {name}; set it to false"),
        (r.cached, f"data.feature_cache: cached features are not supported for {name}; leave data.feature_cache out"),
    ]
