"""Tiles: a large image as a grid of encoder inputs, and the resized image itself as the last one (`data.tiles`).

    1344 x 672, an encoder of 336 pixels       0 1 2 3
                                               4 5 6 7       and 8, the thumbnail

As in LLaVA-NeXT (Liu et al. 2024), InternVL 1.5 (Chen et al. 2024) and Idefics2 (Laurençon et al. 2024), which allow
different grids; here no tile is upscaled. The thumbnail comes last, as in the latter two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vlmvqa.config.compose import build_settings
from vlmvqa.data.images import INTERPOLATIONS, ImageSettings
from vlmvqa.errors import InputError


@dataclass(frozen=True)
class TileSettings:
    """The group `data.tiles`.

    Attributes:
        max: limit on the tiles of an image, without the thumbnail.
        tile_attention: the bidirectional blocks of an image: "image", all its tiles together, or "tile", each tile,
            which sees the tiles before it.
    """

    max: int = 9
    tile_attention: str = "image"

    def __post_init__(self) -> None:
        if type(self.max) is not int or self.max < 1:
            raise InputError(f"data.tiles.max={self.max} must be a whole number, 1 or more")
        if self.tile_attention not in ("image", "tile"):
            raise InputError(f"data.tiles.tile_attention={self.tile_attention} is unknown; use image or tile")

    @property
    def inputs(self) -> int:
        """The most inputs of the encoder per image, thumbnail included."""
        return self.max + (self.max > 1)


def tile_settings(values: Mapping[str, Any]) -> TileSettings:
    """Return the group `data.tiles`; raise an InputError for unknown keys or values."""
    return build_settings(TileSettings, values, "data.tiles")


def check(settings: ImageSettings) -> None:
    """Raise an InputError if the settings of images and tiles contradict each other."""
    assert settings.tiles is not None
    tile_settings(settings.tiles)
    if settings.resize != "squash" or settings.reduced:
        raise InputError("data.tiles cuts images at full scale; leave data.resize and data.reduced_decoding out")


def choose_grid(width: int, height: int, size: int, most: int) -> tuple[int, int]:
    """Return the columns and rows of the grid for an image.

    Of the grids of at most `most` tiles that upscale no tile, it is the one that shrinks the image least, where both
    sides shrink by one factor (LLaVA-NeXT's rule): its aspect ratio is near the image's. Of several, that with the
    fewest tiles. An image with a side shorter than a tile is one tile.

    Args:
        size: side of a tile in pixels.
        most: limit on the tiles, without the thumbnail.
    """
    grids = [
        (columns, rows)
        for columns in range(1, min(most, width // size) + 1)
        for rows in range(1, min(most // columns, height // size) + 1)
    ]
    # columns * size / width and rows * size / height are the factors by which the sides shrink.
    return max(grids, default=(1, 1), key=lambda grid: (min(grid[0] * height, grid[1] * width), -grid[0] * grid[1]))


def cut(image: Image.Image, settings: ImageSettings) -> list[Image.Image]:
    """Return the tiles of an RGB image row by row, then the image; only the image if it is one tile."""
    columns, rows = _grid(*image.size, settings)
    if columns * rows == 1:
        return [image]
    size = settings.side
    resized = image.resize((columns * size, rows * size), INTERPOLATIONS[settings.interpolation])
    corners = ((column * size, row * size) for row in range(rows) for column in range(columns))
    return [*(resized.crop((left, top, left + size, top + size)) for left, top in corners), image]


def count_tiles(width: int, height: int, settings: ImageSettings) -> int:
    """Return the number of tiles of an image, the thumbnail included."""
    columns, rows = _grid(width, height, settings)
    return columns * rows + (columns * rows > 1)


def _grid(width: int, height: int, settings: ImageSettings) -> tuple[int, int]:
    assert settings.tiles is not None
    return choose_grid(width, height, settings.side, tile_settings(settings.tiles).max)
