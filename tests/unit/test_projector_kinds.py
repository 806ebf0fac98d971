"""Projectors that change the number of tokens, and models of every kind of encoder and projector."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler

import vlmvqa
import vlmvqa.hf
from tests import tiny
from tests.unit.test_planner import ROWS, planner, real_peak, vlm_batch, wide
from tests.unit.test_shared_rows import lay_out, loss_and_gradients
from tests.unit.test_vision import DINOV2, FAMILIES, SIGLIP
from vlmvqa.data.example import Example, Question
from vlmvqa.data.images import ImageSettings
from vlmvqa.data.processor import Processor
from vlmvqa.data.tokenization import train_tokenizer
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.extras.feature_cache.store import feature_key
from vlmvqa.extras.feature_cache.writer import write
from vlmvqa.extras.report.attribution import attribute
from vlmvqa.extras.vision.initial_scale import scale_to_text
from vlmvqa.extras.vision.reductions import AveragePool, PixelShuffle
from vlmvqa.extras.vision.resampler import Resampler
from vlmvqa.inference.predictor import Predictor
from vlmvqa.models import build as building
from vlmvqa.models.build import build, build_projector
from vlmvqa.models.generation import generate
from vlmvqa.models.interface import GenerationSettings
from vlmvqa.models.projector import Projector
from vlmvqa.models.trained_model import TrainedModel
from vlmvqa.models.vision import FeatureShape, VisionSettings
from vlmvqa.models.vlm import VLM, ModelSettings, ProjectorSettings

FEATURES = FeatureShape(6, 17, (4, 4))  # with a class token
SMALL = {"latents": 5, "depth": 2, "heads": 4, "key_value_heads": 2, "head_dim": 8}
OPTIONS: dict[str, dict[str, Any]] = {"pixel_shuffle": {}, "pool": {"layers": "mlp"}, "resampler": SMALL}
# Encoder and projector of a model, and the number of tokens of an image.
GRID = VisionSettings(image_size=tiny.IMAGE_SIZE, overrides=tiny.VISION)  # 4 x 4 patches and a class token
MODELS: dict[str, tuple[VisionSettings, ProjectorSettings, int]] = {
    "normed": (GRID, ProjectorSettings("normed"), 17),
    "pixel_shuffle": (GRID, ProjectorSettings("pixel_shuffle"), 4),
    "pool": (GRID, ProjectorSettings("pool", options=OPTIONS["pool"]), 4),
    "resampler": (GRID, ProjectorSettings("resampler", options=SMALL), 5),
    "layers": (replace(GRID, layers=(-2, -1)), ProjectorSettings(), 17),
    "dinov3": (FAMILIES["dinov3"][0], ProjectorSettings(), 5),
    "swin": (FAMILIES["swin"][0], ProjectorSettings("mlp"), 4),
    "fused": (replace(DINOV2, fused=(SIGLIP,)), ProjectorSettings("mlp"), 4),
}


def features(images: int = 2) -> Tensor:
    return torch.randn(images, FEATURES.tokens, FEATURES.width, generator=torch.Generator().manual_seed(0))


def settings(kind: str, pattern: str = "blockwise_prefix") -> ModelSettings:
    vision, projector, _ = MODELS[kind]
    return replace(tiny.settings(pattern), vision=building.random_weights(vision), projector=projector)


def model(kind: str, pattern: str = "blockwise_prefix") -> VLM:
    torch.manual_seed(0)
    return build(settings(kind, pattern)).eval()


def pixels(vlm: VLM, images: int) -> Tensor:
    size = vlm.vision.image_size
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, 3 * len(vlm.vision.towers), size, size, generator=generator)


# ---- projectors


def test_pixel_shuffle_is_einops() -> None:
    """The patches of each 2 x 2 square, row by row, become the channels of one token."""
    projector = PixelShuffle(FEATURES, 10).eval()
    square = features()[:, 1:].view(2, 4, 4, 6)
    merged = [
        torch.cat([square[:, 2 * r + a, 2 * c + b] for a in (0, 1) for b in (0, 1)], -1) for r in (0, 1) for c in (0, 1)
    ]
    assert torch.equal(projector(features()), projector.layers(torch.stack(merged, dim=1)))
    reference = rearrange(features()[:, 1:], "i (h p w q) d -> i (h w) (p q d)", h=2, p=2, w=2, q=2)
    assert torch.equal(projector(features()), projector.layers(reference))
    assert projector.output == (10, 4, (2, 2))


def test_factor_one_is_linear() -> None:
    for kind in (PixelShuffle, AveragePool):
        torch.manual_seed(0)
        reduced = kind(FEATURES, 10, factor=1)
        linear = Projector(FEATURES, 10)
        linear.load_state_dict(reduced.state_dict())
        assert torch.equal(reduced(features()), linear(features()[:, 1:]))


def test_pooling_is_the_mean_of_each_square() -> None:
    projector = AveragePool(FEATURES, 10)
    square = features()[:, 1:].view(2, 4, 4, 6)
    expected = torch.stack([square[:, r : r + 2, c : c + 2].mean((1, 2)) for r in (0, 2) for c in (0, 2)], dim=1)
    torch.testing.assert_close(projector(features()), projector.layers(expected))


def test_the_resampler_is_transformers_perceiver() -> None:
    """Idefics2's class on the same weights, under their names."""
    width, given = 32, torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    config = Idefics2PerceiverConfig(
        hidden_size=width,
        resampler_n_latents=SMALL["latents"],
        resampler_depth=SMALL["depth"],
        resampler_n_heads=SMALL["heads"],
        resampler_head_dim=SMALL["head_dim"],
        num_key_value_heads=SMALL["key_value_heads"],
        rms_norm_eps=1e-6,
    )
    torch.manual_seed(0)
    theirs = Idefics2PerceiverResampler(config).eval()
    ours = Resampler(FeatureShape(width, 9, None), width, **SMALL).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
        ours.layers[0].weight.copy_(torch.eye(width))
        ours.layers[0].bias.zero_()
    names = {
        "layers.": "blocks.",
        "input_latents_norm": "latents_norm",
        "input_context_norm": "context_norm",
        "post_attention_layernorm": "mlp_norm",
        "self_attn.q_proj": "queries",
        "self_attn.k_proj": "keys",
        "self_attn.v_proj": "values",
        "self_attn.o_proj": "attended",
        "mlp.gate_proj": "mlp.gate",
        "mlp.up_proj": "mlp.up",
        "mlp.down_proj": "mlp.down",
    }
    converted = {}
    for name, weight in theirs.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        converted[name] = weight
    missing, unexpected = ours.load_state_dict(converted, strict=False)
    assert missing == ["layers.0.weight", "layers.0.bias"] and not unexpected
    with torch.no_grad():
        expected = theirs(given, torch.ones(2, 9, dtype=torch.int64))
        torch.testing.assert_close(ours(given), expected, rtol=1e-5, atol=1e-5)
    assert ours.output == (width, 5, None)


