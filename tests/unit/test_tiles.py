"""Tiles: which grid an image gets, what the tiles show, which of them see each other; small images stay as they are."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests import tiny
from tests.unit.test_images import encoded, noise_image
from tests.unit.test_predictor import predictor
from vlmvqa.data.example import Example, Question
from vlmvqa.data.images import ImageSettings, to_tensor
from vlmvqa.data.train_dataset import RowSettings, TrainDataset
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.extras.report.attribution import attribute
from vlmvqa.extras.report.show import GAP, save_inputs
from vlmvqa.extras.vision.tiles import TileSettings, choose_grid, cut
from vlmvqa.inference.predictor import Predictor, load
from vlmvqa.models.vlm import VLM
from vlmvqa.sequence.rows import Document, build_row

SIDE = 28  # of the tiny model's encoder
HALF = (0.5, 0.5, 0.5)
SETTINGS = ImageSettings(SIDE, HALF, HALF, tiles={"max": 4})


def tiled(attention_pattern: str = "blockwise_prefix", tile_attention: str = "image") -> Predictor:
    found = predictor(attention_pattern)
    tiles = {"max": 4, "tile_attention": tile_attention}
    found.processor = replace(found.processor, images=replace(found.processor.images, tiles=tiles))
    return found


def example(*sizes: tuple[int, int]) -> Example:
    first, *others = (noise_image(*size) for size in sizes)
    questions = tuple(Question(n, text, f"{text}\n", "red") for n, text in enumerate(("what", "what color is it")))
    return Example(first, 0, questions, tuple(others))


# ---- the grid


def test_no_tile_is_upscaled_and_no_other_grid_shrinks_the_image_less() -> None:
    generator = random.Random(0)
    for _ in range(3000):
        width, height = (round(2 ** generator.uniform(0, 12)) for _ in range(2))
        size, most = generator.choice((16, 48, 224, 336)), generator.randint(1, 12)
        columns, rows = choose_grid(width, height, size, most)
        if min(width, height) < size:
            assert (columns, rows) == (1, 1)
            continue
        assert columns * size <= width and rows * size <= height and columns * rows <= most

        def shrunk(c: int, r: int, width: int = width, height: int = height) -> float:
            return min(c / width, r / height)

        fitting = [(c, r) for c in range(1, width // size + 1) for r in range(1, height // size + 1) if c * r <= most]
        better = [grid for grid in fitting if shrunk(*grid) > shrunk(columns, rows) + 1e-12]
        equal = [c * r for c, r in fitting if abs(shrunk(c, r) - shrunk(columns, rows)) < 1e-12]
        assert not better and columns * rows == min(equal)
        assert choose_grid(height, width, size, most)[0] * choose_grid(height, width, size, most)[1] == columns * rows


@pytest.mark.parametrize(
    ("width", "height", "grid"),
    [
        (336, 336, (1, 1)),  # no larger than a tile
        (20, 336, (1, 1)),
        (3000, 335, (1, 1)),  # any grid would upscale its height
        (1344, 672, (4, 2)),
        (672, 1344, (2, 4)),
        (5000, 5000, (3, 3)),
        (2700, 340, (8, 1)),
        (640, 480, (1, 1)),
        (700, 480, (2, 1)),
    ],
)
def test_grids_by_aspect_ratio(width: int, height: int, grid: tuple[int, int]) -> None:
    assert choose_grid(width, height, 336, 9) == grid


def test_the_tiles_are_the_image_and_the_last_one_is_all_of_it() -> None:
    image = noise_image(2 * SIDE, 2 * SIDE)
    first, second, third, fourth, thumbnail = cut(image, SETTINGS)
    together = np.vstack([np.hstack([first, second]), np.hstack([third, fourth])])
    assert (together == np.asarray(image)).all() and thumbnail is image


@pytest.mark.parametrize("size", [(SIDE, SIDE), (12, 20), (40, 30), (2 * SIDE, SIDE - 1)])
@pytest.mark.parametrize("tile_attention", ["image", "tile"])
def test_one_tile_is_the_untiled_image_to_the_bit(size: tuple[int, int], tile_attention: str) -> None:
    batches = []
    for model in (predictor(), tiled(tile_attention=tile_attention)):
        batches.append(model.processor.collate([[model.processor.encode(example(size), ["red", "red"])]]))
    assert batches[0].keys() == batches[1].keys()
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])


# ---- the tokens of a row


def test_planned_lengths_are_those_of_the_rows(tmp_path: Path) -> None:
    """Sizes are read from the files' headers; a rotated photograph has as many tiles, an unreadable one is skipped."""
    (tmp_path / "a.png").write_bytes(encoded(noise_image(90, 40), "PNG"))
    rotated = Image.Exif()
    rotated[0x0112] = 6
    (tmp_path / "b.jpg").write_bytes(encoded(noise_image(90, 40), "JPEG", exif=rotated))
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    base, make = example((90, 90)), tiled().processor
    sources: list[Any] = [base.image, tmp_path / "a.png", tmp_path / "b.jpg", encoded(noise_image(60, 60), "PNG")]
    examples = [replace(base, image=source, image_id=n) for n, source in enumerate(sources)]
    bad = replace(base, image=tmp_path / "bad.jpg", more_images=(base.image,))
    tokens = [make.count_image_tokens(one) / make.num_image_tokens for one in (*examples, bad)]
    assert tokens == [5, 4, 4, 5, 1 + 5]
    built = TrainDataset(examples, make, RowSettings(row_tokens=120), BadRecords())
    plan = built.packing.plan(0)
    rows = [build_row(built[row], make.num_image_tokens, make.attention_pattern) for row in range(len(plan))]
    assert list(map(len, rows)) == [built.packing.lengths[plan[row]].sum() for row in range(len(plan))]


