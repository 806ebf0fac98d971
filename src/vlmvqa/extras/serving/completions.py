"""The requests of `POST /v1/chat/completions`: answers with given generation settings, and their tokens."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal, Self

from transformers import PreTrainedTokenizerBase

from vlmvqa.data.example import Example, Question
from vlmvqa.extras.serving.batcher import PendingRequest
from vlmvqa.extras.serving.chat_schema import TokenLogprob, TopLogprob
from vlmvqa.inference.likelihood import Likelihood, score_documents
from vlmvqa.inference.predictor import Predictor
from vlmvqa.models.interface import Generated, GenerationSettings
from vlmvqa.sequence.rows import Document


@dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
        pieces: its text, divided into a piece for each token.
        finish_reason: "length" for an answer that was truncated at max_new_tokens.
        prompt_tokens: number of tokens of image and prompt.
        logprobs: of its tokens; None: not requested.
    """

    pieces: Sequence[str]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    logprobs: Sequence[TokenLogprob] | None


@dataclass(frozen=True)
class Row:
    """A row of a batch: its document, the number of tokens of image and prompt, and its answers."""

    document: Document
    prompt_tokens: int
    answers: Sequence[Generated]


@dataclass(eq=False)
class CompletionRequest(PendingRequest):
    """An image and a question, as often as it is to be answered.

    Attributes:
        stop: texts at which an answer ends.
        top_logprobs: number of alternatives listed for each token; None: no log-probabilities.
    """

    decoding: GenerationSettings = field(default_factory=GenerationSettings)
    stop: Sequence[str] = ()
    top_logprobs: int | None = None

    @property
    def batch_key(self) -> Hashable:
        """Requests of one model with equal generation settings share a batch."""
        return self.model, self.decoding

    @property
    def is_slow(self) -> bool:
        """Whether `finish` computes log-probabilities."""
        return self.top_logprobs is not None

    @classmethod
    def predict(cls, predictor: Predictor, batch: Sequence[Self], max_rows: int) -> list[list[Row]]:
        """Return the rows of each request, answered."""
        processor = predictor.processor
        examples = [request._rows(predictor) for request in batch]
        waiting = iter([row for rows in examples for row in rows])
        done: list[Row] = []
        while part := list(islice(waiting, max_rows)):
            documents = [processor.encode(row, [None] * len(row.questions)) for row in part]
            columns = predictor.batch(documents)
            keys = [question.id for row in part for question in row.questions]
            found = iter(predictor.model.generate(columns, processor.end_token_ids, batch[0].decoding, keys))
            lengths = (columns["position"].amax(dim=1) + 1).tolist()
            for document, length in zip(documents, lengths, strict=True):
                done.append(Row(document, length, list(islice(found, len(document.questions)))))
        ended = iter(done)
        return [list(islice(ended, len(rows))) for rows in examples]

    def _rows(self, predictor: Predictor) -> list[Example]:
        text, key = self.questions[0], self.ids[0]
        prompt = predictor.prompt.replace("{question}", text)
        # The first answer has the random stream of `POST /answer`.
        keys = [key, *(f"{number} {key}" for number in range(1, len(self.questions)))]
        example = Example(self.image, "sent", tuple(Question(key, text, prompt) for key in keys))
        size = len(keys) if predictor.model.shares_images else 1
        return [example.with_questions(first, first + size) for first in range(0, len(keys), size)]

    def finish(self, predictor: Predictor, answers: Any) -> list[Completion]:
        """Return the answers with their texts and log-probabilities."""
        rows: list[Row] = answers
        tokenizer = predictor.processor.tokenizer
        scores = iter(() if self.top_logprobs is None else score_documents(predictor, _scored(rows), self.top_logprobs))
        completions = []
        for tokens in (answer.tokens for row in rows for answer in row.answers):
            pieces, stopped = _until(self.stop, text_pieces(tokenizer, tokens))
            cut = len(tokens) >= self.decoding.max_new_tokens and not stopped  # EOS counts
            reason: Literal["length", "stop"] = "length" if cut else "stop"
            score = next(scores, None)
            logprobs = None if score is None else token_logprobs(tokenizer, score)[: len(pieces)]
            completions.append(Completion(pieces, reason, rows[0].prompt_tokens, logprobs))
        return completions


def _scored(rows: Sequence[Row]) -> list[Document]:
    """Return the documents with their answers."""
    documents = []
    for row in rows:
        pairs = zip(row.document.questions, row.answers, strict=True)
        questions = [replace(question, answer=answer.tokens) for question, answer in pairs]
        documents.append(replace(row.document, questions=questions))
    return documents


def token_logprobs(tokenizer: PreTrainedTokenizerBase, score: Likelihood) -> list[TokenLogprob]:
    """Return the log-probability of every token of an answer, and the most probable tokens at its place."""

    def named(token: int, value: float) -> TopLogprob:
        text = str(tokenizer.decode([token]))
        return TopLogprob(token=text, logprob=value, bytes=None if "\ufffd" in text else list(text.encode()))

    return [
        TokenLogprob(**named(token, value).model_dump(), top_logprobs=[named(*other) for other in best])
        for token, value, best in zip(score.tokens, score.log_probabilities, score.best, strict=True)
    ]


def text_pieces(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """Return the text of an answer, divided into a piece for each token.

    A character of several tokens is in the piece of the last one.
    """
    ends = range(1, len(tokens) + 1)
    texts = [str(tokenizer.decode(tokens[:end], skip_special_tokens=True)).strip() for end in ends]
    pieces: list[str] = []
    done = 0
    for text in texts:
        end = max(done, len(text)) if texts[-1].startswith(text) else done
        pieces.append(texts[-1][done:end])
        done = end
    return pieces


def _until(stop: Sequence[str], pieces: Sequence[str]) -> tuple[list[str], bool]:
    """Return the pieces before the first stop text, and whether there is one."""
    text = "".join(pieces)
    places = [place for place in map(text.find, stop) if place >= 0]
    left = min(places, default=len(text))
    kept: list[str] = []
    for piece in pieces:
        if places and left == 0:
            break
        kept.append(piece[:left])
        left -= len(kept[-1])
    return kept, bool(places)
