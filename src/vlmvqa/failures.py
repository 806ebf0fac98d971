"""The end of a script that fails: one sentence for errors that a user can correct, printed by one rank."""

from __future__ import annotations

import contextlib
import sys
import time
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from tqdm import tqdm

from vlmvqa import ranks
from vlmvqa.errors import InputError

# The first rank to fail stores its error here, so that the other ranks don't report the errors that follow from it.
FAILURE = "vlmvqa/failure"
# PyTorch's messages on a rank whose peers have ended.
PEER_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "ncclRemoteError",
    "NCCL communicator was aborted",
)
PATIENCE = 60.0  # seconds that the other ranks of a machine wait for the first one's error message


def end(error: BaseException) -> None:
    """End the process with a sentence; return if the error is not one that a user can correct."""
    if isinstance(error, InputError):
        # From a DataLoader's worker the message is a traceback that ends with "...InputError: sentence".
        stop("error: " + str(error).strip().splitlines()[-1].rpartition("InputError: ")[2])
    if isinstance(error, KeyboardInterrupt):
        stop("stopped by Ctrl-C")
    sentence = _known(error)
    if sentence is not None or claim_failure(type(error).__name__) is not None:
        stop(f"error: {sentence}")


def stop(sentence: str) -> NoReturn:
    """End with a sentence on a line of its own; open progress bars are closed before it.

    Of several ranks the first to fail prints it. Before they have met, all ranks of a machine fail alike, and the first
    prints it.
    """
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    if ranks.local_rank() > 0 and not dist.is_initialized():
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(PATIENCE)  # the launcher ends all at the first exit, and the first may still be importing
    if claim_failure(sentence) is not None:
        sys.exit(1)
    sys.exit(sentence if ranks.is_first() else f"rank {ranks.rank()}: {sentence}")


def claim_failure(sentence: str) -> str | None:
    """Report that this rank failed.

    Returns:
        None if this is the first failure, or that is unknown; otherwise the sentence of the first.
    """
    if not ranks.is_distributed():
        return None
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=5))
        first = store.compare_set(FAILURE, "", f"rank {ranks.rank()}: {sentence}").decode()
    except RuntimeError:  # the store is gone with rank 0: an error reported twice is better than none
        return None
    return None if first == f"rank {ranks.rank()}: {sentence}" else first


def _known(error: BaseException) -> str | None:
    """Return a sentence for an error of the environment, however the library that met it wraps it."""
    text = str(error)
    if "No space left on device" in text:
        return f"the disk is full ({error}); free space, and resume a training run with resume=auto"
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory is full; launch/plan.py with the same arguments says what fits"
    if ranks.is_distributed() and any(mark in text for mark in PEER_GONE):
        return f"another rank was killed or cannot be reached ({text.splitlines()[0]}); resume with resume=auto"
    return None
