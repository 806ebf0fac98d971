"""Letterboxed images: which patches they cover, and that padding changes nothing in the model."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests import tiny
from tests.unit.test_images import noise_image
from tests.unit.test_predictor import predictor
from tests.unit.test_shared_rows import loss_and_gradients
from tests.unit.test_tiles import HALF, SIDE, example
from vlmvqa.data.images import ImageSettings, normalise, to_tensor
from vlmvqa.data.train_dataset import RowSettings, TrainDataset
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.extras.report.attribution import attribute
from vlmvqa.extras.vision.letterbox import check, covered, kept_tokens, pad
from vlmvqa.hf import VlmvqaForConditionalGeneration, VlmvqaProcessor
from vlmvqa.inference.predictor import Predictor, load
from vlmvqa.models.build import build
from vlmvqa.models.vision import VisionSettings
from vlmvqa.models.vlm import VLM, ProjectorSettings
from vlmvqa.sequence.rows import build_row

SETTINGS = ImageSettings(SIDE, HALF, HALF, resize="letterbox")
WIDE = (56, 28)  # pixels: 4 x 2 of the tiny encoder's 4 x 4 patches


def boxed(attention_pattern: str = "blockwise_prefix") -> Predictor:
    found = predictor(attention_pattern)
    found.processor = replace(found.processor, images=replace(found.processor.images, resize="letterbox"))
    return found


def test_the_aspect_ratio_is_kept_up_to_half_a_patch() -> None:
    generator = random.Random(0)
    for _ in range(1000):
        width, height = (generator.randint(1, 3000) for _ in range(2))
        side = generator.choice((4, 16, 24))
        columns, rows = covered(width, height, side)
        assert max(columns, rows) == side and min(columns, rows) >= 1
        shorter = side * min(width, height) / max(width, height)
        assert abs(min(columns, rows) - shorter) <= 0.5 or shorter < 0.5
        assert len(kept_tokens(width, height, side * side + 1)) == columns * rows + 1
    assert kept_tokens(*WIDE, 17) == [*range(9)] and kept_tokens(*WIDE[::-1], 16) == [0, 1, 4, 5, 8, 9, 12, 13]


def test_the_image_is_resized_to_its_patches_and_the_rest_has_the_mean_colour() -> None:
    image = noise_image(*WIDE)
    settings = replace(SETTINGS, mean=(0.1, 0.2, 0.3))
    pixels = pad(image, settings, 16)
    assert torch.equal(pixels[:, :14], normalise(image.resize((28, 14), Image.Resampling.BICUBIC), settings))
    assert pixels.shape == (3, 28, 28) and (pixels[:, 14:] == 0).all()
    square = noise_image(40, 40)
    assert torch.equal(pad(square, SETTINGS, 17), to_tensor(square, replace(SETTINGS, resize="squash")))


@pytest.mark.parametrize("attention_pattern", ["causal", "blockwise_prefix", "prefix_lm"])
def test_padding_changes_no_feature_and_no_token(attention_pattern: str) -> None:
    """To the bit; the pixels of a covered patch change all features."""
    model = boxed(attention_pattern)
    asked = replace(example(WIDE), questions=example(WIDE).questions[:1])
    batch = model.processor.collate([[model.processor.encode(asked, ["red"])]])
    assert batch["image_mask"].sum() == 9 == (batch["role"][0] == 0).sum()

    def computed(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        vlm = model.model
        assert isinstance(vlm, VLM)
        with torch.no_grad():
            features = vlm.vision(pixels, batch["image_mask"])[:, batch["image_mask"][0]]
            return features, vlm.decode({**batch, "pixel_values": pixels})

    before = computed(batch["pixel_values"])
    noise = torch.randn(batch["pixel_values"].shape)
    padding = torch.zeros_like(noise, dtype=torch.bool)
    padding[:, :, 14:] = True
    real = batch["document"] >= 0
    after = computed(torch.where(padding, noise, batch["pixel_values"]))
    assert torch.equal(before[0], after[0]) and torch.equal(before[1][real], after[1][real])
    padding = ~padding
    padding[:, :, :, 7:] = False
    other = computed(torch.where(padding, noise, batch["pixel_values"]))
    assert not (before[0] == other[0]).all(-1).any() and not torch.equal(before[1], other[1])


def test_shared_rows_equal_separate_rows() -> None:
    model = boxed()
    assert isinstance(model.model, VLM)
    asked = [example(WIDE, (20, 50)), example((30, 30))]
    documents = [model.processor.encode(one, ["red", "blue red"]) for one in asked]
    shared = model.processor.collate([documents])
    separate = model.processor.collate([[replace(d, questions=[q])] for d in documents for q in d.questions])
    loss, gradients = loss_and_gradients(model.model, shared)
    alone, expected = loss_and_gradients(model.model, separate)
    assert loss == pytest.approx(alone, rel=1e-6) and gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() < 1e-5 * expected[name].norm(), name


def test_planned_lengths_are_those_of_the_rows() -> None:
    make, examples = boxed().processor, [example((60, 20)), example((20, 60), (30, 30)), example((30, 30))]
    built = TrainDataset(examples, make, RowSettings(), BadRecords())
    plan = built.packing.plan(0)
    rows = [build_row(built[row], make.num_image_tokens, make.attention_pattern) for row in range(3)]
    assert list(map(len, rows)) == [built.packing.lengths[plan[row]].sum() for row in range(3)]
    assert sorted({make.count_image_tokens(one) for one in examples}) == [5, 17, 22]


def test_a_saved_model_letterboxes_and_so_does_transformers(tmp_path: Path) -> None:
    model = boxed()
    model.save(tmp_path)
    loaded = load(tmp_path, "cpu")
    assert loaded.processor.images == model.processor.images
    asked = [example(WIDE), replace(example((20, 60)), image_id=1), replace(example((30, 30)), image_id=2)]
    texts = [[question.text for question in one.questions] for one in asked]
    theirs = VlmvqaForConditionalGeneration.from_pretrained(tmp_path)
    given = VlmvqaProcessor.from_pretrained(tmp_path)(images=[one.image for one in asked], text=texts)
    with torch.no_grad():
        found = theirs(**given).logits[given["attention_mask"].bool()]
        batch = loaded.processor.collate([[loaded.processor.encode(one, [None, None])] for one in asked])
        # The prompt of the processor is that of the config.
        batch = {**batch, "input_ids": batch["input_ids"]}
        expected = loaded.model.logits(loaded.model.decode(batch))[batch["document"] >= 0]  # type: ignore[operator]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


def test_the_gradient_map_is_that_of_the_covered_patches() -> None:
    assert attribute(boxed(), noise_image(*WIDE), "what", "red", method="gradient").heat.shape == (2, 4)


def encoder_of(name: str, **changes: Any) -> VLM:
    settings = tiny.settings()
    overrides = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    vision = VisionSettings(name, weights="random", **{"image_size": 64, "overrides": overrides, **changes})
    return build(replace(settings, vision=vision))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit_small_patch16_dinov3.lvd1689m", {}),  # timm's Eva: registers, rotary positions
        ("vit_base_patch16_clip_224.openai", {"layers": [-1, -2]}),
        ("vit_base_patch16_siglip_224.webli", {}),  # no class token
    ],
)
def test_other_transformers_mask_their_patches(name: str, changes: dict[str, Any]) -> None:
    vlm = encoder_of(name, **changes).eval()
    check(vlm)
    pixels, mask = torch.randn(2, 3, 64, 64), torch.zeros(2, vlm.num_image_tokens, dtype=torch.bool)
    mask[:, kept_tokens(64, 32, vlm.num_image_tokens)] = True
    changed = pixels.clone()
    changed[:, :, 32:] = 0
    with torch.no_grad():
        before, after, unmasked = vlm.vision(pixels, mask), vlm.vision(changed, mask), vlm.vision(changed)
    assert torch.equal(before[mask], after[mask]) and not torch.equal(before[mask], unmasked[mask])


def test_models_that_cannot_leave_patches_out_are_refused() -> None:
    with pytest.raises(InputError, match="timm cannot mask patches in this encoder; use a vision transformer"):
        check(encoder_of("convnext_atto.d2_in1k", norm=False, overrides={"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}))
    pooled = replace(tiny.settings(), projector=ProjectorSettings("pool", options={"factor": 2}))
    with pytest.raises(InputError, match="needs a token for each of a square of patches"):
        check(build(pooled))
