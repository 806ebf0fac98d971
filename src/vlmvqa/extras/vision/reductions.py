"""Projectors that merge squares of patches into one token each; the class token is dropped.

Legend: I images, N tokens of an image in the features, M in the embeddings, S patches of a square, Dv vision width,
D language width.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from vlmvqa.errors import InputError
from vlmvqa.models.projector import Projector
from vlmvqa.models.vision import FeatureShape


class PixelShuffle(Projector):
    """The patches of a square become the channels of one token (InternVL, Idefics3): no feature is lost.

    Args:
        factor: patches on each side of a square.
        layers: the projection of a merged token, one of `projector.LAYERS`.

    Raises:
        InputError: the features form no grid, or one that the factor does not divide.
    """

    def __init__(
        self, features: FeatureShape, width: int, dropout: float = 0.0, factor: int = 2, layers: str = "linear"
    ) -> None:
        super().__init__(merged(features, factor, channels=factor**2 * features.width), width, layers, dropout)
        self.factor = factor

    def forward(self, features: Tensor) -> Tensor:
        """Project image features."""
        return super().forward(rearrange(squares(features, self.output, self.factor), "i m s d -> i m (s d)"))


class AveragePool(Projector):
    """The mean of the patches of a square becomes one token; arguments and errors as for `PixelShuffle`."""

    def __init__(
        self, features: FeatureShape, width: int, dropout: float = 0.0, factor: int = 2, layers: str = "linear"
    ) -> None:
        super().__init__(merged(features, factor, channels=features.width), width, layers, dropout)
        self.factor = factor

    def forward(self, features: Tensor) -> Tensor:
        """Project image features."""
        return super().forward(squares(features, self.output, self.factor).mean(2))


def merged(features: FeatureShape, factor: int, channels: int) -> FeatureShape:
    """Return the shape after merging `factor` x `factor` patches into tokens with so many channels."""
    if features.grid is None or factor < 1 or any(side % factor for side in features.grid):
        grid = "unordered" if features.grid is None else " x ".join(map(str, features.grid))
        raise InputError(
            f"model.projector.options.factor={factor} does not divide the {grid} patches of an image; use another "
            "factor, or another model.vision.image_size"
        )
    rows, columns = (side // factor for side in features.grid)
    return FeatureShape(channels, rows * columns, (rows, columns))


def squares(features: Tensor, output: FeatureShape, factor: int) -> Tensor:
    """Return the patches of each square, row by row: `float[I, N, Dv] -> float[I, M, S, Dv]`."""
    assert output.grid is not None
    rows, columns = output.grid
    patches = features[:, -output.tokens * factor**2 :]  # without class token
    pattern = "i (h a w b) d -> i (h w) (a b) d"
    return rearrange(patches, pattern, h=rows, w=columns, a=factor, b=factor)
