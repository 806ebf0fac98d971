"""Attribution: attention equals transformers' weights; gradients equal finite differences of the features."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from tests import pretrained
from tests.unit.test_predictor import predictor
from vlmvqa.errors import InputError
from vlmvqa.extras.report.attribution import Attribution, attribute, draw
from vlmvqa.extras.report.gallery import HEAT
from vlmvqa.inference.predictor import Predictor, load

Load = Callable[[str], Predictor]
ASKED = ("what color is it?", "red")


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Return a function that builds our model or a pretrained model by family."""
    root = tmp_path_factory.mktemp("families")
    return cache(lambda family: predictor() if family == "own" else load(pretrained.save(family, root / family), "cpu"))


def batch(model: Predictor, picture: Image.Image) -> dict[str, torch.Tensor]:
    question, answer = ASKED
    return model.batch([model.processor.encode(model.asked(picture, question), [answer])])


def test_attention_equals_transformers(named: Load) -> None:
    """PaliGemma 2: local and global layers, softcaps, a bidirectional prefix."""
    model, picture = named("paligemma2"), pretrained.picture(1)
    attribution = attribute(model, picture, *ASKED)
    net: Any = AutoModelForImageTextToText.from_pretrained(
        model.settings.pretrained,
        attn_implementation="eager",  # type: ignore[union-attr]
    )
    columns = batch(model, picture)
    network = ("input_ids", "attention_mask", "pixel_values", "token_type_ids")
    told = net(**{name: columns[name] for name in network}, output_attentions=True).attentions
    images = columns["input_ids"][0] == net.config.image_token_id
    answers = (columns["labels"][0] >= 0).nonzero()[:-1, 0]  # but EOS
    heat = torch.stack(told)[:, 0][:, :, answers][..., images].mean((0, 1, 2)).detach().numpy()
    assert len(told) == 2 and len(answers) >= 1 and attribution.heat.shape == (4, 4)
    np.testing.assert_allclose(attribution.heat.flatten(), heat / heat.sum(), atol=1e-6)


# The more the features are mixed, the smaller the effect of one patch in float32.
@pytest.mark.parametrize(
    ("family", "step", "near"),
    [("own", 0.01, 0.01), ("paligemma", 0.01, 0.01), ("idefics2", 0.1, 0.01), ("idefics2-split", 0.3, 0.05)],
)
def test_gradients_equal_finite_differences(named: Load, family: str, step: float, near: float) -> None:
    model, picture = named(family), pretrained.picture(2, (56, 28))
    attribution = attribute(model, picture, *ASKED, method="gradient")
    columns, grid = batch(model, picture), attribution.heat.shape
    patches, answered = grid[0] * grid[1], columns["labels"] >= 0

    def log_probability(patch: int, by: float) -> float:
        """Return the log-probability of the answer with one patch's features scaled."""

        def change(_: Any, __: Any, output: Any) -> None:
            features = output if isinstance(output, torch.Tensor) else output.last_hidden_state
            features[-1, features.shape[1] - patches + patch] *= 1 + by

        hook = model.model.vision.register_forward_hook(change)
        with torch.no_grad():
            loss = float(model.model(**columns)["loss"])
        hook.remove()
        return -loss * int(answered.sum())

    shown = [log_probability(patch, step) - log_probability(patch, -step) for patch in range(patches)]
    heat = np.maximum(shown, 0)
    np.testing.assert_allclose(attribution.heat.flatten(), heat / heat.sum(), atol=near)
    assert attribution.heat.max() > 2 / patches  # not uniform


@pytest.mark.parametrize("method", ["attention", "gradient"])
def test_attribution_leaves_the_model_unchanged(named: Load, method: str) -> None:
    for family in ("own", "paligemma"):
        model, picture = named(family), pretrained.picture(3)
        before, answer = model.model.attention, model.answer(picture, ASKED[0])
        model.model.train()
        attribution = [attribute(model, picture, *ASKED, method=method) for _ in range(2)]
        assert model.model.training and model.model.attention == before
        model.model.eval()
        assert model.answer(picture, ASKED[0]) == answer
        assert np.array_equal(attribution[0].heat, attribution[1].heat) and attribution[0].heat.sum() == pytest.approx(
            1
        )
        assert all(p.grad is None for p in model.model.parameters())
        assert not np.allclose(
            attribution[0].heat, attribute(model, pretrained.picture(4), *ASKED, method=method).heat, atol=1e-4
        )


@pytest.mark.parametrize("method", ["attention", "gradient"])
@pytest.mark.parametrize("family", ["own", "paligemma"])
def test_an_empty_answer_is_attributed(named: Load, family: str, method: str) -> None:
    attribution = attribute(named(family), pretrained.picture(3), ASKED[0], " ", method)
    assert attribution.heat.sum() == pytest.approx(1) and attribution.heat.shape == (4, 4)


def test_cropped_margins_are_outside_the_box(named: Load) -> None:
    model, picture = named("own"), pretrained.picture(0, (60, 30))
    assert attribute(model, picture, *ASKED).box == (0, 0, 60, 30)
    llava = named("llava")  # CLIP's processor crops
    assert attribute(llava, picture, *ASKED).box == (15, 0, 45, 30)


def test_undefined_attributions_are_refused(named: Load, tmp_path: Path) -> None:
    picture = pretrained.picture(0)
    with pytest.raises(
        InputError, match=r"4 image tokens that do not correspond one to one to 4 x 4 patches.*method=gradient"
    ):
        attribute(named("idefics2"), picture, *ASKED)
    with pytest.raises(InputError, match=r"does not read the last features of CLIP.*method=attention"):
        attribute(named("llava"), picture, *ASKED, method="gradient")
    with pytest.raises(InputError, match="method=saliency is unknown; use attention or gradient"):
        attribute(named("own"), picture, *ASKED, method="saliency")
    with pytest.raises(InputError, match="does not exist"):
        attribute(named("own"), str(tmp_path / "no.jpg"), *ASKED)


def test_the_hottest_patch_is_drawn_over_the_image() -> None:
    heat = np.zeros((2, 4), dtype=np.float32)
    heat[0, 3] = 1
    picture = Image.new("RGB", (100, 40), "blue")
    drawn = np.asarray(draw(picture, Attribution(heat, (20, 0, 60, 40))), dtype=int)
    changed = np.abs(drawn - np.asarray(picture)).sum(-1)
    assert changed.shape == (40, 100) and changed[5, 55] > 200
    assert not changed[:, :20].any() and not changed[:, 60:].any() and changed[35, 25] == 0


def test_the_legend_has_the_colours_of_the_map() -> None:
    stops = [list(map(int, stop)) for stop in re.findall(r"rgb\((\d+) (\d+) (\d+) / (\d+)%\)", HEAT)]
    drawn = draw(
        Image.new("RGB", (len(stops), 1), "white"),
        Attribution(np.linspace(0, 1, len(stops))[None], (0, 0, len(stops), 1)),
    )
    for place, (*colour, opaque) in enumerate(stops):
        expected = [255 + (one - 255) * opaque / 100 for one in colour]
        assert drawn.getpixel((place, 0)) == pytest.approx(expected, abs=3)
