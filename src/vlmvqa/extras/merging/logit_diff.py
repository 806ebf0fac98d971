"""How far a merged model is from what it was made of: both answer the same questions, and their logits are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from vlmvqa.data.example import Example
from vlmvqa.extras.pretrained.model import PretrainedVLM
from vlmvqa.inference.predictor import Predictor
from vlmvqa.sequence.rows import IGNORE


@dataclass(frozen=True)
class Drift:
    """Differences of two models' logits.

    Attributes:
        questions: that were asked.
        positions: at which the logits were compared: the answers' tokens and what ends them.
        largest: absolute difference of any logit.
        range: largest absolute logit.
        other_choices: positions at which another token is the likeliest.
    """

    questions: int
    positions: int
    largest: float
    range: float
    other_choices: int

    def __str__(self) -> str:
        return (
            f"{self.largest:.2g} of logits up to {self.range:.3g}; another token is the likeliest at "
            f"{self.other_choices} of {self.positions} positions of {self.questions} questions"
        )


def one_question_each(examples: Sequence[Example], most: int) -> list[Example]:
    """At most so many questions, each with its image."""
    every = (example.part(n, n + 1) for example in examples for n in range(len(example.questions)))
    return list(islice(every, most))


@torch.no_grad()
def answers_logits(predictor: Predictor, examples: Sequence[Example]) -> list[Tensor]:
    """Of each question, the logits where its answer stands: float32[S, V]. Where none is known, "yes" stands there.

    Args:
        examples: with one question each.
    """
    model, processor = predictor.model.eval(), predictor.processor
    device = next(model.parameters()).device
    found = []
    for example in examples:
        columns = processor.collate([[processor.encode(example, [example.questions[0].target or "yes"])]])
        batch = {name: column.to(device) for name, column in columns.items()}
        hidden = model.decode(batch)[batch["labels"] != IGNORE]
        logits = model.logits(hidden) if isinstance(model, PretrainedVLM) else model.language.logits(hidden)
        found.append(logits.float().cpu())
    return found


def drift(one: Sequence[Tensor], other: Sequence[Tensor]) -> Drift:
    """Between the logits of two models, question by question."""
    pairs = list(zip(one, other, strict=True))
    return Drift(
        questions=len(pairs),
        positions=sum(len(a) for a, _ in pairs),
        largest=max(float((a - b).abs().max()) for a, b in pairs),
        range=max(float(a.abs().max()) for a, _ in pairs),
        other_choices=sum(int((a.argmax(-1) != b.argmax(-1)).sum()) for a, b in pairs),
    )
