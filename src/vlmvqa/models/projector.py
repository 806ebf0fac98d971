"""The projector from the vision encoder's features to embeddings of the language model.

Legend: I images, N tokens of an image in the features, M in the embeddings, Dv vision width, D language width.
"""

from __future__ import annotations

from torch import Tensor, nn

from vlmvqa.errors import InputError
from vlmvqa.models.vision import FeatureShape

LAYERS = ("linear", "mlp", "normed")  # further kinds: extras/vision/projectors.py


def projection(kind: str, vision_width: int, width: int) -> nn.Sequential:
    """Return one linear layer (LLaVA, PaliGemma), two with a GELU (LLaVA-1.5), or a LayerNorm and one (InternVL)."""
    if kind not in LAYERS:
        raise InputError(f"model.projector.options.layers={kind} is unknown; use one of {', '.join(LAYERS)}")
    if kind == "mlp":
        return nn.Sequential(nn.Linear(vision_width, width), nn.GELU(), nn.Linear(width, width))
    norm = [nn.LayerNorm(vision_width)] if kind == "normed" else []
    return nn.Sequential(*norm, nn.Linear(vision_width, width))


class Projector(nn.Module):
    """`float[I, N, Dv] -> float[I, M, D]`: one projection of each token, so M = N.

    Attributes:
        output: the shape of the embeddings, which defines the tokens of an image in a row.
        layers: the projection, one of `LAYERS`.
    """

    def __init__(self, features: FeatureShape, width: int, layers: str = "linear", dropout: float = 0.0) -> None:
        super().__init__()
        self.output = features._replace(width=width)
        self.layers = projection(layers, features.width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Project image features."""
        projected: Tensor = self.dropout(self.layers(features))
        return projected

    def matrices(self) -> list[tuple[nn.Module, int]]:
        """Return the layers in order, each with the number of tokens that it computes: for counting operations."""
        return [(layer, self.output.tokens) for layer in self.layers]
