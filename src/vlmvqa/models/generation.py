"""Answers: the same rows and the same predicate, with a KV cache.

Image and questions are read once (prefill); then one step adds one token to every open question. The cache holds
columns in the order they were computed, whichever branch they belong to: who sees whom is still the predicate's
word, so a batch equals its questions asked one at a time.

A question that has its answer takes part in no further step, and a row goes when its last question has gone:

    step 1    row 0: a b c    row 1: d e    row 2: f        3 rows of 3 slots
    step 2    row 0: b        row 1: d e                    2 rows of 2 slots: a, c and f have ended

Legend: B rows, K columns in the cache, S slots (most open questions of a row), Q open questions, W beams,
V vocabulary, D width.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from vlmvqa.errors import InputError
from vlmvqa.sequence.masks import Tokens
from vlmvqa.sequence.rows import ANSWER, PADDING, PROMPT

if TYPE_CHECKING:
    from vlmvqa.models.vlm import VLM, Batch

CHUNK = 256  # states that meet the output head at once: 256 MiB of fp32 logits at V = 256,000
NONE = -1  # the question that wrote a column of padding


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are written.

    Attributes:
        max_new_tokens: tokens an answer, at most (EOS counts).
        num_beams: 1 for greedy decoding or sampling, more for beam search.
        temperature: 0 for the most probable token, above for sampling (one beam).
        length_penalty: beam search divides a log-probability by length ** length_penalty (transformers' rule).
        seed: of the sampling. Each question draws from a stream of its own, whatever it is asked together with.
    """

    max_new_tokens: int = 20
    num_beams: int = 1
    temperature: float = 0.0
    length_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.num_beams < 1 or self.temperature < 0:
            raise InputError("decoding: max_new_tokens and num_beams must be at least 1, temperature at least 0")
        if self.num_beams > 1 and self.temperature > 0:
            raise InputError(
                "decoding: beam search does not sample; set decoding.temperature=0 or decoding.num_beams=1"
            )


@dataclass(frozen=True)
class Generated:
    """Answer token ids without EOS, and their log-probability, EOS included."""

    tokens: list[int]
    log_probability: float


@torch.no_grad()
def generate(
    model: VLM,
    batch: Batch,
    eos: Collection[int],
    decoding: GenerationSettings,
    keys: Sequence[int | str] | None = None,
) -> list[Generated]:
    """Answer every question of a batch of rows without answers, in row order.

    Args:
        batch: as the loss takes it, from questions without answers.
        eos: token ids that end an answer.
        keys: what tells the questions' streams of random numbers apart, in row order, used for sampling only
            (default: their place in the batch).
    """
    if decoding.num_beams > 1:
        return [best[0] for best in beam_candidates(model, batch, eos, decoding)]
    with _answering(model):
        questions = OpenQuestions(model, batch)
        return _one_by_one(questions, sorted(eos), decoding, range(len(questions)) if keys is None else keys)


@torch.no_grad()
def beam_candidates(
    model: VLM, batch: Batch, eos: Collection[int], decoding: GenerationSettings
) -> list[list[Generated]]:
    """The finished beams of every question, at most `decoding.num_beams` of them, the best first; as `generate`."""
    with _answering(model):
        return _beam_search(OpenQuestions(model, batch), sorted(eos), decoding)


@contextmanager
def _answering(model: VLM) -> Iterator[None]:
    """The model as it answers; then as it was."""
    training, attention = model.training, model.language.attention
    model.eval()
    model.language.set_attention("dense")  # one query a branch is no case for FlexAttention
    try:
        yield
    finally:
        model.train(training)
        model.language.set_attention(attention)


