"""Plans of pretrained models and adapters against real steps of tiny models and bitsandbytes' real sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from tests import tiny
from tests.configs import config
from vlmvqa.config.schema import DistSettings
from vlmvqa.errors import InputError
from vlmvqa.extras.adapters import peft_adapters
from vlmvqa.extras.adapters.peft_adapters import AdapterSettings
from vlmvqa.extras.planning import memory, quantized_memory, verify
from vlmvqa.extras.planning.batches import Rows, dummy_batch, num_image_tokens
from vlmvqa.extras.planning.gpus import GIB, GPUS
from vlmvqa.extras.planning.memory import Precision, build_on_meta, build_random, measure
from vlmvqa.extras.planning.memory_tracker import MemoryTracker
from vlmvqa.extras.planning.planner import STRATEGIES, Planner, Training
from vlmvqa.extras.planning.published_sizes import PUBLISHED, known_config
from vlmvqa.extras.planning.run import PlanConfig, build_planner
from vlmvqa.extras.planning.strategy_memory import strategy_memory, weights_of
from vlmvqa.extras.pretrained.model import PretrainedSettings
from vlmvqa.paths import CONF

ALL = {"vision": "all", "projector": "all", "language": "all"}
NONE = {"vision": "none", "projector": "none", "language": "none"}
PROJECTOR = {**NONE, "projector": "all"}
ROWS = Rows(rows=4, questions=1, text_tokens=12, answer_tokens=3)


def tiny_settings(name: str, **changes: Any) -> PretrainedSettings:
    """conf/model/tiny_<name>.yaml, with the last id of its vocabulary as the image token."""
    known: Any = OmegaConf.to_container(OmegaConf.load(CONF / "model" / f"tiny_{name}.yaml"))
    token = {"paligemma": "image_token_index", "idefics2": "image_token_id"}[name]
    overrides = {**known["overrides"], token: 1663}
    return PretrainedSettings(**{"pretrained": name, "weights": "random", "overrides": overrides, **changes})


def planner(settings: Any, adapt: AdapterSettings | None, trainable: Any = NONE, **changes: Any) -> Planner:
    values: dict[str, Any] = {"rows": ROWS, "training": Training("fp32", "adamw_torch"), "gpu": GPUS["a10g"], "gpus": 1}
    return Planner(**{"settings": settings, "trainable": trainable, **values, "adapt": adapt, **changes})


def published(name: str, adapt: AdapterSettings | None, **changes: Any) -> Planner:
    settings = PretrainedSettings(name, dtype="float32" if adapt is None else "bfloat16")
    return planner(settings, adapt, ALL if adapt is None else NONE, training=Training("bf16", "adamw_torch"), **changes)


# ---- sizes and rows


@pytest.mark.parametrize(
    "name,parameters,tokens",
    [
        ("google/paligemma-3b-pt-224", 2_923_466_480, 256),
        ("google/paligemma-3b-pt-448", 2_924_351_216, 1024),
        ("google/paligemma-3b-pt-896", 2_927_890_160, 4096),
        ("google/paligemma2-3b-pt-224", 3_032_242_416, 256),
        ("HuggingFaceM4/idefics2-8b", 8_402_768_112, 320),
    ],
)
def test_published_sizes_need_no_network(name: str, parameters: int, tokens: int) -> None:
    settings = PretrainedSettings(name)
    assert num_image_tokens(settings) == tokens
    assert sum(weight.numel for weight in weights_of(build_on_meta(settings, ALL))) == parameters


def test_a_row_is_one_question() -> None:
    whole = PretrainedSettings("HuggingFaceM4/idefics2-8b", image_splitting=False)
    assert num_image_tokens(whole) == 64
    settings = PretrainedSettings("google/paligemma-3b-pt-224")
    assert (
        planner(settings, None, ALL, rows=replace(ROWS, text_tokens=64)).shape.tokens == 328
    )  # 256 + 2 + 63, in eights
    shape = planner(settings, None, ALL).shape
    assert (shape.images, shape.supervised) == (1, ROWS.answer_tokens)


# ---- weights


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("wide,high", [(64, 96), (1152, 4304), (33, 5)])
def test_four_bits_are_bitsandbytes_bytes(wide: int, high: int, double: bool) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = bitsandbytes.nn.Params4bit(torch.randn(high, wide), compress_statistics=double, quant_type="nf4").to("cpu")
    state = weight.quant_state
    tensors = [weight.data, state.absmax, state.code]
    if double:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    assert quantized_memory.quantized_bytes(wide * high, double) == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("bits", [None, 4])
def test_frozen_weights_keep_their_type_and_have_no_gradients(bits: int | None) -> None:
    pytest.importorskip("bitsandbytes")
    settings, adapt = tiny_settings("paligemma", dtype="bfloat16"), AdapterSettings(bits=bits)
    weights = weights_of(build_on_meta(settings, NONE, adapt))
    kept = strategy_memory(weights, DistSettings("ddp"), 1, Training("bf16", "adamw_torch"))
    model = build_random(settings)
    peft_adapters.prepare(model, NONE, adapt)
    learnt = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert kept.gradients == 4 * learnt and kept.optimizer == 8 * learnt  # adapters are float32
    frozen = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            state = getattr(parameter, "quant_state", None)
            more = [] if state is None else [state.absmax, state.code, state.offset, state.state2.absmax]
            frozen += (
                parameter.nbytes + sum(t.nbytes for t in more) + (0 if state is None else state.state2.code.nbytes)
            )
    assert kept.parameters == frozen + 4 * learnt
    whole = sum(weight.numel for weight in weights)
    assert whole == sum(weight.numel for weight in weights_of(build_on_meta(settings, NONE, AdapterSettings())))


def test_two_ranks_send_gradients_of_adapters_alone() -> None:
    weights = weights_of(build_on_meta(tiny_settings("paligemma", dtype="bfloat16"), NONE, AdapterSettings()))
    two = strategy_memory(weights, DistSettings("ddp"), 2, Training("bf16", "adamw_torch"))
    assert two.reduced_each_step == two.gradients == 4 * sum(w.numel for w in weights if w.trained)
    zero = strategy_memory(weights, DistSettings("zero2"), 2, Training("bf16", "adamw_torch"))
    assert zero.parameters == 2 * sum(w.numel for w in weights) and zero.gradients < two.gradients


# ---- a pass

DORA = AdapterSettings(method="dora", targets=["language.*.q_proj", "vision.*.k_proj"])
CASES = [
    ("paligemma", NONE, AdapterSettings(), True),
    ("paligemma", PROJECTOR, DORA, False),
    ("paligemma", ALL, None, True),
    ("paligemma", {"vision": 1, "projector": "all", "language": 1}, None, False),
    pytest.param("idefics2", NONE, AdapterSettings(), False, marks=pytest.mark.slow),
    pytest.param("idefics2", ALL, None, True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name,trainable,adapt,checkpointing", CASES)
def test_a_pass_without_data_holds_what_a_real_one_does(
    name: str, trainable: Any, adapt: AdapterSettings | None, checkpointing: bool
) -> None:
    settings = tiny_settings(name, image_splitting=True if name == "idefics2" else None)
    plans = planner(settings, adapt, trainable)
    profile = measure(plans.model, settings, plans.shape, Precision(None, False), checkpointing)
    model = build_random(settings).train()
    peft_adapters.prepare(model, trainable, adapt)
    if checkpointing:
        model.checkpoint_activations()
    for rows in (3, 8):
        batch = dummy_batch(settings, plans.shape, rows)
        real = memory.profile(model, batch, plans.shape, Precision(None, False)).at(rows)
        planned = profile.at(rows)
        for held in ("kept", "activations", "decoder_peak", "peak_and_gradients"):
            assert getattr(planned, held) == pytest.approx(getattr(real, held), rel=0.05), held


@pytest.mark.parametrize("family", ["paligemma", "own"])
def test_weights_in_four_bits_are_whole_while_they_are_multiplied_with(family: str) -> None:
    """The stand-ins against bitsandbytes' layers in a real pass."""
    pytest.importorskip("bitsandbytes")
    settings = tiny.settings() if family == "own" else tiny_settings("paligemma")
    adapt = AdapterSettings(bits=4, compute_dtype="float32")
    plans = planner(settings, adapt)
    planned = plans.profile(STRATEGIES["ddp"], False).at(4)
    model = build_random(settings).train()
    peft_adapters.prepare(model, NONE, adapt)
    batch = dummy_batch(settings, plans.shape, 4)
    real = memory.profile(model, batch, plans.shape, Precision(None, False)).at(4)
    assert planned.kept == pytest.approx(real.kept, rel=0.05)
    assert planned.decoder_peak == pytest.approx(real.decoder_peak, rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_worst_moment_is_that_of_a_real_run(checkpointing: bool) -> None:
    """Compared with three real steps under `MemoryTracker`."""
    settings, adapt = tiny_settings("paligemma"), AdapterSettings()
    plans = planner(settings, adapt, training=Training("fp32", "adamw_torch", 2))
    planned = plans.memory("ddp", 4, checkpointing)
    model = build_random(settings).train()
    peft_adapters.prepare(model, NONE, adapt)
    if checkpointing:
        model.checkpoint_activations()
    batch: dict[str, Tensor] = dummy_batch(settings, plans.shape, 4)
    tracker = MemoryTracker()
    tracker.exclude([*model.parameters(), *model.buffers()])
    tracker.include(batch.values())
    with tracker:
        verify.train_steps(model, batch, plans.training)
    beside = max(alive for alive, *_ in tracker.timeline)
    assert planned.peak == pytest.approx(beside + planned.parameters, rel=0.05)


# ---- plans


@pytest.mark.slow
def test_lora_fits_sixteen_gigabytes_and_full_tuning_does_not() -> None:
    """PaliGemma 3B at 224 pixels, with activation checkpointing."""
    name, card = "google/paligemma-3b-pt-224", GPUS["a4000"]
    lora = published(name, AdapterSettings(), gpu=card).memory("ddp", 4, True)
    assert lora.fits and 5.4 < lora.parameters / GIB < 5.6
    full = published(name, None, gpu=card).strategy_memory(STRATEGIES["ddp"])
    assert full.parameters + full.gradients + full.optimizer == 16 * 2_923_466_480 > card.memory * GIB
    qlora = published(name, AdapterSettings(bits=4), gpu=card).strategy_memory(STRATEGIES["ddp"])
    assert 2 < qlora.parameters / GIB < 2.6  # the table of 257,216 words stays in bfloat16
    assert qlora.gradients == lora.gradients


def test_what_cannot_shard_is_left_out() -> None:
    settings = tiny_settings("paligemma", dtype="bfloat16")
    packed = planner(settings, AdapterSettings(bits=4))
    assert packed.names() == ["ddp", "zero1", "zero2"]
    assert planner(settings, AdapterSettings()).names() == ["ddp", "zero1", "zero2", "zero3", "zero3_offload"]
    assert planner(replace(settings, dtype="float32"), AdapterSettings()).names() == list(STRATEGIES)
    paged = Training("bf16", "paged_adamw_32bit")
    assert "fsdp" not in planner(settings, None, ALL, training=paged).names()
    with pytest.raises(
        InputError, match=r"dist=zero3 cannot be planned with fp32, adamw_torch and bfloat16 weights, in 4 bits"
    ):
        packed.add(DistSettings("zero3"))


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"model\.pretrained=nobody/nothing are not on this machine, and a plan uses no"
    ):
        known_config(PretrainedSettings("nobody/nothing"))
    with pytest.raises(InputError, match=r"doesn't know the number of image tokens of llava"):
        known_config(PretrainedSettings("llava", weights="random"))
    with pytest.raises(InputError, match=r"T4 .* set adapt\.compute_dtype=float16"):
        planner(tiny_settings("paligemma"), AdapterSettings(bits=4), gpu=GPUS["t4"])
    half, brain = Training("fp16", "adamw_torch"), tiny_settings("paligemma", dtype="bfloat16")
    with pytest.raises(
        InputError, match=r"trainer\.fp16=true fails with bfloat16 and 4-bit weights; set model\.dtype=float32"
    ):
        planner(brain, AdapterSettings(bits=4, compute_dtype="float16"), training=half)
    with pytest.raises(InputError, match=r"data\.row_tokens: rows of paligemma are not packed"):
        planner(tiny_settings("paligemma"), None, ALL, rows=replace(ROWS, row_tokens=64))


