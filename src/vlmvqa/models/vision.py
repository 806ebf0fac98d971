"""The vision encoder: any timm vision transformer, read out as patch features.

Legend: I images, N tokens an image, H height and width, Dv width.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import VisionTransformer
from torch import Tensor, nn

from vlmvqa.errors import InputError, suggest
from vlmvqa.hub import hub_or_cache, unread


@dataclass(frozen=True)
class VisionSettings:
    """Which vision transformer, and how much of it trains.

    Attributes:
        name: timm's model name, with its pretrained tag.
        image_size: pixels a side; timm interpolates the position embedding from the size of its training.
        weights: "hub", "random", or the path of a local weights file.
        overrides: constructor arguments of timm's model (a smaller width, say); random weights only.
    """

    name: str = "vit_base_patch14_dinov2.lvd142m"
    image_size: int = 224
    weights: str = "hub"
    overrides: Mapping[str, Any] = field(default_factory=dict)


class VisionEncoder(nn.Module):
    """`float[I, 3, H, H] -> float[I, N, Dv]`: the class token, where there is one, then the patches.

    Register tokens are dropped: they hold what the encoder put aside, not what stands at a place.
    `vit_base_patch14_dinov2.lvd142m` at 224 gives N = 1 + 16 * 16 = 257 tokens of width 768.
    """

    def __init__(self, settings: VisionSettings) -> None:
        super().__init__()
        self.encoder: Any = _create(settings)  # timm's classes share no type
        self.image_size = settings.image_size
        self.width: int = self.encoder.embed_dim
        self.num_image_tokens: int = int(self.encoder.has_class_token) + self.encoder.patch_embed.num_patches

    def forward(self, pixel_values: Tensor) -> Tensor:
        features: Tensor = self.encoder(pixel_values)  # its head is empty; a call, so that ZeRO-3's hooks see it
        prefix = self.encoder.num_prefix_tokens  # class token, then registers, then patches
        class_token = features[:, : int(self.encoder.has_class_token)]
        return torch.cat([class_token, features[:, prefix:]], dim=1)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.encoder.blocks)

    @property
    def final_norm(self) -> nn.Module:
        norm: nn.Module = self.encoder.norm
        return norm

    @property
    def data_config(self) -> dict[str, Any]:
        """timm's own mean, std and interpolation for these weights."""
        config: dict[str, Any] = timm.data.resolve_data_config(model=self.encoder)
        return config

    def checkpoint_activations(self) -> None:
        """Recompute block activations in the backward pass (timm's, non-reentrant)."""
        self.encoder.set_grad_checkpointing(True)


def _create(settings: VisionSettings) -> Any:
    if settings.weights != "random" and settings.overrides:
        raise InputError(
            f"model.vision.overrides would change the shape of {settings.name}'s trained weights; "
            "leave them out, or set model.vision.weights=random"
        )
    name = settings.name.removeprefix("timm/")
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        raise InputError(
            f"model.vision.name={settings.name} is no timm model{suggest(architecture, timm.list_models())}"
        )
    arguments = {"num_classes": 0, "global_pool": "", "img_size": settings.image_size, **settings.overrides}
    if settings.weights == "hub":
        arguments["pretrained"] = True
    elif settings.weights != "random":
        path = Path(settings.weights).expanduser()
        if not path.is_file():
            raise InputError(f"model.vision.weights={settings.weights}: no such file; give a path, 'hub' or 'random'")
        if path.suffix != ".safetensors":
            raise InputError(
                f"model.vision.weights={settings.weights} is no .safetensors, and pickled weights, which can run code, "
                "are never read here; save them with safetensors.torch.save_file"
            )
        arguments |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
    try:
        with hub_or_cache() if settings.weights == "hub" else nullcontext():
            encoder = timm.create_model(name, **arguments)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        near = suggest(unknown[1], inspect.signature(VisionTransformer).parameters) if unknown else ""
        raise InputError(
            f"model.vision.overrides: timm's {architecture} does not take these settings: {error}{near}"
        ) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        if settings.weights == "random":
            raise
        raise unread(f"model.vision.name={settings.name} with weights={settings.weights}", error) from error
    if not hasattr(encoder, "has_class_token") or not hasattr(encoder, "blocks"):
        raise InputError(f"model.vision.name={settings.name} is not a vision transformer; choose a timm vit_* model")
    if settings.weights == "random":
        _draw_positions(encoder)
    return encoder


def _draw_positions(encoder: Any) -> None:
    """Draw the position embedding as large as the patches it is added to.

    timm draws it with a standard deviation of 0.02, fifty times smaller: trained from scratch, the encoder then
    sees for a long time what is there, but not where.
    """
    nn.init.normal_(encoder.pos_embed)
