"""Frozen dataclasses of the commands that answer questions: launch/eval.py and launch/predict.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from vlmvqa.config.schema import DataSettings, RunSettings
from vlmvqa.models.interface import GenerationSettings


@dataclass(frozen=True)
class Expected:
    """A published score, how far a reproduction may differ from it, and where it was published."""

    score: float
    tolerance: float
    source: str

    def compare(self, score: float | None) -> str:
        """Return a line that compares a score with the published one; None: it was not computed."""
        published = f"expected {self.score:g} ± {self.tolerance:g} ({self.source})"
        if score is None:
            return f"{published}; this split has no answers to score, so submission.json must be uploaded"
        reached = "reproduced" if abs(score - self.score) <= self.tolerance else "NOT reproduced"
        return f"{published}, found {score:.2f}: {reached}"


@dataclass(frozen=True)
class EvalConfig:
    """Config of launch/eval.py: what is scored, and how; conf/eval.yaml documents its keys."""

    run: RunSettings
    decoding: GenerationSettings
    data: DataSettings | None = None
    checkpoint: str | None = None
    predictions: str | None = None
    compare: Sequence[str] | None = None
    split: str | None = None
    expected: Expected | None = None
    blank_images: bool = False
    report: bool = True
    attributions: int = 0
    variants: bool = False
    batch_size: int = 64
    workers: int = 0
    dtype: str = "auto"
    seed: int = 0
    given: frozenset[str] = frozenset()


@dataclass(frozen=True)
class PredictConfig:
    """Config of launch/predict.py: questions and images; conf/predict.yaml documents its keys."""

    run: RunSettings
    checkpoint: str
    decoding: GenerationSettings
    image: Sequence[str] = ()
    question: Sequence[str] = ()
    questions: str | None = None
    dtype: str = "auto"
    given: frozenset[str] = frozenset()


def override_decoding(
    trained: GenerationSettings, decoding: GenerationSettings, given: Iterable[str]
) -> GenerationSettings:
    """Return the settings a model was trained with, except for those that the command line sets."""
    keys = [key.removeprefix("decoding.") for key in given if key.startswith("decoding.")]
    return replace(trained, **{key: getattr(decoding, key) for key in keys})