@pytest.mark.parametrize("dtype,bits", [("float32", 4), ("bfloat16", None)])
def test_a_card_without_bfloat16_is_planned_in_float16(dtype: str, bits: int | None) -> None:
    adapt = AdapterSettings(bits=bits, compute_dtype="float16")
    settings = tiny_settings("paligemma", dtype=dtype)
    assert planner(settings, adapt, gpu=GPUS["t4"], training=Training("fp16", "adamw_torch")).plan("ddp", True).fits


@pytest.mark.parametrize(
    "model,adapt",
    [
        *(("paligemma_3b", adapt) for adapt in ("full", "projector", "partial", "lora", "dora", "qlora")),
        *(("idefics2_8b", adapt) for adapt in ("full", "qlora")),
    ],
)
def test_every_way_to_adapt_is_planned(model: str, adapt: str) -> None:
    found = build_planner(
        config(PlanConfig, "plan", f"model={model}", f"adapt={adapt}", "data=docvqa", "plan.gpu=a4000")
    )
    assert found.settings.pretrained in PUBLISHED  # type: ignore[union-attr]
    assert found.rows.questions == 1 and found.rows.text_tokens == 256
    whole = sum(weight.numel for weight in found.weights)
    learnt = sum(weight.numel for weight in found.weights if weight.trained)
    assert (learnt == whole) == (adapt == "full")
    assert found.settings.dtype == ("bfloat16" if "lora" in adapt or adapt == "dora" else "float32")


def test_a_layer_that_stands_in_has_the_shape_of_the_one_it_replaces() -> None:
    layer = quantized_memory.QuantizedLinear(nn.Linear(6, 4), AdapterSettings(bits=4, compute_dtype="float32"))
    values = torch.ones(2, 6, requires_grad=True)
    out = layer(values)
    out.sum().backward()
    assert out.shape == (2, 4) and values.grad is not None and values.grad.shape == (2, 6)