def hidden(model: VLM, document: Document, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.decode(tiny.batch(model, [[document]], pixels))[0]


@pytest.mark.parametrize("tiles", [(3,), (1, 1, 1), (1, 2)], ids=["image", "tile", "two images"])
def test_a_later_tile_changes_an_earlier_one_only_inside_their_block(tiles: tuple[int, ...]) -> None:
    vlm = tiny.model()
    (document,) = tiny.documents([2], tiles=[tiles])
    pixels, tokens = tiny.images(3), vlm.num_image_tokens
    changed = torch.cat([pixels[:2], -pixels[2:]])
    before, after = hidden(vlm, document, pixels), hidden(vlm, document, changed)
    first, second, questions = (slice(n * tokens, (n + 1) * tokens) for n in (0, 1, 3))
    for place, together in ((first, tiles == (3,)), (second, tiles != (1, 1, 1))):
        assert torch.equal(before[place], after[place]) != together
    assert not torch.equal(before[questions], after[questions])


# ---- a model with tiles


@pytest.mark.parametrize("tile_attention", ["image", "tile"])
def test_a_saved_model_cuts_images_as_in_training(tmp_path: Path, tile_attention: str) -> None:
    model = tiled(tile_attention=tile_attention)
    model.save(tmp_path)
    loaded = load(tmp_path, "cpu")
    assert loaded.processor.images == model.processor.images
    asked = example((60, 60))
    batch = loaded.batch([loaded.processor.encode(asked, [None, None])])
    assert batch["pixel_values"].shape == (5, 3, SIDE, SIDE)
    texts = [question.text for question in asked.questions]
    shared, untiled = (one.answer(asked.image, texts) for one in (loaded, predictor()))
    for text, answer, other in zip(texts, shared, untiled, strict=True):
        alone = loaded.answer(asked.image, text)
        assert alone.text == answer.text and alone.log_probability == pytest.approx(answer.log_probability, abs=1e-4)
        assert abs(answer.log_probability - other.log_probability) > 1e-3


def test_attention_to_a_patch_is_undefined_and_gradients_are_those_of_the_thumbnail() -> None:
    model, image = tiled(), noise_image(60, 60)
    with pytest.raises(InputError, match=r"reads 85 image tokens that do not correspond .*use method=gradient"):
        attribute(model, image, "what", "red")
    assert attribute(model, image, "what", "red", method="gradient").heat.shape == (4, 4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tiles": {"max": 2}, "resize": "center_crop"}, "data.tiles cuts images at full scale"),
        ({"tiles": {"max": 2}, "reduced": True}, "data.tiles cuts images at full scale"),
    ],
)
def test_what_tiles_cannot_be_combined_with(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        ImageSettings(SIDE, HALF, HALF, **change)


@pytest.mark.parametrize(("values", "said"), [((0,), "max=0 must be"), ((2.5,), "max=2.5"), ((2, "all"), "=all is un")])
def test_settings_of_tiles_are_checked(values: tuple[Any, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        TileSettings(*values)


def test_show_saves_the_first_of_fused_encoders(tmp_path: Path) -> None:
    fused = replace(SETTINGS, tiles=None, fused=(replace(SETTINGS, tiles=None, size=2 * SIDE),))
    image = noise_image(SIDE, SIDE)
    save_inputs(to_tensor(image, fused)[None], fused, tmp_path / "a.png")
    assert (np.asarray(Image.open(tmp_path / "a.png"))[:, :SIDE] == np.asarray(image)).all()


def test_show_saves_what_the_encoder_reads(tmp_path: Path) -> None:
    """Tile after tile, then the thumbnail, with the normalisation undone."""
    image = noise_image(2 * SIDE, 2 * SIDE)
    save_inputs(torch.stack([to_tensor(tile, SETTINGS) for tile in cut(image, SETTINGS)]), SETTINGS, tmp_path / "a.png")
    shown = np.asarray(Image.open(tmp_path / "a.png"))
    assert shown.shape == (SIDE, 5 * (SIDE + GAP), 3)
    assert (shown[:, :SIDE] == np.asarray(image)[:SIDE, :SIDE]).all()
    assert (shown[:, SIDE + GAP : 2 * SIDE + GAP] == np.asarray(image)[:SIDE, SIDE:]).all()
