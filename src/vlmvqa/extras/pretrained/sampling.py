"""Greedy decoding and sampling inside transformers' `generate`, by this project's rules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from vlmvqa.models.generation import choose_tokens, random_streams
from vlmvqa.models.interface import GenerationSettings


class SamplingProcessor(LogitsProcessor):  # type: ignore[misc] # transformers is not analysed
    """Chooses each row's next token as `generation.choose_tokens` does, and sums the log-probabilities."""

    def __init__(
        self, decoding: GenerationSettings, eos: list[int], keys: Sequence[int | str], device: torch.device
    ) -> None:
        self.decoding, self.streams = decoding, random_streams(decoding, keys)
        self.ends = torch.tensor(eos, device=device)
        self.total = torch.zeros(len(keys), device=device)
        self.open = torch.ones(len(keys), dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Set the scores of all tokens but the chosen one to minus infinity."""
        uniform = torch.tensor([stream.random() for stream in self.streams], dtype=torch.float64, device=scores.device)
        chosen, log_prob = choose_tokens(scores.float().log_softmax(-1), uniform, self.decoding.temperature)
        self.total += log_prob * self.open
        self.open &= ~torch.isin(chosen, self.ends)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)
