"""Weights & Biases, for `logger=wandb`: a run there that has this run's name, folder and configuration.

transformers' callback writes what the Trainer logs into the run that is open; here it is opened, gone on with after a
resume, and closed with the final scores.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmvqa.errors import InputError

RUN_ID = ".wandb_run"  # in a run's folder: what it is called there
PROJECT = "vlmvqa"  # where WANDB_PROJECT names no other


def start(folder: Path, name: str, config: Mapping[str, Any]) -> None:
    """Open the run, or go on with the one that the folder names; its own files go to `folder/wandb`. For rank 0 alone.

    Args:
        config: the run's, resolved.

    Raises:
        InputError: nobody is logged in, or the server cannot be reached.
    """
    import wandb

    known = folder / RUN_ID
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=name,
            dir=folder,
            config=dict(config),
            id=known.read_text() if known.exists() else None,
            resume="allow" if known.exists() else None,
        )
    except wandb.Error as error:
        raise InputError(
            f"logger=wandb: Weights & Biases opens no run ({' '.join(str(error).split())}); run `wandb login`, set "
            "WANDB_MODE=offline to keep it on disk, or choose logger=tensorboard"
        ) from error
    known.write_text(run.id)


def finish(scores: Mapping[str, float | None] | None = None) -> None:
    """Close the run, if there is one.

    Args:
        scores: for its summary.
    """
    wandb: Any = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.run.summary.update(dict(scores or {}))
        wandb.finish()
