"""Answer generation: the same rows and the same attention predicate as in training, with a KV cache.

Images and questions are read once (prefill); each step then adds one token to every open question. Cached columns are
in the order in which they were computed, whichever question they belong to: the predicate decides which tokens see
which, so that a batch gives the same answers as its questions one at a time.

A finished question takes part in no further step, and a row is removed when its last question has finished:

    step 1    row 0: a b c    row 1: d e    row 2: f        3 rows of 3 slots
    step 2    row 0: b        row 1: d e                    2 rows of 2 slots: a, c and f have finished

Legend: B rows, K columns in the cache, S slots (most open questions of a row), Q open questions, W beams,
V vocabulary, D width.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from vlmvqa.models.interface import Generated, GenerationSettings
from vlmvqa.models.language import LanguageModel
from vlmvqa.sequence.masks import Tokens
from vlmvqa.sequence.rows import NONE, PADDING, PROMPT, Batch

CHUNK = 256  # states passed to the output head at once: 256 MiB of fp32 logits at V = 256,000
NO_QUESTION = -1  # the question of a padding column


class CachedModel(Protocol):
    """The part of `VLM` that generation uses."""

    language: LanguageModel
    training: bool

    def tokens(self, batch: Batch) -> Tokens:
        """Return the token properties of a batch."""

    def decode(self, batch: Batch, cache: Cache | None = None) -> Tensor:
        """Return the last hidden states, and fill the cache."""

    def train(self, mode: bool = True) -> Any:
        """Set training or evaluation mode."""


@torch.no_grad()
def generate(
    model: CachedModel,
    batch: Batch,
    eos: Collection[int],
    decoding: GenerationSettings,
    keys: Sequence[int | str] | None = None,
) -> list[Generated]:
    """Answer every question of rows without answers, in row order.

    Args:
        batch: columns as for the loss, from questions without answers.
        eos: token ids that end an answer.
        keys: a key per question, in row order, that selects its random stream for sampling (default: its index in the
            batch).
    """
    if decoding.num_beams > 1:
        return [best[0] for best in beam_candidates(model, batch, eos, decoding)]
    with _evaluation(model):
        questions = _open_questions(model, batch, decoding)
        return _sample(questions, sorted(eos), decoding, range(len(questions)) if keys is None else keys)


@torch.no_grad()
def beam_candidates(
    model: CachedModel, batch: Batch, eos: Collection[int], decoding: GenerationSettings
) -> list[list[Generated]]:
    """Return the finished beams of every question, best first, at most `decoding.num_beams`; args as `generate`."""
    with _evaluation(model):
        return _beam_search(OpenQuestions(model, batch), sorted(eos), decoding)


def _open_questions(model: CachedModel, batch: Batch, decoding: GenerationSettings) -> OpenQuestions:
    if not decoding.static_cache:
        return OpenQuestions(model, batch)
    from vlmvqa.models.static_cache import StaticQuestions

    return StaticQuestions(model, batch, decoding.max_new_tokens)


@contextmanager
def _evaluation(model: CachedModel) -> Iterator[None]:
    """Switch to evaluation mode and dense attention within the context."""
    training, attention = model.training, model.language.attention
    model.train(False)
    model.language.set_attention("dense")  # FlexAttention gains nothing from one query per branch
    try:
        yield
    finally:
        model.train(training)
        model.language.set_attention(attention)


class OpenQuestions:
    """The questions of a batch whose answers are unfinished.

    Attributes:
        number: int64[Q], their indices among all questions of the batch, ascending.
        hidden: float[Q, W, D], the states that predict each beam's next token (W = 1 before `expand_beams`).
    """

    def __init__(self, model: CachedModel, batch: Batch) -> None:
        self.model = model
        # `DynamicCache(config=...)` would let Gemma 2's local layers forget by index, not by position.
        self.cache = DynamicCache()
        self.keys = model.tokens(batch)
        hidden = model.decode(batch, self.cache)
        self.row, column = last_prompt_tokens(batch).nonzero(as_tuple=True)
        self.number = torch.arange(len(self.row), device=hidden.device)
        self.hidden = hidden[self.row, column][:, None]
        self.document = batch["document"][self.row, column]
        self.branch = batch["branch"][self.row, column]
        self.position = batch["position"][self.row, column]
        self.num_beams, self.total = 1, len(self)
        self.owner = self.row.new_empty(self._rows(), 0)  # int64[B, columns after the prompts]: a column's question
        self._assign_slots()

    def __len__(self) -> int:
        """Return Q."""
        return len(self.number)

    def choose(self, function: Callable[..., Sequence[Tensor]], *arguments: Tensor) -> list[Tensor]:
        """Apply a function to the log-probabilities of the next tokens, `float32[Q, W, V]`, in chunks of questions.

        Args:
            arguments: further arguments of the function, one entry per question.
        """
        size = max(1, CHUNK // self.num_beams)
        chunks = zip(*(tensor.split(size) for tensor in (self.hidden, *arguments)), strict=True)
        chosen = [function(self.model.language.logits(states).log_softmax(-1), *rest) for states, *rest in chunks]
        return [torch.cat(column) for column in zip(*chosen, strict=True)]

    def step(self, ids: Tensor) -> None:
        """Append a token to each open question's beams, `int64[Q, W]`."""
        self.position = self.position + 1
        tokens = self._new_tokens(ids)
        self.keys = self.keys.append(tokens)
        embeddings = self.model.language.embed(self._place(ids, 0))
        hidden = self.model.language(embeddings, tokens, self.keys, self.cache)
        self.hidden = rearrange(hidden, "(b w) s d -> b s w d", w=self.num_beams)[self.row, self.slot]
        owner = self.row.new_full((self._rows(), self.slots), NO_QUESTION)
        owner[self.row, self.slot] = self.number
        self.owner = torch.cat([self.owner, owner], dim=1)

    def keep(self, open: Tensor) -> None:
        """Continue with these questions only, `bool[Q]`.

        Rows without open questions are removed once they are a quarter of all. Removing them costs one copy of the
        remaining keys and values; a step saves about three copies (growing the cache, repeating its heads, attention)
        of the removed ones.
        """
        if open.all():
            return
        self._select(open)
        used, row = self.row.unique(return_inverse=True)
        if 4 * len(used) <= 3 * self._rows():
            beams = torch.arange(self.num_beams, device=used.device)
            copies = rearrange(used[:, None] * self.num_beams + beams, "b w -> (b w)")
            self.cache.batch_select_indices(copies)
            self.keys = self.keys.map(lambda t: t[copies])
            self.row, self.owner = row, self.owner[used]
        self._assign_slots()

    def expand_beams(self, num_beams: int) -> None:
        """Repeat every row W times: its w-th copy holds beam w of all its questions."""
        self.num_beams = num_beams
        self.cache.batch_repeat_interleave(num_beams)
        self.keys = self.keys.map(lambda t: t.repeat_interleave(num_beams, dim=0))

    def reorder_beams(self, parent: Tensor) -> None:
        """Let beam w of question q continue beam `parent[q, w]`.

        Questions that share a row have different parents, so the cache is gathered column by column: each column
        belongs to one question.
        """
        beams = torch.arange(self.num_beams, device=parent.device)
        parents = beams.repeat(self.total + 1, 1)  # finished questions and, last, padding keep their beams
        parents[self.number] = parent
        source = rearrange(parents[self.owner], "b k w -> b w 1 k 1")
        layers: list[Any] = self.cache.layers
        for states in (states for layer in layers for states in (layer.keys, layer.values)):
            written = states[:, :, -source.shape[3] :].unflatten(0, (-1, self.num_beams))  # a view: [B, W, heads, K, D]
            written.copy_(written.gather(1, source.expand_as(written)))

    def _select(self, open: Tensor) -> None:
        for name in ("number", "row", "slot", "position", "document", "branch"):
            setattr(self, name, getattr(self, name)[open])

    def _new_tokens(self, ids: Tensor) -> Tokens:
        """Return the properties of the tokens `ids [Q, W]` in their slots, `[B * W, S]`."""
        return Tokens(
            document=self._place(self.document[:, None].expand_as(ids), PADDING),
            branch=self._place(self.branch[:, None].expand_as(ids), 0),
            block=ids.new_full((self._rows() * self.num_beams, self.slots), NONE),
            position=self._place(self.position[:, None].expand_as(ids), 0),
        )

    def _rows(self) -> int:
        return len(self.keys.document) // self.num_beams

    def _assign_slots(self) -> None:
        """Assign each row's open questions to its first slots."""
        self.slot = torch.arange(len(self), device=self.row.device) - torch.searchsorted(self.row, self.row)
        self.slots = int(self.slot.max()) + 1

    def _place(self, values: Tensor, fill: int) -> Tensor:
        """Move values from questions to their slots: `[Q, W] -> [B * W, S]`."""
        placed = values.new_full((self._rows(), self.slots, self.num_beams), fill)
        placed[self.row, self.slot] = values
        return rearrange(placed, "b s w -> (b w) s")