@pytest.mark.parametrize("kind", OPTIONS)
def test_gradients_reach_features_and_every_weight(kind: str) -> None:
    projector = build_projector(ProjectorSettings(kind, options=OPTIONS[kind]), FEATURES, 10)
    given = features().requires_grad_()
    projector(given).square().mul(torch.arange(10.0)).sum().backward()
    assert given.grad is not None and given.grad[:, 1:].abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projector.parameters())


def test_what_a_kind_cannot_do_is_refused() -> None:
    for projector, reason in (
        (ProjectorSettings("pixel_shufle"), r"kind=pixel_shufle is unknown; .*did you mean 'pixel_shuffle'"),
        (ProjectorSettings("pixel_shuffle", options={"factr": 2}), r"no 'factr' .*did you mean 'factor'"),
        (ProjectorSettings("linear", options={"factor": 2}), r"no 'factor' for kind=linear"),
        (ProjectorSettings("pixel_shuffle", options={"factor": 3}), r"factor=3 does not divide the 4 x 4 patches"),
        (ProjectorSettings("resampler", options={"heads": 3}), r"heads must be a multiple"),
        (
            ProjectorSettings("pool", options={"layers": "mpl"}),
            r"layers=mpl is unknown; use one of linear, mlp, normed",
        ),
    ):
        with pytest.raises(InputError, match=reason):
            build_projector(projector, FEATURES, 10)


