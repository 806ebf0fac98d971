"""Vision encoders other than plain transformers: chosen layers, other backbones, several fused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tests import tiny
from vlmvqa.data.images import ImageSettings, to_tensor
from vlmvqa.errors import InputError
from vlmvqa.extras.feature_cache.store import feature_key
from vlmvqa.extras.vision.encoders import FusedEncoder, LayerEncoder
from vlmvqa.models import build as building
from vlmvqa.models.build import build_vision_encoder
from vlmvqa.models.vision import VisionEncoder, VisionSettings
from vlmvqa.models.vlm import ModelSettings, ProjectorSettings

TINY = {"embed_dim": 32, "depth": 3, "num_heads": 4}
SWIN = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "window_size": 2}
# timm's class -> settings of a small model of that class, and the tokens and width of its features.
FAMILIES: dict[str, tuple[VisionSettings, tuple[int, int]]] = {
    "dinov3": (VisionSettings("vit_small_patch16_dinov3.lvd1689m", 32, overrides=TINY), (1 + 4, 32)),
    "siglip2": (VisionSettings("vit_base_patch16_siglip_224.v2_webli", 32, overrides=TINY), (4, 32)),
    "dinov2_registers": (VisionSettings("vit_small_patch14_reg4_dinov2.lvd142m", 28, overrides=TINY), (1 + 4, 32)),
    "eva02": (VisionSettings("eva02_tiny_patch14_224", 28, overrides=TINY), (1 + 4, 32)),
    "perception_encoder": (VisionSettings("vit_pe_core_tiny_patch16_384", 32, overrides=TINY), (1 + 4, 32)),
    "beit": (VisionSettings("beit_base_patch16_224", 32, overrides=TINY), (1 + 4, 32)),
    "convnext": (
        VisionSettings("convnext_tiny", 64, norm=False, overrides={"depths": (1,) * 4, "dims": (8, 16, 32, 64)}),
        (4, 64),
    ),
    "swin": (VisionSettings("swin_tiny_patch4_window7_224", 64, overrides=SWIN), (4, 128)),
}
DINOV2 = VisionSettings("vit_small_patch14_dinov2.lvd142m", 28, weights="random", overrides=TINY)
SIGLIP = VisionSettings("vit_base_patch16_siglip_224", 32, weights="random", overrides=TINY)


def encoder(settings: VisionSettings) -> VisionEncoder:
    torch.manual_seed(0)
    return build_vision_encoder(building.random_weights(settings)).eval()


def pixels(vision: VisionEncoder, channels: int = 3) -> Tensor:
    size = vision.image_size
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_tokens_of_the_declared_shape(family: str) -> None:
    settings, shape = FAMILIES[family]
    vision = encoder(settings)
    features = vision(pixels(vision))
    assert features.shape == (2, *shape) and vision.features[:2] == (shape[1], shape[0])
    rows, columns = vision.patch_grid
    assert rows * columns in (shape[0], shape[0] - 1)
    features.square().mean().backward()
    unused = [name for name, parameter in vision.named_parameters() if parameter.grad is None]
    assert not unused  # under DDP, a parameter without gradient is an error
    assert vision.blocks and all(norm in list(vision.modules()) for norm in vision.final_norms)


@pytest.mark.parametrize("family", ["dinov3", "siglip2", "dinov2_registers", "eva02", "perception_encoder"])
def test_features_are_those_of_timm(family: str) -> None:
    """The class token and the patches of the last block, after the final norm."""
    vision = encoder(FAMILIES[family][0])
    with torch.no_grad():
        theirs = vision.encoder.forward_features(pixels(vision))
        first, prefix = vision.num_class_tokens, vision.encoder.num_prefix_tokens
        assert torch.equal(vision(pixels(vision)), torch.cat([theirs[:, :first], theirs[:, prefix:]], dim=1))
        if first:
            without = encoder(replace(FAMILIES[family][0], class_token=False))
            assert torch.equal(without(pixels(vision)), theirs[:, prefix:])


@torch.no_grad()
def test_layers_are_those_of_timm() -> None:
    """`forward_intermediates` of the complete model; the last layer with its norm equals the usual features."""
    complete = encoder(DINOV2)
    given = pixels(complete)
    layers = complete.encoder.forward_intermediates(given, norm=True, output_fmt="NLC", intermediates_only=True)
    raw = complete.encoder.forward_intermediates(given, norm=False, output_fmt="NLC", intermediates_only=True)
    for chosen, norm, expected in (
        (-2, True, layers[1]),
        (1, False, raw[1]),
        ((-1, 0), True, torch.cat([layers[0], layers[2]], dim=-1)),
        ((-1,), True, layers[2]),
    ):
        vision = encoder(replace(DINOV2, layers=chosen, norm=norm))
        assert isinstance(vision, LayerEncoder)
        assert torch.equal(vision(given)[:, 1:], expected)
        assert len(vision.blocks) == 1 + max(layer % 3 for layer in ([chosen] if isinstance(chosen, int) else chosen))
    assert torch.equal(encoder(replace(DINOV2, layers=(-1,)))(given), complete(given))


@torch.no_grad()
def test_fused_features_equal_both_encoders_run_separately() -> None:
    """With the same grid: DINOv2 at 28 pixels with patches of 14, SigLIP at 32 with patches of 16."""
    fused = encoder(replace(DINOV2, fused=(SIGLIP,)))
    assert isinstance(fused, FusedEncoder) and fused.features == (64, 4, (2, 2)) and fused.image_size == 32
    given = pixels(fused, 6)
    first, second = fused.towers
    expected = torch.cat([first(given[:, :3, :28, :28]), second(given[:, 3:])], dim=-1)
    assert torch.equal(fused(given), expected)
    # Each tower is the encoder that its settings build alone.
    alone = build_vision_encoder(replace(DINOV2, class_token=False)).eval()
    alone.encoder.load_state_dict(first.encoder.state_dict())
    assert torch.equal(alone(given[:, :3, :28, :28]), expected[..., :32])


@torch.no_grad()
def test_another_grid_is_resampled() -> None:
    fused = encoder(replace(DINOV2, image_size=56, fused=(SIGLIP,)))  # 4 x 4 and 2 x 2
    given = pixels(fused, 6)
    features = fused(given)
    assert features.shape == (2, 16, 64)
    coarse = fused.towers[1](given[:, 3:, :32, :32])
    # Bilinear resampling to twice the size keeps the corners.
    assert torch.allclose(features[:, [0, 3, 12, 15], 32:], coarse, atol=1e-6)


def test_each_encoder_gets_its_own_pixels() -> None:
    """Resized from the original image and normalised with its own statistics, then padded to the largest."""
    image = Image.effect_noise((90, 70), 50).convert("RGB")
    first = ImageSettings(28, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    second = ImageSettings(32, (0.5,) * 3, (0.5,) * 3)
    both = to_tensor(image, replace(first, fused=(second,)))
    assert both.shape == (6, 32, 32)
    assert torch.equal(both[:3, :28, :28], to_tensor(image, first)) and not both[:3, 28:].any()
    assert torch.equal(both[3:], to_tensor(image, second))


def fused_model(**projector: Any) -> ModelSettings:
    language = replace(tiny.settings("gemma2").language)
    return ModelSettings(replace(DINOV2, fused=(SIGLIP,)), ProjectorSettings(**projector), language, "blockwise_prefix")


def test_an_encoder_that_cannot_be_used_is_refused_with_the_reason() -> None:
    for name, reason in {
        "resnet18": "batch normalisation keeps running statistics",
        "deit_tiny_distilled_patch16_224": "cannot be built without a head",
        "hiera_tiny_224": r"final norm in its head only; set model\.vision\.norm=false",
    }.items():
        with pytest.raises(InputError, match=rf"model\.vision\.name={name}.*{reason}"):
            encoder(VisionSettings(name, 64))
    with pytest.raises(InputError, match=r"model\.vision\.layers=7: .*out of range"):
        encoder(replace(DINOV2, layers=7))
    with pytest.raises(InputError, match=r"grids of different sizes \(2 x 2, 4 x 4\); choose layers of one size"):
        encoder(replace(FAMILIES["convnext"][0], layers=(-1, -2)))


def test_last_blocks_are_counted_over_all_encoders() -> None:
    fused = encoder(replace(DINOV2, fused=(replace(SIGLIP, overrides={**TINY, "depth": 2}),)))
    first, second = (tower.blocks for tower in fused.towers)
    assert fused.blocks == [first[0], second[0], first[1], second[1], first[2]] or fused.blocks[-2:] == [
        second[-1],
        first[-1],
    ]
    assert len(fused.final_norms) == 2


def test_cached_features_depend_on_the_chosen_layers() -> None:
    images = ImageSettings(28, (0.5,) * 3, (0.5,) * 3)
    chosen = [
        DINOV2,
        replace(DINOV2, class_token=False),
        replace(DINOV2, layers=(-1, 0)),
        replace(DINOV2, layers=(-1, 1)),
    ]
    keys = [feature_key(encoder(one), images, "float32") for one in chosen]
    assert len({str(key) for key in keys}) == 4


def test_weights_of_each_fused_encoder_from_a_file(tmp_path: Path) -> None:
    """At their own names and shapes, as the hub's."""
    files = []
    for number, name in enumerate(("test_vit", "test_vit2")):
        model = timm.create_model(name, num_classes=0, global_pool="", img_size=32)
        save_file(model.state_dict(), tmp_path / f"{number}.safetensors")
        files.append(VisionSettings(name, 32, weights=str(tmp_path / f"{number}.safetensors")))
    fused = build_vision_encoder(replace(files[0], fused=(files[1],))).eval()
    for tower, settings in zip(fused.towers, files, strict=True):
        expected = build_vision_encoder(replace(settings, class_token=False)).eval()
        assert all(torch.equal(a, b) for a, b in zip(tower.parameters(), expected.parameters(), strict=True))