def last_prompt_tokens(batch: Batch) -> Tensor:
    """Return which tokens are the last of a prompt, `bool[B, T]`: no token of the same branch follows them."""
    is_prompt = (batch["role"] == PROMPT) & (batch["document"] != PADDING)
    follows = torch.zeros_like(is_prompt)
    same = (batch["document"][:, 1:] != PADDING) & (batch["position"][:, 1:] == batch["position"][:, :-1] + 1)
    follows[:, :-1] = same & (batch["branch"][:, 1:] == batch["branch"][:, :-1])
    return is_prompt & ~follows


def random_streams(decoding: GenerationSettings, keys: Sequence[int | str]) -> list[random.Random]:
    """Return a random number generator per question."""
    return [random.Random(f"{decoding.seed}-{key}") for key in keys]


def choose_tokens(log_probs: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Choose the next token of each question.

    Args:
        log_probs: float[Q, V].
        uniform: float64[Q], random numbers from 0 to 1; used if the temperature is not 0.
        temperature: as in `GenerationSettings`.

    Returns:
        The token, `int64[Q]`, and its log-probability, `float[Q]`.
    """
    if temperature == 0:
        chosen = log_probs.argmax(-1)
    else:  # the token at which the cumulative probability exceeds the random number
        cumulative = (log_probs / temperature).softmax(-1).double().cumsum(-1)
        chosen = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
        chosen = chosen.clamp(max=cumulative.shape[-1] - 1)
    return chosen, log_probs.gather(-1, chosen[:, None])[:, 0]


def _sample(
    questions: OpenQuestions, eos: list[int], decoding: GenerationSettings, keys: Sequence[int | str]
) -> list[Generated]:
    """Generate greedily, or by sampling at a temperature."""
    ends = torch.tensor(eos, device=questions.number.device)
    streams = random_streams(decoding, keys)

    def choose(log_probs: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        return choose_tokens(log_probs[:, 0], uniform, decoding.temperature)

    total = torch.zeros(len(questions), device=ends.device)
    written = torch.full((len(questions), decoding.max_new_tokens), -1, device=ends.device)
    for step in range(decoding.max_new_tokens):
        uniform = [streams[number].random() for number in questions.number.tolist()]
        chosen, log_prob = questions.choose(choose, torch.tensor(uniform, dtype=torch.float64, device=ends.device))
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


class FinishedBeams:
    """The best W finished beams of every question, ranked by log-probability / length ** length_penalty."""

    def __init__(self, questions: int, decoding: GenerationSettings) -> None:
        self.decoding = decoding
        self.beams: list[list[tuple[float, Generated]]] = [[] for _ in range(questions)]

    def add(self, number: Tensor, which: Tensor, scores: Tensor, written: Tensor, length: int) -> None:
        """Add the beams `written [Q, N, tokens]` that `which [Q, N]` selects.

        Args:
            number: int64[Q], the questions' indices.
            scores: float[Q, N], log-probabilities.
            length: tokens of each beam, EOS included.
        """
        numbers = number[which.nonzero()[:, 0]].tolist()
        for one, score, tokens in zip(numbers, scores[which].tolist(), written[which].tolist(), strict=True):
            self.beams[one].append((score / length**self.decoding.length_penalty, Generated(tokens, score)))
        for one in numbers:
            self.beams[one] = sorted(self.beams[one], key=lambda beam: -beam[0])[: self.decoding.num_beams]

    def is_open(self, number: int, best: float) -> bool:
        """Return whether a running beam with the length-penalised score `best` can still rank among the finished."""
        finished = self.beams[number]
        return len(finished) < self.decoding.num_beams or best >= finished[-1][0]


def _beam_search(questions: OpenQuestions, eos: list[int], decoding: GenerationSettings) -> list[list[Generated]]:
    """Search with W running and W finished beams per question, by transformers' rules (`early_stopping=False`).

    A question is finished when its best running beam, at its present length, is worse than its worst finished one.
    """
    width, device = decoding.num_beams, questions.number.device
    ends = torch.tensor(eos, device=device)
    running = torch.zeros(len(questions), 1, device=device)
    written = torch.full((len(questions), 1, 0), -1, device=device)
    finished = FinishedBeams(len(questions), decoding)

    def choose(log_probs: Tensor, running: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores, flat = rearrange(running[:, :, None] + log_probs, "q w v -> q (w v)").topk(2 * width)
        return scores, flat // log_probs.shape[-1], flat % log_probs.shape[-1]

    for length in range(1, decoding.max_new_tokens + 1):
        scores, parent, token = questions.choose(choose, running)
        is_end = torch.isin(token, ends)
        written = written.gather(1, parent[..., None].expand(-1, -1, length - 1))
        finished.add(
            questions.number, is_end & (torch.arange(2 * width, device=device) < width), scores, written, length
        )

        running, kept = scores.masked_fill(is_end, -1e9).topk(width)
        parent, token = parent.gather(1, kept), token.gather(1, kept)
        written = torch.cat([written.gather(1, kept[..., None].expand(-1, -1, length - 1)), token[..., None]], dim=-1)
        best = (running[:, 0] / length**decoding.length_penalty).tolist()
        candidates = zip(questions.number.tolist(), best, strict=True)
        open = torch.tensor([finished.is_open(number, score) for number, score in candidates], device=device)
        if length == decoding.max_new_tokens:  # unfinished beams compete as they are
            finished.add(questions.number, open[:, None].expand_as(running), running, written, length)
        if length == decoding.max_new_tokens or not open.any():
            break
        questions.keep(open)
        running, written, parent, token = running[open], written[open], parent[open], token[open]
        if length == 1:
            questions.expand_beams(width)
        else:
            questions.reorder_beams(parent)
        questions.step(token)
    return [[beam for _, beam in beams] for beams in finished.beams]
