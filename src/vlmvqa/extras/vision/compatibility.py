"""Settings that cannot be combined with tiles or letterboxing: further rules for `config/compatibility.py`."""

from __future__ import annotations

from vlmvqa.config.compatibility import Conflicts, RunRequest
from vlmvqa.extras.vision.tiles import tile_settings
from vlmvqa.models.vlm import ModelSettings
from vlmvqa.sequence.rows import SHAREABLE


def conflicts(r: RunRequest) -> Conflicts:
    """Return each condition under which a run with these images cannot train, and its error message."""
    pattern = r.model.attention_pattern if isinstance(r.model, ModelSettings) else None
    by_tile = r.tiles is not None and tile_settings(r.tiles).tile_attention == "tile"
    return [
        (
            r.cached,
            "data.feature_cache holds images of one input without padding; leave data.tiles and data.resize=letterbox "
            "out, or data.feature_cache",
        ),
        (
            by_tile and pattern is not None and pattern not in SHAREABLE,
            f"model.attention_pattern={pattern} makes images and question one block, so tiles cannot be blocks; leave "
            "data.tiles.tile_attention out",
        ),
        (
            r.resize == "letterbox" and r.trainer.get("activation_checkpointing") and r.trained_vision != "none",
            "data.resize=letterbox: timm recomputes no activations where patches are masked; set "
            "trainer.activation_checkpointing=false or data.resize=squash",
        ),
    ]
