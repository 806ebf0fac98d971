"""Log-likelihoods of given answers: each question is scored with its `target`, questions of an image in shared rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import DataLoader

from vlmvqa import ranks
from vlmvqa.data.eval_dataset import EvalDataset
from vlmvqa.data.example import Example
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.inference.predictor import ROW_TEXT_TOKENS, Predictor, all_questions, refuse_equal_ids
from vlmvqa.sequence.loss import CHUNK
from vlmvqa.sequence.rows import IGNORE, Document


@dataclass(frozen=True)
class Likelihood:
    """Log-likelihood of a given answer.

    Attributes:
        tokens: token ids of the answer, EOS last.
        log_probabilities: of each token, given the image, the question and the tokens before it.
        best: the most probable tokens at each position with their log-probabilities, most probable first.
    """

    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    best: tuple[tuple[tuple[int, float], ...], ...]

    def log_probability(self, end: bool = True) -> float:
        """Return the log-probability of the answer.

        Args:
            end: include EOS, as `Answer.log_probability` does; evaluation harnesses leave it out.
        """
        return sum(self.log_probabilities if end else self.log_probabilities[:-1])

    def is_greedy(self, end: bool = True) -> bool:
        """Return whether each token is the most probable one at its position; `end` as in `log_probability`."""
        pairs = list(zip(self.tokens, self.best, strict=True))
        return all(token == best[0][0] for token, best in (pairs if end else pairs[:-1]))


@torch.no_grad()
def log_likelihoods(
    predictor: Predictor,
    examples: Sequence[Example],
    *,
    num_best: int = 1,
    batch_size: int = 16,
    row_text_tokens: int = ROW_TEXT_TOKENS,
    workers: int = 0,
    bad_records: BadRecords | None = None,
) -> dict[int | str, Likelihood]:
    """Return the log-likelihood of every question's target, by question id, in the examples' order.

    To score several answers to one question, give the question once per answer, with an id each.

    Args:
        num_best: number of most probable tokens to return for each position, at least 1.
        batch_size, row_text_tokens, workers, bad_records: as in `Predictor.answer_examples`.

    Raises:
        InputError: two questions have one id, a question has no target or an empty one, or an image cannot be read.
    """
    refuse_equal_ids(examples)
    for question in all_questions(examples):
        if question.target is None:
            raise InputError(f"question {question.id} has no answer to score; set its target")
    rows = predictor.rows(examples, predictor.processor, row_text_tokens)
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    mine = batches[ranks.rank() :: ranks.world_size()] if ranks.is_distributed() else batches
    loader = DataLoader(
        EvalDataset(
            [row for batch in mine for row in batch], predictor.processor, bad_records or BadRecords(advice=""), True
        ),
        batch_size,
        collate_fn=list,
        num_workers=workers,
        generator=torch.Generator(),  # own generator: scoring must not advance the training's random state
    )
    found: dict[int | str, Likelihood] = {}
    for batch, encoded in zip(mine, loader, strict=True):
        readable = [(example, document) for example, document in zip(batch, encoded, strict=True) if document]
        if readable:
            ids = [question.id for question in all_questions(example for example, _ in readable)]
            scored = score_documents(predictor, [document for _, document in readable], num_best)
            found.update(zip(ids, scored, strict=True))
    every = {question: one for share in ranks.gather(found) for question, one in share.items()}
    return {question.id: every[question.id] for question in all_questions(examples) if question.id in every}


@torch.no_grad()
def score_documents(predictor: Predictor, documents: Sequence[Document], num_best: int) -> list[Likelihood]:
    """Score the answers of tokenized documents, each in a row of its own, in order."""
    batch = predictor.batch(documents)
    supervised = (batch["labels"].flatten() != IGNORE).nonzero()[:, 0]
    hidden = rearrange(predictor.model.decode(batch), "b t d -> (b t) d").index_select(0, supervised)
    targets = batch["labels"].flatten().index_select(0, supervised)
    columns: list[tuple[Tensor, Tensor, Tensor]] = []
    for states, labels in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
        log_probs = predictor.model.logits(states).log_softmax(-1)
        values, tokens = log_probs.topk(num_best)
        columns.append((log_probs.gather(-1, labels[:, None])[:, 0], values, tokens))
    own, best_values, best_tokens = (torch.cat(column).tolist() for column in zip(*columns, strict=True))
    best = [tuple(zip(*one, strict=True)) for one in zip(best_tokens, best_values, strict=True)]
    scored, start = [], 0
    for question in (question for document in documents for question in document.questions):
        start += sum(len(turn.answer) for turn in question.earlier)  # supervised too, but given
        end = start + len(question.answer)
        scored.append(Likelihood(tuple(question.answer), tuple(own[start:end]), tuple(best[start:end])))
        start = end
    return scored
