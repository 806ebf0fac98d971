"""Encoders other than timm's plain vision transformers: chosen layers, other backbones, and several encoders fused.

Legend: I images, N tokens of an image, H height and width, Dv width, K encoders.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vlmvqa.errors import InputError
from vlmvqa.models.vision import FeatureShape, VisionEncoder, VisionSettings


class LayerEncoder(VisionEncoder):
    """The features of chosen layers of a timm model, concatenated by channel: `float[I, 3, H, H] -> float[I, N, Dv]`.

    Works for every model with timm's `forward_intermediates`: transformers, and convolutional or hierarchical
    backbones, whose layers are their stages. Later layers are removed, since they would never get a gradient.

    Args:
        encoder: a timm model without a head.
        settings: the layers, in any order (features are concatenated from the first to the last), the class token, and
            whether the final norm is applied to each.

    Raises:
        InputError: the model lacks a property that is needed, or has fewer layers.
    """

    def __init__(self, encoder: Any, settings: VisionSettings) -> None:
        nn.Module.__init__(self)  # the shape of the features is measured instead
        _check(encoder, settings)
        layers = [settings.layers] if isinstance(settings.layers, int) else list(settings.layers)
        if not all(isinstance(layer, int) for layer in layers) or not layers:
            raise InputError(f"model.vision.layers={settings.layers} must be the number of a layer, or a list of them")
        try:
            kept = encoder.prune_intermediate_layers(layers, prune_norm=not settings.norm, prune_head=True)
        except AssertionError as error:
            raise InputError(f"model.vision.layers={settings.layers}: {settings.name}: {error}") from error
        if hasattr(encoder, "head"):
            encoder.head = nn.Identity()
        options = inspect.signature(encoder.forward_intermediates).parameters
        has_class_token = getattr(encoder, "cls_token", None) is not None and "return_prefix_tokens" in options
        self.num_class_tokens = int(settings.class_token and has_class_token)
        prefix = {"return_prefix_tokens": True} if self.num_class_tokens else {}
        # As the encoder's own forward pass, which is called as a module, so that ZeRO-3's hooks run.
        encoder.forward = partial(
            encoder.forward_intermediates, indices=kept, norm=settings.norm, intermediates_only=True, **prefix
        )
        self.encoder, self.image_size = encoder, settings.image_size
        self.layers, self.norm = kept, settings.norm
        self.features = self._measure(settings)

    def forward(self, pixel_values: Tensor, image_mask: Tensor | None = None) -> Tensor:
        """Encode images; see `VisionEncoder.forward`."""
        features = []
        for layer in self.encoder(pixel_values, **self.masking(image_mask)):
            grid, prefix = layer if self.num_class_tokens else (layer, None)
            patches = rearrange(grid, "i d h w -> i (h w) d")
            features.append(patches if prefix is None else torch.cat([prefix[:, :1], patches], dim=1))
        return torch.cat(features, dim=-1)

    @torch.no_grad()
    def _measure(self, settings: VisionSettings) -> FeatureShape:
        """Return the shape of the features, from those of one image."""
        parameter = next(self.encoder.parameters())
        pixels = torch.zeros(1, 3, self.image_size, self.image_size, dtype=parameter.dtype, device=parameter.device)
        self.eval()
        try:
            layers = [layer[0] if self.num_class_tokens else layer for layer in self.encoder(pixels)]
        except AssertionError as error:
            raise InputError(f"model.vision.name={settings.name}: {error}; try model.vision.norm=false") from error
        self.train()
        grids = {tuple(layer.shape[2:]) for layer in layers}
        if len(grids) > 1:
            raise InputError(
                f"model.vision.layers={settings.layers}: these layers of {settings.name} have grids of different sizes "
                f"({', '.join(f'{rows} x {columns}' for rows, columns in sorted(grids))}); choose layers of one size"
            )
        ((rows, columns),) = grids
        width = sum(layer.shape[1] for layer in layers)
        return FeatureShape(width, self.num_class_tokens + rows * columns, (rows, columns))

    def extra_repr(self) -> str:
        """Return the settings of the features, by which a cache of features is recognised."""
        return f"layers={self.layers}, norm={self.norm}"

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of all stages."""
        return _blocks(self.encoder)

    @property
    def final_norms(self) -> list[nn.Module]:
        """The norm after the last block, where the model has one."""
        return [self.encoder.norm] if hasattr(self.encoder, "norm") else []


class FusedEncoder(VisionEncoder):
    """The patches of K encoders, concatenated by channel (Prismatic): `float[I, 3 * K, H, H] -> float[I, N, Dv]`.

    Each encoder reads its 3 channels, which are normalised for it, at its own image size (the upper left part).
    Features on another grid than the first encoder's are resampled to it bilinearly.
    """

    def __init__(self, encoders: Sequence[VisionEncoder]) -> None:
        nn.Module.__init__(self)
        self.encoder = nn.ModuleList(encoders)
        self.image_size = max(one.image_size for one in encoders)
        self.num_class_tokens = 0
        rows, columns = encoders[0].patch_grid
        self.features = FeatureShape(sum(one.features.width for one in encoders), rows * columns, (rows, columns))

    def forward(self, pixel_values: Tensor, image_mask: Tensor | None = None) -> Tensor:
        """Encode images; a mask is refused before (`letterbox.check`)."""
        features = []
        for number, encoder in enumerate(self.towers):
            size = encoder.image_size
            found = encoder(pixel_values[:, 3 * number : 3 * number + 3, :size, :size])
            features.append(
                found if encoder.patch_grid == self.patch_grid else self._resampled(found, encoder.patch_grid)
            )
        return torch.cat(features, dim=-1)

    def _resampled(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        image = rearrange(features, "i (h w) d -> i d h w", h=grid[0])
        return rearrange(F.interpolate(image, self.patch_grid, mode="bilinear"), "i d h w -> i (h w) d")

    @property
    def towers(self) -> list[VisionEncoder]:
        """The encoders."""
        return list(self.encoder)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of all encoders, alternating from the last, so that the last n are the last of each."""
        reversed_blocks = [one.blocks[::-1] for one in self.towers]
        longest = max(map(len, reversed_blocks))
        return [blocks[n] for n in range(longest) for blocks in reversed_blocks if n < len(blocks)][::-1]

    @property
    def final_norms(self) -> list[nn.Module]:
        """The norms after the last blocks."""
        return [norm for one in self.towers for norm in one.final_norms]

    def checkpoint_activations(self) -> None:
        """Recompute block activations in the backward pass."""
        for encoder in self.towers:
            encoder.checkpoint_activations()


def _check(encoder: Any, settings: VisionSettings) -> None:
    """Raise an InputError that names the property that a timm model lacks."""
    if not hasattr(encoder, "forward_intermediates"):
        reason = "timm returns no features of its layers (forward_intermediates)"
    elif settings.norm and not isinstance(getattr(encoder, "norm", None), nn.Module):
        reason = "timm applies its final norm in its head only; set model.vision.norm=false"
    elif not _blocks(encoder):
        reason = "it has no blocks, the units of sharding and activation checkpointing"
    else:
        return
    raise InputError(f"model.vision.name={settings.name} cannot be used: {reason}; or choose a vision transformer")


def _blocks(encoder: nn.Module) -> list[nn.Module]:
    """Return the children of every submodule that timm names `blocks`, in order."""
    lists = (module for name, module in encoder.named_modules() if name.rpartition(".")[2] == "blocks")
    return [block for blocks in lists for block in blocks.children()]
