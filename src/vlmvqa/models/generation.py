"""Answers: the same rows and the same predicate, with a KV cache.

Image and questions are read once (prefill); then one step adds one token to every open question. The cache holds
columns in the order they were computed, whichever branch they belong to: who sees whom is still the predicate's
word, so a batch equals its questions asked one at a time.

Legend: B rows, S slots (questions a row), Q questions in all, W beams, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from vlmvqa.errors import InputError
from vlmvqa.models.vlm import VLM, Batch
from vlmvqa.sequence.masks import Tokens
from vlmvqa.sequence.rows import ANSWER, PADDING, PROMPT


@dataclass(frozen=True)
class Decoding:
    """How answers are written.

    Attributes:
        max_new_tokens: tokens an answer, at most (EOS counts).
        beams: 1 for greedy decoding or sampling, more for beam search.
        temperature: 0 for the most probable token, above for sampling (one beam).
        length_penalty: beam search divides a log-probability by length ** length_penalty (transformers' rule).
        seed: of the sampling.
    """

    max_new_tokens: int = 20
    beams: int = 1
    temperature: float = 0.0
    length_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.beams < 1 or self.temperature < 0:
            raise InputError("decoding: max_new_tokens and beams must be at least 1, temperature at least 0")
        if self.beams > 1 and self.temperature > 0:
            raise InputError("decoding: beam search does not sample; set decoding.temperature=0 or decoding.beams=1")


@dataclass(frozen=True)
class Generated:
    """Answer token ids without EOS, and their log-probability, EOS included."""

    tokens: list[int]
    log_probability: float


@torch.no_grad()
def generate(model: VLM, batch: Batch, eos: Collection[int], decoding: Decoding) -> list[Generated]:
    """Answer every question of a batch of rows without answers, in row order.

    Args:
        batch: as the loss takes it, from questions without answers.
        eos: token ids that end an answer.
    """
    training, attention = model.training, model.language.attention
    model.eval()
    model.language.set_attention("dense")  # one query a branch is no case for FlexAttention
    try:
        questions = OpenQuestions(model, batch)
        search = _beam_search if decoding.beams > 1 else _one_by_one
        return search(questions, sorted(eos), decoding)
    finally:
        model.train(training)
        model.language.set_attention(attention)


class OpenQuestions:
    """The questions of a batch while they are answered.

    `first` is the log-probability of each question's first answer token, `float32[Q, V]`. Question q sits in
    slot `slot[q]` of row `row[q]`; every step fills all slots, those that are empty or closed with padding.
    """

    def __init__(self, model: VLM, batch: Batch) -> None:
        self.model = model
        # `DynamicCache(config=...)` would let Gemma 2's local layers forget by index, not by position.
        self.cache = DynamicCache()
        self.keys = model.tokens(batch)
        hidden = model.decode(batch, self.cache)
        last = _last_prompt_tokens(batch)
        self.row, column = last.nonzero(as_tuple=True)
        self.slot = (last.cumsum(1) - 1)[self.row, column]
        self.slots = int(last.sum(1).max())
        self.first = model.language.logits(hidden[self.row, column]).log_softmax(-1)
        self.document = batch["document"][self.row, column]
        self.branch = batch["branch"][self.row, column]
        self.position = batch["position"][self.row, column]
        self.beams = 1

    def __len__(self) -> int:
        return len(self.row)

    def step(self, ids: Tensor, open: Tensor) -> Tensor:
        """Add a token to each open question and predict the next.

        Args:
            ids: int64[Q, W]; open: bool[Q, W] (a closed question's token is ignored).

        Returns:
            log-probabilities `float32[Q, W, V]`
        """
        self.position = self.position + 1
        tokens = Tokens.of(
            document=self._place(torch.where(open, self.document[:, None], PADDING), PADDING),
            branch=self._place(self.branch[:, None].expand_as(ids), 0),
            role=torch.full((len(self.keys.document), self.slots), ANSWER, device=ids.device),
            position=self._place(self.position[:, None].expand_as(ids), 0),
            mode=self.model.mode,
        )
        self.keys = self.keys.append(tokens)
        embeddings = self.model.language.embed(self._place(ids, 0))
        hidden = self.model.language(embeddings, tokens, self.keys, self.cache)
        hidden = hidden.unflatten(0, (-1, self.beams))[self.row, :, self.slot]
        return self.model.language.logits(hidden).log_softmax(-1)

    def branch_out(self, beams: int) -> None:
        """Repeat every row W times: beam w of all its questions lives in its w-th copy."""
        self.beams = beams
        self.cache.batch_repeat_interleave(beams)
        self.keys = self.keys.map(lambda t: t.repeat_interleave(beams, dim=0))

    def reorder(self, parent: Tensor, steps: int) -> None:
        """Let beam w of question q go on from what beam `parent[q, w]` wrote in the last `steps` steps.

        Questions of a row choose their parents apart from each other, so the cache is gathered column by column:
        a column belongs to one slot.
        """
        rows = len(self.keys.document) // self.beams
        source = torch.arange(self.beams, device=parent.device).expand(rows, self.slots, self.beams).clone()
        source[self.row, self.slot] = parent
        source = source.transpose(1, 2).repeat(1, 1, steps)  # [B, W, steps * S]

        def gather(states: Tensor) -> Tensor:  # [B * W, heads, K, Dh]
            states = states.clone()
            written = states[:, :, -source.shape[-1] :].unflatten(0, (rows, self.beams))
            index = source[:, :, None, :, None].expand_as(written)
            states[:, :, -source.shape[-1] :] = written.gather(1, index).flatten(0, 1)
            return states

        layers: list[Any] = self.cache.layers
        for layer in layers:
            layer.keys, layer.values = gather(layer.keys), gather(layer.values)

    def _place(self, values: Tensor, fill: int) -> Tensor:
        """`[Q, W] -> [B * W, S]`: from questions to their slots."""
        rows = len(self.keys.document) // self.beams
        placed = torch.full((rows, self.beams, self.slots), fill, device=values.device)
        placed[self.row, :, self.slot] = values
        return placed.flatten(0, 1)


def _last_prompt_tokens(batch: Batch) -> Tensor:
    """`bool[B, T]`: the prompt tokens that no token of the same branch follows."""
    is_prompt = (batch["role"] == PROMPT) & (batch["document"] != PADDING)
    follows = torch.zeros_like(is_prompt)
    same = is_prompt[:, 1:] & (batch["position"][:, 1:] == batch["position"][:, :-1] + 1)
    follows[:, :-1] = same & (batch["branch"][:, 1:] == batch["branch"][:, :-1])
    return is_prompt & ~follows


def _one_by_one(questions: OpenQuestions, eos: list[int], decoding: Decoding) -> list[Generated]:
    """Greedy decoding, or sampling at a temperature."""
    ends = torch.tensor(eos, device=questions.first.device)
    generator = torch.Generator(questions.first.device).manual_seed(decoding.seed)
    log_probs = questions.first
    open = torch.ones(len(questions), dtype=torch.bool, device=log_probs.device)
    total = torch.zeros(len(questions), device=log_probs.device)
    written: list[Tensor] = []
    for step in range(decoding.max_new_tokens):
        if decoding.temperature == 0:
            chosen = log_probs.argmax(-1)
        else:
            chosen = torch.multinomial((log_probs / decoding.temperature).softmax(-1), 1, generator=generator)[:, 0]
        total += torch.where(open, log_probs.gather(-1, chosen[:, None])[:, 0], 0)
        open = open & ~torch.isin(chosen, ends)
        written.append(torch.where(open, chosen, -1))
        if step + 1 == decoding.max_new_tokens or not open.any():
            break
        log_probs = questions.step(chosen[:, None], open[:, None])[:, 0]
    tokens = torch.stack(written, dim=1).tolist()
    return [
        Generated([token for token in answer if token >= 0], score)
        for answer, score in zip(tokens, total.tolist(), strict=True)
    ]


def _beam_search(questions: OpenQuestions, eos: list[int], decoding: Decoding) -> list[Generated]:
    """Beam search with transformers' rules (`early_stopping=False`): W running and W finished beams a question.

    A finished beam scores its log-probability / length ** length_penalty, EOS counted. A question is done when
    its best running beam, at its present length, no longer beats its worst finished one.
    """
    width, count = decoding.beams, len(questions)
    device, vocabulary = questions.first.device, questions.first.shape[-1]
    ends = torch.tensor(eos, device=device)
    questions.branch_out(width)
    log_probs = questions.first[:, None].expand(-1, width, -1)
    running = torch.tensor([0.0] + [-1e9] * (width - 1), device=device).repeat(count, 1)
    written = torch.full((count, width, 0), -1, device=device)
    finished: list[list[tuple[float, float, list[int]]]] = [[] for _ in range(count)]
    done = [False] * count

    for step in range(decoding.max_new_tokens):
        length = step + 1
        scores, flat = (running[:, :, None] + log_probs).flatten(1).topk(2 * width)
        parent, token = flat // vocabulary, flat % vocabulary
        is_end = torch.isin(token, ends)
        for q in range(count):
            for rank in range(width):
                if not done[q] and is_end[q, rank]:
                    score, beam = scores[q, rank].item(), written[q, parent[q, rank]].tolist()
                    finished[q].append((score / length**decoding.length_penalty, score, beam))
            finished[q] = sorted(finished[q], key=lambda beam: -beam[0])[:width]

        running, kept = scores.masked_fill(is_end, -1e9).topk(width)
        parent, token = parent.gather(1, kept), token.gather(1, kept)
        written = torch.cat([written.gather(1, parent[..., None].expand(-1, -1, step)), token[..., None]], dim=-1)
        best = (running[:, 0] / length**decoding.length_penalty).tolist()
        done = [d or (len(f) == width and b < f[-1][0]) for d, f, b in zip(done, finished, best, strict=True)]
        if all(done) or length == decoding.max_new_tokens:
            break
        if step:
            questions.reorder(parent, step)
        open = ~torch.tensor(done, device=device)[:, None].expand(-1, width)
        log_probs = questions.step(token, open)

    answers = []
    for q in range(count):
        if not done[q]:  # out of tokens: unfinished beams compete as they are
            for w in range(width):
                score = running[q, w].item()
                finished[q].append((score / length**decoding.length_penalty, score, written[q, w].tolist()))
        _, score, tokens = max(finished[q], key=lambda beam: beam[0])
        answers.append(Generated(tokens, score))
    return answers
