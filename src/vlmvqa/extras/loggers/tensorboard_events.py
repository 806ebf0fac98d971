"""TensorBoard logger: event files in `runs/` of the run's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from vlmvqa.extras.loggers.samples import Sample
from vlmvqa.extras.loggers.tracking import Logger, RunInfo


class TensorBoard(Logger):
    """Scalars, and samples as images with text."""

    shows_samples = True

    def __init__(self, run: RunInfo) -> None:
        # TensorBoard ignores existing events from purge_step on.
        self.writer = SummaryWriter(str(run.folder / "runs"), purge_step=run.step + 1)
        self.writer.add_text("config", _code_block(run.config_yaml), run.step)
        self.writer.add_text("code", run.code, run.step)
        self.writer.flush()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Write scalars, and flush so that SIGKILL loses nothing."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        """Write each sample's image and text."""
        for sample in samples:
            if sample.thumbnail is not None:
                image = np.asarray(sample.thumbnail.convert("RGB"))
                self.writer.add_image(f"samples/{sample.name}", image, step, dataformats="HWC")
            self.writer.add_text(f"samples/{sample.name}", _code_block(sample.text()), step)
        self.writer.flush()

    def close(self, finished: bool) -> None:
        """Close the event file."""
        self.writer.close()


def _code_block(text: str) -> str:
    """Indent text so that TensorBoard's Markdown shows it verbatim."""
    return "\n".join("    " + line for line in text.splitlines())
