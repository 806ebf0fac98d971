"""Projectors that merge neighbouring patches into one token; the class token is dropped.

Legend: I images, N tokens of an image in the features, M in the embeddings, Dv vision width, D language width.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vlmvqa.errors import InputError
from vlmvqa.models.projector import Projector
from vlmvqa.models.vision import FeatureShape


class Reduction(Projector):
    """Base class: a grid of patches is reduced by `factor` on each side, and its tokens projected.

    Args:
        factor: patches merged on each side.
        layers: the projection, one of `projector.LAYERS`.

    Raises:
        InputError: the features form no grid, or one that the factor does not divide.
    """

    def __init__(
        self, features: FeatureShape, width: int, dropout: float = 0.0, factor: int = 2, layers: str = "linear"
    ) -> None:
        grid = "unordered" if features.grid is None else " x ".join(map(str, features.grid))
        if features.grid is None or factor < 1 or any(side % factor for side in features.grid):
            raise InputError(
                f"model.projector.options.factor={factor} does not divide the {grid} patches of an image; use another "
                "factor, or another model.vision.image_size"
            )
        rows, columns = (side // factor for side in features.grid)
        channels = features.width * self.channels(factor)
        super().__init__(FeatureShape(channels, rows * columns, (rows, columns)), width, layers, dropout)
        self.grid, self.factor = features.grid, factor

    @staticmethod
    def channels(factor: int) -> int:
        """Return how many times wider a merged token is."""
        return 1

    def merge(self, patches: Tensor) -> Tensor:
        """Merge patches, `float[I, h * w, Dv] -> float[I, M, channels]`."""
        raise NotImplementedError

    def forward(self, features: Tensor) -> Tensor:
        """Project image features."""
        patches = features[:, features.shape[1] - self.grid[0] * self.grid[1] :]  # without class token
        return super().forward(self.merge(patches))


class PixelShuffle(Reduction):
    """`factor` x `factor` patches become the channels of one token (InternVL, Idefics3): no feature is lost."""

    @staticmethod
    def channels(factor: int) -> int:
        """Return the number of merged patches."""
        return factor**2

    def merge(self, patches: Tensor) -> Tensor:
        """Move patches to channels."""
        rows, columns = (side // self.factor for side in self.grid)
        pattern = "i (h a w b) d -> i (h w) (a b d)"
        return rearrange(patches, pattern, h=rows, w=columns, a=self.factor, b=self.factor)


class AveragePool(Reduction):
    """The mean of `factor` x `factor` patches (LLaVA-OneVision pools bilinearly, Honeybee adaptively)."""

    def merge(self, patches: Tensor) -> Tensor:
        """Average patches."""
        image = rearrange(patches, "i (h w) d -> i d h w", h=self.grid[0])
        return rearrange(F.avg_pool2d(image, self.factor), "i d h w -> i (h w) d")