# ---- models


@pytest.mark.parametrize("kind", MODELS)
def test_shared_rows_equal_separate_rows(kind: str) -> None:
    """Loss, every gradient and every generated token."""
    vlm = model(kind)
    assert vlm.num_image_tokens == MODELS[kind][2]
    rows = lay_out("several images a row")
    flat = [document for row in rows for document in row]
    given = pixels(vlm, len(flat))
    loss, gradients = loss_and_gradients(vlm, tiny.batch(vlm, rows, given))
    alone, expected = loss_and_gradients(vlm, tiny.batch(vlm, tiny.apart(flat), given))
    assert loss == pytest.approx(alone, rel=1e-6)
    assert gradients.keys() == {name for name, _ in vlm.named_parameters()}
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() < 2e-5 * expected[name].norm() + 1e-9, name
    decoding = GenerationSettings(8)
    questions = [tiny.without_answers(row) for row in rows]
    together = generate(vlm, tiny.batch(vlm, questions, given), {tiny.EOS}, decoding)
    single = [[one] for row in questions for one in row]
    separate = generate(vlm, tiny.batch(vlm, single, given), {tiny.EOS}, decoding)
    assert [one.tokens for one in together] == [one.tokens for one in separate]


@pytest.mark.parametrize(
    "kind", [kind if kind == "fused" else pytest.param(kind, marks=pytest.mark.slow) for kind in MODELS]
)
def test_the_plan_is_what_a_step_takes(kind: str) -> None:
    """Parameters exactly, the peak of a real step within 5 %."""
    plan = planner(settings=replace(wide(), vision=settings(kind).vision, projector=settings(kind).projector), gpus=1)
    vlm = build(plan.settings).train()
    assert plan.num_image_tokens == MODELS[kind][2]
    planned = plan.memory("ddp", 4, False)
    assert planned.parameters == sum(parameter.nbytes for parameter in vlm.parameters())
    batch = vlm_batch(vlm, replace(ROWS, rows=4))
    assert planned.peak == pytest.approx(real_peak(vlm, batch, plan.training) + planned.parameters, rel=0.05)


def examples() -> list[Example]:
    generator = np.random.default_rng(0)
    return [
        Example(
            Image.fromarray(generator.integers(0, 255, (40, 50, 3), dtype=np.uint8)),
            number,
            (Question(number, f"what is {number}?", f"answer en what is {number}?\n", "red", ("red",)),),
        )
        for number in range(4)
    ]


def trained(kind: str) -> TrainedModel:
    from vlmvqa.config.schema import DataSettings

    chosen = settings(kind)
    language = replace(chosen.language, tokenizer="trained", overrides={**chosen.language.overrides, "vocab_size": 300})
    chosen = replace(chosen, language=language)
    torch.manual_seed(0)
    vlm, processor, _ = building.compose(chosen, DataSettings("vqav2", None), examples())
    return TrainedModel(vlm.eval(), processor, "answer en {question}\n", chosen)


@pytest.mark.parametrize("kind", MODELS)
def test_a_saved_model_answers_as_before(kind: str, tmp_path: Path) -> None:
    before = trained(kind)
    before.save(tmp_path)
    again = vlmvqa.load(tmp_path)
    assert again.model.num_image_tokens == MODELS[kind][2]
    encoded = [before.processor.encode(one, [None]) for one in examples()]
    found = [again.processor.encode(one, [None]) for one in examples()]
    assert all(torch.equal(a.images[0], b.images[0]) for a, b in zip(encoded, found, strict=True))
    batch = before.processor.collate([[one] for one in encoded])
    with torch.no_grad():
        assert torch.equal(before.model.decode(batch), again.model.decode(batch))


