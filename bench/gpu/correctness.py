"""Loss and gradients of the fast data types and kernels, compared with dense attention in fp32 on the same weights.

The model has the real widths (heads of 256, 256,000 words) but two encoder blocks and two decoder layers, one of them
local. Images have more tokens than its window, so that the window hides some of them. All weights are rounded to
bfloat16 first, so that an error is that of the computation.

FlexAttention passes if its errors are at most 1.2 times those of dense attention in bfloat16.
The comparison would find a wrong mask or score: on a CPU in fp32, with 8,000 words and a row of 768 tokens, gradients
differ by 88 % without the window and by 30 % without the softcap.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from bench import models
from bench.gpu import sizes as gpu_sizes
from bench.gpu.section import Row, Section
from vlmvqa.models.interface import cast_parameters
from vlmvqa.models.vlm import VLM

TIMES, LOSS_ERROR = 1.2, 2**-8  # one number may be exact by chance, so bfloat16's precision is allowed
EMBEDDING = 0.2  # factor of the embedding's initial weights


class Variant(NamedTuple):
    """How a row computes: data type of the weights, attention, and whether under autocast to bfloat16."""

    dtype: torch.dtype
    attention: str
    autocast: bool = False


VARIANTS = {
    "bf16 dense": Variant(torch.bfloat16, "dense"),
    "bf16 flex": Variant(torch.bfloat16, "flex"),
    "autocast flex": Variant(torch.float32, "flex", autocast=True),
}


def correctness(section: Section) -> None:
    """Compare for both attention patterns and both layouts."""
    if not section.cuda:
        section.notes.append("FlexAttention runs without its kernels (aot_eager) on the CPU")
    sizes = section.sizes
    exact = models.build_model(
        *(sizes.name, sizes.correct_shape, section.device),
        dtype=torch.float32,
        vision=sizes.correct_vision,
        language=sizes.correct_language,
    )
    # Two layers add little to an embedding: unless it is small, the loss depends on nothing else.
    with torch.no_grad():
        exact.language.decoder.get_input_embeddings().weight.mul_(EMBEDDING)
    cast_parameters(cast_parameters(exact, torch.bfloat16), torch.float32)
    with gpu_sizes.flex_available(section.device):
        for pattern in gpu_sizes.PATTERNS:
            for rows, tokens in sizes.correct_rows:
                if section.late:
                    section.row(f"{pattern}, {rows} x {tokens:,}", dict)  # adds a skipped row
                else:
                    _compare_layout(section, exact, pattern, rows, tokens)


def _compare_layout(section: Section, exact: VLM, pattern: str, rows: int, tokens: int) -> None:
    exact.attention_pattern = pattern
    batch = _batch(section, exact, rows, tokens)
    expected = results(exact, batch, Variant(torch.float32, "dense"))
    label = f"{pattern}, {rows} x {tokens:,}"
    found = {
        name: section.row(f"{name}, {label}", errors, exact, batch, expected, variant)
        for name, variant in VARIANTS.items()
    }
    dense = found.pop("bf16 dense")
    for name, row in found.items():
        for key in sorted(key for key in row.keys() & dense.keys() if key == "loss" or key.startswith("gradients")):
            least = LOSS_ERROR if key == "loss" else 0.0
            section.compare(f"{name}, {label}: error of {key}", row[key], max(TIMES * dense[key], least))


def _batch(section: Section, model: VLM, rows: int, tokens: int) -> gpu_sizes.Batch:
    sizes = section.sizes
    documents = gpu_sizes.full_rows(sizes.correct_shape, rows, tokens, model.num_image_tokens, models.vocabulary(model))
    images = 1 + max(image for row in documents for document in row for image in document.images)
    return models.make_batch(model, documents, models.random_pixels(model, images), multiple=tokens)


def results(model: VLM, batch: Mapping[str, Tensor], variant: Variant) -> dict[str, Tensor]:
    """Return the loss, and the gradient of each parameter."""
    if variant.dtype != torch.float32:
        model = cast_parameters(copy.deepcopy(model), variant.dtype)
    model.zero_grad(set_to_none=True)
    model.language.set_attention(variant.attention)
    try:
        with torch.autocast(batch["labels"].device.type, torch.bfloat16, enabled=variant.autocast):
            loss = model(**batch)["loss"]
        loss.backward()
    finally:
        model.language.set_attention("dense")
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), **found}


def errors(model: VLM, batch: Mapping[str, Tensor], expected: Mapping[str, Tensor], variant: Variant) -> Row:
    """Return the relative error of the loss, and of the gradients of each part of the model together."""
    found = results(model, batch, variant)
    if found.keys() != expected.keys():
        raise ValueError(f"other parameters have gradients: {sorted(found.keys() ^ expected.keys())}")
    parts: dict[str, list[str]] = {"loss": ["loss"]}
    for name in expected:
        if name != "loss":
            part = "embedding" if "embed_tokens" in name else name.split(".")[0]
            parts.setdefault(f"gradients_{part}", []).append(name)
    return {part: _relative(found, expected, names) for part, names in parts.items()}


def _relative(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], names: list[str]) -> float:
    wrong = sum((found[name].float() - expected[name]).square().sum() for name in names)
    size = sum(expected[name].square().sum() for name in names)
    return float((torch.as_tensor(wrong) / torch.as_tensor(size)).sqrt())
