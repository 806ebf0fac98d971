"""Compare the logits of two models on the same questions, such as an adapter on its base and the merged model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from vlmvqa.data.example import Example
from vlmvqa.inference.predictor import Predictor
from vlmvqa.sequence.rows import IGNORE


@dataclass(frozen=True)
class LogitDiff:
    """Difference between the logits of two models at the positions that predict the answers' tokens and EOS.

    Attributes:
        largest: Largest absolute difference of a logit.
        range: Largest absolute logit of the first model.
        other_choices: Positions where the models disagree on the most likely token.
    """

    questions: int
    positions: int
    largest: float
    range: float
    other_choices: int

    def __str__(self) -> str:
        return (
            f"{self.largest:.2g} of logits up to {self.range:.3g}; the most likely token differs at "
            f"{self.other_choices} of {self.positions} positions of {self.questions} questions"
        )


def one_question_each(examples: Sequence[Example], limit: int) -> list[Example]:
    """Split examples into examples with one question each, and return at most `limit` of them."""
    every = (example.with_questions(n, n + 1) for example in examples for n in range(len(example.questions)))
    return list(islice(every, limit))


@torch.no_grad()
def answer_logits(predictor: Predictor, examples: Sequence[Example]) -> list[Tensor]:
    """Return the logits at the supervised positions of each example's only question, float32[S, V].

    A question without an answer is given the answer "yes".
    """
    model, processor = predictor.model.eval(), predictor.processor
    device = next(model.parameters()).device
    found = []
    for example in examples:
        columns = processor.collate([[processor.encode(example, [example.questions[0].target or "yes"])]])
        batch = {name: column.to(device) for name, column in columns.items()}
        hidden = model.decode(batch)[batch["labels"] != IGNORE]
        found.append(model.logits(hidden).float().cpu())
    return found


def logit_diff(one: Sequence[Tensor], other: Sequence[Tensor]) -> LogitDiff:
    """Compare the logits of two models, question by question."""
    pairs = list(zip(one, other, strict=True))
    return LogitDiff(
        questions=len(pairs),
        positions=sum(len(a) for a, _ in pairs),
        largest=max(float((a - b).abs().max()) for a, b in pairs),
        range=max(float(a.abs().max()) for a, _ in pairs),
        other_choices=sum(int((a.argmax(-1) != b.argmax(-1)).sum()) for a, b in pairs),
    )