@pytest.mark.parametrize("kind", ["dinov3", "swin", "fused", "resampler"])
def test_transformers_loads_the_saved_model(kind: str, tmp_path: Path) -> None:
    """Also buffers that are not saved: rotary periods, indices of relative positions."""
    before = trained(kind)
    before.save(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    batch = before.processor.collate([[before.processor.encode(one, [None])] for one in examples()])
    with torch.no_grad():
        assert torch.equal(before.model.decode(batch), again.vlm.decode(batch))


def test_a_checked_encoder_has_no_batch_normalisation() -> None:
    """Also inside timm's plain transformers."""
    with pytest.raises(InputError, match=r"vit_base_mci_224 cannot be used: its batch normalisation"):
        building.build_vision_encoder(VisionSettings("vit_base_mci_224", 64, "random", {"depth": 1}))


@pytest.mark.parametrize(("factor", "kind"), [(0.05, "linear"), (20.0, "linear"), (3.0, "resampler")])
def test_the_initial_output_is_as_large_as_the_text_embeddings(factor: float, kind: str) -> None:
    torch.manual_seed(0)
    options = SMALL if kind == "resampler" else {}
    vlm = build(replace(tiny.settings(), projector=ProjectorSettings(kind, options=options))).eval()
    with torch.no_grad():
        vlm.language.decoder.embed_tokens.weight.mul_(factor)
    images = ImageSettings(tiny.IMAGE_SIZE, (0.5,) * 3, (0.5,) * 3)
    processor = Processor(train_tokenizer(examples(), 300), images, vlm.num_image_tokens, vlm.attention_pattern)
    vlm.language.decoder.resize_token_embeddings(300)
    scale_to_text(TrainedModel(vlm, processor, "{question}", tiny.settings()), examples())
    documents = [processor.encode(one, [None]) for one in examples()]
    batch = processor.collate([[one] for one in documents])
    with torch.no_grad():
        image = vlm.image_embeddings(batch).std()
        text = vlm.language.embed(torch.tensor([i for d in documents for i in d.questions[0].prompt])).std()
    torch.testing.assert_close(image, text, rtol=1e-4, atol=0)


# ---- caches, operations, attributions


@pytest.mark.parametrize("kind", ["layers", "swin", "fused"])
def test_cached_features_are_the_encoders_to_the_bit(kind: str, tmp_path: Path) -> None:
    """An unreadable image is skipped; its place in the batch has the encoder's input shape."""
    given = trained(kind)
    vision, broken = given.model.vision, Example(b"no image", "broken", examples()[0].questions)
    shown = [*examples(), broken]
    key = feature_key(vision, given.processor.images, "float32")
    store = write(tmp_path / "f", key, vision, shown, given.processor.load_images, BadRecords("skip"), batch_size=3)
    assert set(store.skipped) == {"broken"} and store.shape == (vision.features.tokens, vision.features.width)
    pixels = torch.stack([given.processor.load_images(one).images[0] for one in examples()])
    with torch.no_grad():
        torch.testing.assert_close(torch.stack([store[n] for n in range(4)]), vision(pixels), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["normed", "pixel_shuffle", "pool", "resampler", "layers", "dinov3", "fused"])
def test_operations_are_those_that_pytorch_counts(kind: str) -> None:
    """Of encoder and projector, forward and backward; a resampler's attention scores are left out."""
    vlm = model(kind).train()
    counted = vlm.flops()
    assert counted is not None
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        vlm.image_embeddings({"pixel_values": pixels(vlm, 2)}).sum().backward()
    assert 2 * (counted.encoded + counted.image) == pytest.approx(
        counter.get_total_flops(), rel=0.1 if kind == "resampler" else 0.01
    )


def test_operations_of_a_hierarchical_encoder_are_not_reported() -> None:
    assert model("swin").flops() is None


def predictor(kind: str) -> Predictor:
    given = trained(kind)
    return Predictor(given.model, given.processor, given.prompt, given.settings)


def test_attention_to_merged_patches_is_drawn_and_to_latents_refused() -> None:
    picture = Image.effect_noise((40, 40), 50).convert("RGB")
    merged = predictor("pixel_shuffle")
    found = attribute(merged, picture, "what is it?", "red")
    assert found.heat.shape == (2, 2) and found.heat.sum() == pytest.approx(1)
    assert attribute(merged, picture, "what is it?", "red", method="gradient").heat.shape == (4, 4)
    latents = predictor("resampler")
    with pytest.raises(InputError, match=r"do not correspond one to one .*use method=gradient"):
        attribute(latents, picture, "what is it?", "red")
    assert attribute(latents, picture, "what is it?", "red", method="gradient").heat.shape == (4, 4)
