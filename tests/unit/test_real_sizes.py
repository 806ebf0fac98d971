"""The recipe's model, built on the meta device without weights, has the published sizes."""

from __future__ import annotations

import torch
from omegaconf import OmegaConf

from vlmvqa.config.compose import build_settings
from vlmvqa.models.build import build
from vlmvqa.models.vlm import ModelSettings
from vlmvqa.paths import CONF


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_dinov2_gemma2_2b() -> None:
    values = OmegaConf.to_container(OmegaConf.load(CONF / "model" / "dinov2_gemma2_2b.yaml"))
    values["language"] |= {"name": "gemma2", "weights": "random"}  # its config class's defaults are the 2B model's
    values["vision"]["weights"] = "random"
    del values["language"]["tokenizer"]
    with torch.device("meta"):
        model = build(build_settings(ModelSettings, values, "model"))
    assert parameters(model.language) == 2_614_341_888
    assert parameters(model.projector) == 768 * 2304 + 2304
    assert (model.num_image_tokens, model.vision.features.width) == (257, 768)
    assert model.language.width == 2304
    # ViT-B/14: 12 blocks of 7,089,408 (layer scale included), patches, class token, 257 positions, final norm
    assert parameters(model.vision) == 12 * 7_089_408 + (3 * 14 * 14 * 768 + 768) + 768 + 257 * 768 + 2 * 768
    with torch.device("meta"):
        features = model.vision(torch.empty(2, 3, 224, 224))
        assert model.projector(features).shape == (2, 257, 2304)
