"""The vision encoder: a timm vision transformer that returns patch features.

Legend: I images, N tokens an image, H height and width, Dv width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
    """

    name: str = "vit_base_patch14_dinov2.lvd142m"
    image_size: int = 224
    weights: str = "hub"
    overrides: Mapping[str, Any] = field(default_factory=dict)


class VisionEncoder(nn.Module):
    """`float[I, 3, H, H] -> float[I, N, Dv]`: the class token, if the transformer has one, then the patches.

    Register tokens are dropped: they store global information, not the content of a patch.
    `vit_base_patch14_dinov2.lvd142m` at 224 gives N = 1 + 16 * 16 = 257 tokens of width 768.

    Args:
        encoder: a timm vision transformer without a head (`build.build_vision_encoder`).
        image_size: H.
    """

    def __init__(self, encoder: Any, image_size: int) -> None:  # timm's classes share no type
        super().__init__()
        self.encoder = encoder
        self.image_size = image_size
        self.width: int = encoder.embed_dim
        self.patch_grid: tuple[int, int] = encoder.patch_embed.grid_size
        self.num_image_tokens: int = int(encoder.has_class_token) + encoder.patch_embed.num_patches

    def forward(self, pixel_values: Tensor, image_mask: Tensor | None = None) -> Tensor:
        """Encode images; `image_mask bool[I, N]` marks the tokens that others attend to (None: all)."""
        prefix = self.encoder.num_prefix_tokens  # class token, then registers, then patches
        options = {}
        if image_mask is not None:
            patches = image_mask[:, -self.encoder.patch_embed.num_patches :]
            options["attn_mask"] = F.pad(patches, (prefix, 0), value=True)[:, None, None]
        features: Tensor = self.encoder(pixel_values, **options)  # called as a module, so that ZeRO-3's hooks run
        class_token = features[:, : int(self.encoder.has_class_token)]
        return torch.cat([class_token, features[:, prefix:]], dim=1)

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks."""
        return list(self.encoder.blocks)

    @property
    def final_norm(self) -> nn.Module:
        """The norm after the last block."""
        norm: nn.Module = self.encoder.norm
        return norm

    @property
    def data_config(self) -> dict[str, Any]:
        """timm's mean, std and interpolation for these weights."""
        config: dict[str, Any] = timm.data.resolve_data_config(model=self.encoder)
        return config

    def checkpoint_activations(self) -> None:
        """Recompute block activations in the backward pass (timm's implementation, non-reentrant)."""
        self.encoder.set_grad_checkpointing(True)
