"""The projector from the vision encoder's width to the language model's.

Legend: I images, N tokens per image, Dv vision width, D language width.
"""

from __future__ import annotations

from torch import Tensor, nn

from vlmvqa.errors import InputError, suggest

KINDS = ("linear", "mlp")


class Projector(nn.Module):
    """`float[I, N, Dv] -> float[I, N, D]`: one linear layer (LLaVA, PaliGemma), or two with a GELU (LLaVA-1.5)."""

    def __init__(self, vision_width: int, language_width: int, kind: str = "linear", dropout: float = 0.0) -> None:
        super().__init__()
        if kind not in KINDS:
            raise InputError(f"model.projector.kind={kind} is unknown; use one of {KINDS}{suggest(kind, KINDS)}")
        layers: list[nn.Module] = [nn.Linear(vision_width, language_width)]
        if kind == "mlp":
            layers += [nn.GELU(), nn.Linear(language_width, language_width)]
        self.layers = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Project image features."""
        projected: Tensor = self.dropout(self.layers(features))
        return projected
