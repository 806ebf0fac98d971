"""Small real parts: the model's own classes at sizes where a test takes milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlmvqa.models.build import build
from vlmvqa.models.language import LanguageSettings
from vlmvqa.models.vision import VisionSettings
from vlmvqa.models.vlm import VLM, ModelSettings, ProjectorSettings
from vlmvqa.sequence.rows import Document, TokenizedQuestion, build_row, pad_rows

VOCABULARY, EOS = 96, 1
IMAGE_SIZE = 28

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "eos_token_id": EOS,
    "bos_token_id": 2,
    # Weights ten times the usual: scores reach the softcaps, so that dropping one changes the result.
    "initializer_range": 0.2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    # A window shorter than a row, so that local layers differ from global ones.
    "gemma2": {**COMMON, "query_pre_attn_scalar": 8, "sliding_window": 12, "attn_logit_softcapping": 5.0},
    "gemma": COMMON,
    "llama": COMMON,
    "qwen2": {key: value for key, value in COMMON.items() if key != "head_dim"},
    "mistral": {**COMMON, "sliding_window": 12},
}
VISION = {"patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 1.0}


def settings(attention_pattern: str = "blockwise_prefix", family: str = "gemma2", **language: Any) -> ModelSettings:
    return ModelSettings(
        vision=VisionSettings(image_size=IMAGE_SIZE, weights="random", overrides=VISION),
        projector=ProjectorSettings(),
        language=LanguageSettings(name=family, weights="random", overrides={**FAMILIES[family], **language}),
        attention_pattern=attention_pattern,
    )


def model(attention_pattern: str = "blockwise_prefix", family: str = "gemma2", seed: int = 0, **language: Any) -> VLM:
    torch.manual_seed(seed)
    return build(settings(attention_pattern, family, **language)).eval()


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def question(prompt: int, answer: int, seed: int = 0) -> TokenizedQuestion:
    """A question of so many prompt and answer tokens (EOS is added), none of them special."""
    generator = torch.Generator().manual_seed(1000 * seed + 10 * prompt + answer)
    ids = torch.randint(3, VOCABULARY, (prompt + answer,), generator=generator).tolist()
    return TokenizedQuestion(ids[:prompt], [*ids[prompt:], EOS] if answer else [])


def documents(
    questions_per_image: Sequence[int], seed: int = 0, tiles: Sequence[Sequence[int]] | None = None
) -> list[Document]:
    """Images with so many questions of different lengths; with `tiles`, documents of so many tiles per image."""
    found, first = [], 0
    for number, count in enumerate(questions_per_image):
        blocks = (1,) if tiles is None else tiles[number]
        images = list(range(first, first + sum(blocks)))
        questions = [question(3 + (n + number) % 4, 1 + n % 3, seed + 31 * number + n) for n in range(count)]
        found.append(Document(images, questions, blocks))
        first += len(images)
    return found


def without_answers(given: Sequence[Document]) -> list[Document]:
    return [replace(d, questions=[TokenizedQuestion(q.prompt) for q in d.questions]) for d in given]


def apart(given: Sequence[Document]) -> list[list[Document]]:
    """A row for each question alone."""
    return [[replace(d, questions=[q])] for d in given for q in d.questions]


def batch(vlm: VLM, rows: Sequence[Sequence[Document]], pixels: Tensor, multiple: int = 8) -> dict[str, Tensor]:
    """Rows whose documents hold indices into `pixels`, consecutive within a row."""
    images = [[image for document in row for image in document.images] for row in rows]
    assert all([image - row[0] for image in row] == list(range(len(row))) for row in images)
    built = [
        build_row(row, vlm.num_image_tokens, vlm.attention_pattern, first)
        for row, (first, *_) in zip(rows, images, strict=True)
    ]
    return {"pixel_values": pixels, **pad_rows(built, multiple)}
