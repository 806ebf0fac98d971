"""The vision encoder: a timm vision transformer that returns patch features.

Legend: I images, N tokens an image, H height and width, Dv width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class VisionSettings:
    """Settings of the vision encoder.

    Attributes:
        name: timm's model name, with its pretrained tag.
        image_size: side of the input in pixels; timm interpolates the position embedding from its training size.
        weights: "hub", "random", or the path of a local weights file.
        overrides: constructor arguments of timm's model, such as a smaller width; for random weights only.
        layers: the block whose output is used (-1: the last), or a list of blocks, concatenated by channel.
        class_token: whether the class token, if the encoder has one, precedes the patches.
        norm: whether the encoder's final norm is applied.
        fused: further encoders, whose patches are concatenated by channel (Prismatic); class tokens are then dropped.
    """

    name: str = "vit_base_patch14_dinov2.lvd142m"
    image_size: int = 224
    weights: str = "hub"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    layers: int | Sequence[int] = -1
    class_token: bool = True
    norm: bool = True
    fused: tuple[VisionSettings, ...] = ()


class FeatureShape(NamedTuple):
    """Shape of the features of an image.

    Attributes:
        width: channels of a token.
        tokens: number of tokens.
        grid: rows and columns of the last tokens, after a class token; None if they form no grid.
    """

    width: int
    tokens: int
    grid: tuple[int, int] | None


class VisionEncoder(nn.Module):
    """`float[I, 3, H, H] -> float[I, N, Dv]`: the class token, if the transformer has one, then the patches.

    Register tokens are dropped: they store global information, not the content of a patch.
    `vit_base_patch14_dinov2.lvd142m` at 224 gives N = 1 + 16 * 16 = 257 tokens of width 768.

    Args:
        encoder: a timm vision transformer without a head (`build.build_vision_encoder`).
        image_size: H.
        class_token: whether to keep the class token.

    Attributes:
        features: the shape of the output.
    """

    def __init__(self, encoder: Any, image_size: int, class_token: bool = True) -> None:  # timm's classes share no type
        super().__init__()
        self.encoder = encoder
        self.image_size = image_size
        self.num_class_tokens = int(class_token and encoder.cls_token is not None)
        tokens = self.num_class_tokens + encoder.patch_embed.num_patches
        self.features = FeatureShape(encoder.embed_dim, tokens, encoder.patch_embed.grid_size)

    def forward(self, pixel_values: Tensor, image_mask: Tensor | None = None) -> Tensor:
        """Encode images; `image_mask bool[I, N]` marks the tokens that others attend to (None: all)."""
        features: Tensor = self.encoder(pixel_values, **self.masking(image_mask))  # a module call: ZeRO-3's hooks run
        prefix = self.encoder.num_prefix_tokens  # class token, then registers, then patches
        return torch.cat([features[:, : self.num_class_tokens], features[:, prefix:]], dim=1)

    def masking(self, image_mask: Tensor | None) -> dict[str, Tensor]:
        """Return the arguments with which timm's model attends to some tokens of each image only."""
        if image_mask is None:
            return {}
        patches = image_mask[:, -self.patch_grid[0] * self.patch_grid[1] :]
        return {"attn_mask": F.pad(patches, (self.encoder.num_prefix_tokens, 0), value=True)[:, None, None]}

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks."""
        return list(self.encoder.blocks)

    @property
    def final_norms(self) -> list[nn.Module]:
        """The norm after the last block."""
        return [self.encoder.norm]

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        assert self.features.grid is not None
        return self.features.grid

    @property
    def towers(self) -> list[VisionEncoder]:
        """The encoders whose features are concatenated: this one."""
        return [self]

    @property
    def data_config(self) -> dict[str, Any]:
        """timm's mean, std and interpolation for these weights."""
        config: dict[str, Any] = timm.data.resolve_data_config(model=self.encoder)
        return config

    def checkpoint_activations(self) -> None:
        """Recompute block activations in the backward pass (timm's implementation, non-reentrant)."""
        self.encoder.set_grad_checkpointing(True)