class OpenQuestions:
    """The questions of a batch that have no answer yet.

    Attributes:
        number: int64[Q], their places among all questions of the batch, ascending.
        hidden: float[Q, W, D], the states that predict each beam's next token (before `branch_out` W = 1).
    """

    def __init__(self, model: VLM, batch: Batch) -> None:
        self.model = model
        # `DynamicCache(config=...)` would let Gemma 2's local layers forget by index, not by position.
        self.cache = DynamicCache()
        self.keys = model.tokens(batch)
        hidden = model.decode(batch, self.cache)
        self.row, column = _last_prompt_tokens(batch).nonzero(as_tuple=True)
        self.number = torch.arange(len(self.row), device=hidden.device)
        self.hidden = hidden[self.row, column][:, None]
        self.document = batch["document"][self.row, column]
        self.branch = batch["branch"][self.row, column]
        self.position = batch["position"][self.row, column]
        self.beams, self.asked = 1, len(self)
        self.writer = self.row.new_empty(self._rows(), 0)  # int64[B, columns after the prompts]: a question's number
        self._take_slots()

    def __len__(self) -> int:
        return len(self.number)

    def read(self, choose: Callable[..., Sequence[Tensor]], *more: Tensor) -> list[Tensor]:
        """What `choose` makes of the next tokens' log-probabilities, `float32[Q, W, V]`, some questions at a time.

        Args:
            more: further arguments of `choose`, an entry a question.
        """
        size = max(1, CHUNK // self.beams)
        pieces = zip(*(tensor.split(size) for tensor in (self.hidden, *more)), strict=True)
        chosen = [choose(self.model.language.logits(states).log_softmax(-1), *rest) for states, *rest in pieces]
        return [torch.cat(column) for column in zip(*chosen, strict=True)]

    def step(self, ids: Tensor) -> None:
        """Add a token to each open question, `int64[Q, W]`."""
        self.position = self.position + 1
        tokens = Tokens.of(
            document=self._place(self.document[:, None].expand_as(ids), PADDING),
            branch=self._place(self.branch[:, None].expand_as(ids), 0),
            role=ids.new_full((len(self.keys.document), self.slots), ANSWER),
            position=self._place(self.position[:, None].expand_as(ids), 0),
            attention_pattern=self.model.attention_pattern,
        )
        self.keys = self.keys.append(tokens)
        embeddings = self.model.language.embed(self._place(ids, 0))
        hidden = self.model.language(embeddings, tokens, self.keys, self.cache)
        self.hidden = hidden.unflatten(0, (-1, self.beams))[self.row, :, self.slot]
        writer = self.row.new_full((self._rows(), self.slots), NONE)
        writer[self.row, self.slot] = self.number
        self.writer = torch.cat([self.writer, writer], dim=1)

    def keep(self, open: Tensor) -> None:
        """Go on with these questions only, `bool[Q]`.

        Rows without any leave once they are a quarter of all. To leave costs a copy of the keys and values that stay,
        and a step saves some three copies (growing the cache, repeating its heads, attention) of those that went.
        """
        if open.all():
            return
        self.number, self.row, self.position = self.number[open], self.row[open], self.position[open]
        self.document, self.branch = self.document[open], self.branch[open]
        used, row = self.row.unique(return_inverse=True)
        if 4 * len(used) <= 3 * self._rows():
            beams = torch.arange(self.beams, device=used.device)
            copies = (used[:, None] * self.beams + beams).flatten()
            self.cache.batch_select_indices(copies)
            self.keys = self.keys.map(lambda t: t[copies])
            self.row, self.writer = row, self.writer[used]
        self._take_slots()

    def branch_out(self, beams: int) -> None:
        """Repeat every row W times: beam w of all its questions lives in its w-th copy."""
        self.beams = beams
        self.cache.batch_repeat_interleave(beams)
        self.keys = self.keys.map(lambda t: t.repeat_interleave(beams, dim=0))

    def reorder(self, parent: Tensor) -> None:
        """Let beam w of question q go on from what beam `parent[q, w]` has written.

        Questions of a row choose their parents apart from each other, so the cache is gathered column by column: a
        column belongs to one question.
        """
        beams = torch.arange(self.beams, device=parent.device)
        parents = beams.repeat(self.asked + 1, 1)  # closed questions and, at the end, padding stay as they are
        parents[self.number] = parent
        source = parents[self.writer].transpose(1, 2)[:, :, None, :, None]  # [B, W, 1, columns, 1]
        layers: list[Any] = self.cache.layers
        for states in (states for layer in layers for states in (layer.keys, layer.values)):
            written = states[:, :, -source.shape[3] :].unflatten(0, (-1, self.beams))  # [B, W, heads, columns, Dh]
            written.copy_(written.gather(1, source.expand_as(written)))

    def _rows(self) -> int:
        return len(self.keys.document) // self.beams

    def _take_slots(self) -> None:
        """The open questions of each row take its first slots."""
        self.slot = torch.arange(len(self), device=self.row.device) - torch.searchsorted(self.row, self.row)
        self.slots = int(self.slot.max()) + 1

    def _place(self, values: Tensor, fill: int) -> Tensor:
        """`[Q, W] -> [B * W, S]`: from questions to their slots."""
        placed = values.new_full((self._rows(), self.beams, self.slots), fill)
        placed[self.row, :, self.slot] = values
        return placed.flatten(0, 1)


def _last_prompt_tokens(batch: Batch) -> Tensor:
    """`bool[B, T]`: the prompt tokens that no token of the same branch follows."""
    is_prompt = (batch["role"] == PROMPT) & (batch["document"] != PADDING)
    follows = torch.zeros_like(is_prompt)
    same = is_prompt[:, 1:] & (batch["position"][:, 1:] == batch["position"][:, :-1] + 1)
    follows[:, :-1] = same & (batch["branch"][:, 1:] == batch["branch"][:, :-1])
    return is_prompt & ~follows


def streams_of(decoding: GenerationSettings, keys: Sequence[int | str]) -> list[random.Random]:
    """Each question's own stream of random numbers."""
    return [random.Random(f"{decoding.seed}-{key}") for key in keys]


def pick(log_probs: Tensor, drawn: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The next token of each question, `int64[Q]`, and its log-probability, `float[Q]`.

    Args:
        log_probs: float[Q, V].
        drawn: float64[Q], from 0 to 1, used where the temperature is not 0.
    """
    if temperature == 0:
        chosen = log_probs.argmax(-1)
    else:  # the token under which the drawn share of all probability lies
        share = (log_probs / temperature).softmax(-1).double().cumsum(-1)
        chosen = torch.searchsorted(share, drawn[:, None] * share[:, -1:], right=True)[:, 0]
        chosen = chosen.clamp(max=share.shape[-1] - 1)
    return chosen, log_probs.gather(-1, chosen[:, None])[:, 0]


def _one_by_one(
    questions: OpenQuestions, eos: list[int], decoding: GenerationSettings, keys: Sequence[int | str]
) -> list[Generated]:
    """Greedy decoding, or sampling at a temperature."""
    ends = torch.tensor(eos, device=questions.number.device)
    streams = streams_of(decoding, keys)

    def choose(log_probs: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        return pick(log_probs[:, 0], drawn, decoding.temperature)

    total = torch.zeros(len(questions), device=ends.device)
    written = torch.full((len(questions), decoding.max_new_tokens), -1, device=ends.device)
    for step in range(decoding.max_new_tokens):
        drawn = [streams[number].random() for number in questions.number.tolist()]
        chosen, log_prob = questions.read(choose, torch.tensor(drawn, dtype=torch.float64, device=ends.device))
        total[questions.number] += log_prob
        open = ~torch.isin(chosen, ends)
        written[questions.number, step] = torch.where(open, chosen, -1)
        if step + 1 == decoding.max_new_tokens or not open.any():
            break
        questions.keep(open)
        questions.step(chosen[open, None])
    return [
        Generated([token for token in answer if token >= 0], score)
        for answer, score in zip(written.tolist(), total.tolist(), strict=True)
    ]


def _beam_search(questions: OpenQuestions, eos: list[int], decoding: GenerationSettings) -> list[list[Generated]]:
    """Beam search with transformers' rules (`early_stopping=False`): W running and W finished beams a question.

    A finished beam scores its log-probability / length ** length_penalty, EOS counted. A question is done when
    its best running beam, at its present length, no longer beats its worst finished one.
    """
    width, device = decoding.num_beams, questions.number.device
    ends = torch.tensor(eos, device=device)
    running = torch.zeros(len(questions), 1, device=device)
    written = torch.full((len(questions), 1, 0), -1, device=device)
    finished: list[list[tuple[float, Generated]]] = [[] for _ in range(len(questions))]

    def choose(log_probs: Tensor, running: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores, flat = (running[:, :, None] + log_probs).flatten(1).topk(2 * width)
        return scores, flat // log_probs.shape[-1], flat % log_probs.shape[-1]

    def finish(which: Tensor, scores: Tensor, beams: Tensor, length: int) -> None:
        """Note the beams `beams [Q, N, tokens]` that `which [Q, N]` points out, the best W of each question."""
        numbers = questions.number[which.nonzero()[:, 0]].tolist()
        for number, score, tokens in zip(numbers, scores[which].tolist(), beams[which].tolist(), strict=True):
            finished[number].append((score / length**decoding.length_penalty, Generated(tokens, score)))
        for number in numbers:
            finished[number] = sorted(finished[number], key=lambda beam: -beam[0])[:width]

    for length in range(1, decoding.max_new_tokens + 1):
        scores, parent, token = questions.read(choose, running)
        is_end = torch.isin(token, ends)
        written = written.gather(1, parent[..., None].expand(-1, -1, length - 1))
        finish(is_end & (torch.arange(2 * width, device=device) < width), scores, written, length)

        running, kept = scores.masked_fill(is_end, -1e9).topk(width)
        parent, token = parent.gather(1, kept), token.gather(1, kept)
        written = torch.cat([written.gather(1, kept[..., None].expand(-1, -1, length - 1)), token[..., None]], dim=-1)
        best = (running[:, 0] / length**decoding.length_penalty).tolist()
        found = [finished[number] for number in questions.number.tolist()]
        open = torch.tensor([len(f) < width or b >= f[-1][0] for f, b in zip(found, best, strict=True)], device=device)
        if length == decoding.max_new_tokens:  # unfinished beams compete as they are
            finish(open[:, None].expand_as(running), running, written, length)
        if length == decoding.max_new_tokens or not open.any():
            break
        questions.keep(open)
        running, written, parent, token = running[open], written[open], parent[open], token[open]
        if length == 1:
            questions.branch_out(width)
        else:
            questions.reorder(parent)
        questions.step(token)
    return [[beam for _, beam in beams] for beams in finished]
