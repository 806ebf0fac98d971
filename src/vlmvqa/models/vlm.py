"""The model: a vision encoder, a projector, and a language model that reads image features as prefix tokens.

    pixel_values [I, 3, H, H] --vision--> [I, N, Dv] --projector--> [I, N, D] --+ (place)
    input_ids    [B, T]       --embedding-------------------------> [B, T, D] --+--> decoder --> [B, T, D]
    document, branch, role, position [B, T] ---one predicate---> mask [B, 1, T, T] --^              |
    labels       [B, T]       ---------------supervised positions only: logits [S, V], loss <-------+

Legend: B rows, T tokens, I images, N image tokens, D width, Dv vision width, S supervised tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from vlmvqa.errors import InputError, suggest
from vlmvqa.models.generation import Generated, GenerationSettings, beam_candidates, generate
from vlmvqa.models.language import LanguageModel, LanguageSettings, build_language_model
from vlmvqa.models.projector import Projector
from vlmvqa.models.vision import VisionEncoder, VisionSettings
from vlmvqa.sequence.loss import divided, supervised_loss
from vlmvqa.sequence.masks import ATTENTION_PATTERNS, SHAREABLE, Tokens
from vlmvqa.sequence.rows import IGNORE, NO_IMAGE

Batch = Mapping[str, Tensor]
AnyModel = TypeVar("AnyModel", bound=nn.Module)
PARTS = ("vision", "projector", "language")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ProjectorSettings:
    """`kind` "linear" or "mlp"; `dropout` on the projected features."""

    kind: str = "linear"
    dropout: float = 0.0


@dataclass(frozen=True)
class ModelSettings:
    """All that builds a `VLM`; `dtype` is that of the weights: "float32", "bfloat16", or frozen ones' "float16"."""

    vision: VisionSettings = field(default_factory=VisionSettings)
    projector: ProjectorSettings = field(default_factory=ProjectorSettings)
    language: LanguageSettings = field(default_factory=LanguageSettings)
    attention_pattern: str = "blockwise_prefix"
    dtype: str = "float32"


class VLM(nn.Module):
    """Vision encoder, projector and language model; `attention_pattern` says who sees whom (`sequence/masks.py`)."""

    # The loss is divided by the supervised tokens of the whole global batch, which only the trainer knows.
    accepts_loss_kwargs = True

    def __init__(
        self, vision: VisionEncoder, projector: Projector, language: LanguageModel, attention_pattern: str
    ) -> None:
        super().__init__()
        if attention_pattern not in ATTENTION_PATTERNS:
            raise InputError(
                f"model.attention_pattern={attention_pattern} is unknown; use one of {', '.join(ATTENTION_PATTERNS)}"
                f"{suggest(attention_pattern, ATTENTION_PATTERNS)}"
            )
        self.vision = vision
        self.projector = projector
        self.language = language
        self.attention_pattern = attention_pattern

    def image_embeddings(self, batch: Batch) -> Tensor:
        """`pixel_values [I, 3, H, H]` or cached `image_features [I, N, Dv]` -> `float[I * N, D]`."""
        dtype = next(self.projector.parameters()).dtype
        features = (
            batch["image_features"] if "image_features" in batch else self.vision(batch["pixel_values"].to(dtype))
        )
        projected: Tensor = self.projector(features.to(dtype))
        return projected.flatten(0, 1)

    def embed(self, batch: Batch) -> Tensor:
        """Text and image tokens in place: `float[B, T, D]`. One gather, one where, whatever the data."""
        text = self.language.embed(batch["input_ids"])
        images = self.image_embeddings(batch).to(text.dtype)
        index = batch["image_index"]
        return torch.where((index != NO_IMAGE)[..., None], images[index.clamp(min=0)], text)

    def tokens(self, batch: Batch) -> Tokens:
        """What the mask's predicate knows of the batch's tokens."""
        return Tokens.of(batch["document"], batch["branch"], batch["role"], batch["position"], self.attention_pattern)

    def decode(self, batch: Batch, cache: Cache | None = None) -> Tensor:
        """The last hidden state of every token: `float[B, T, D]`; fills the cache, if one is given."""
        hidden: Tensor = self.language(self.embed(batch), self.tokens(batch), cache=cache)
        return hidden

    def forward(self, num_items_in_batch: Tensor | int | None = None, **batch: Tensor) -> dict[str, Tensor]:
        """The loss over supervised positions.

        Args:
            num_items_in_batch: what the sum is divided by (default: the weights of this batch's supervised tokens,
                their number where all weigh the same). The trainer gives that of all accumulation steps and ranks.
            batch: as `data/processor.py` makes it; `weights` may be left out.

        Returns:
            `loss` (scalar) and `supervised_tokens` (scalar).
        """
        hidden, labels = self.decode(batch), batch["labels"]
        fused = self.language.fused_losses if self.language.loss == "fused" else None
        loss, weight = supervised_loss(hidden, labels, self.language.logits, weights=batch.get("weights"), fused=fused)
        return {
            "loss": divided(loss, weight, num_items_in_batch),
            "supervised_tokens": (labels != IGNORE).sum(),
        }

    def generate(
        self, batch: Batch, eos: Collection[int], decoding: GenerationSettings, keys: Sequence[int | str] | None = None
    ) -> list[Generated]:
        """Answer every question of a batch of rows without answers (`generation.py`)."""
        return generate(self, batch, eos, decoding, keys)

    def beam_candidates(
        self, batch: Batch, eos: Collection[int], decoding: GenerationSettings
    ) -> list[list[Generated]]:
        """The best beams of every question, `decoding.num_beams` of them, the best first."""
        return beam_candidates(self, batch, eos, decoding)

    @property
    def blocks(self) -> list[nn.Module]:
        """Every transformer block: what a strategy shards, and what is recomputed."""
        return [*self.vision.blocks, *self.language.blocks]

    @property
    def attention(self) -> str:
        """The decoder's backend."""
        return self.language.attention

    @property
    def shares_images(self) -> bool:
        """Whether several questions may be asked of an image in one row."""
        return self.attention_pattern in SHAREABLE

    def get_input_embeddings(self) -> nn.Module:
        """What the Trainer adds NEFTune's noise to."""
        embedding: nn.Module = self.language.decoder.get_input_embeddings()
        return embedding

    def part_of(self, name: str) -> str:
        """Which of "vision", "projector" and "language" a weight is of."""
        return name.split(".")[0]

    def part(self, name: str) -> Part:
        """A part as `set_trainable` wants it."""
        module = getattr(self, name)
        blocks, norm = getattr(module, "blocks", []), getattr(module, "final_norm", None)
        return Part(list(module.parameters()), blocks, [norm] if norm is not None else [])

    def checkpoint_activations(self) -> None:
        """Trade time for memory: recompute activations of encoder blocks and decoder layers in the backward pass."""
        self.vision.checkpoint_activations()
        self.language.checkpoint_activations()

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: Any = None, **options: Any) -> None:
        """What transformers' Trainer calls under `activation_checkpointing=true`."""
        if activation_checkpointing_kwargs or options.get("every_n_layers", 1) != 1 or options.get("offload"):
            raise InputError("trainer.activation_checkpointing_kwargs is not supported; leave it out")
        self.checkpoint_activations()


def build(settings: ModelSettings) -> VLM:
    """A `VLM` from settings, weights included."""
    if settings.dtype not in DTYPES:
        raise InputError(f"model.dtype={settings.dtype} is unknown; use one of {', '.join(DTYPES)}")
    vision = VisionEncoder(settings.vision)
    return assemble(vision, build_language_model(settings.language, DTYPES[settings.dtype]), settings)


def assemble(vision: VisionEncoder, language: LanguageModel, settings: ModelSettings) -> VLM:
    """Join an encoder and a language model by a new projector."""
    projector = Projector(vision.width, language.width, settings.projector.kind, settings.projector.dropout)
    return cast_parameters(VLM(vision, projector, language, settings.attention_pattern), DTYPES[settings.dtype])


def cast_parameters(model: AnyModel, dtype: torch.dtype) -> AnyModel:
    """The weights in another type; buffers keep theirs, because rotary frequencies rounded to bfloat16 are others."""
    for parameter in model.parameters():
        if parameter.is_floating_point():  # 4-bit weights are packed into bytes
            parameter.data = parameter.data.to(dtype)
    return model


@dataclass(frozen=True)
class Part:
    """A part's parameters, its transformer blocks, and the norm after them."""

    parameters: Sequence[nn.Parameter]
    blocks: Sequence[nn.Module] = ()
    final_norm: Sequence[nn.Module] = ()


def set_trainable(part: Part, choice: str | int, name: str) -> None:
    """Let a part train: "all", "none", or an int n for its last n blocks (the final norm with them)."""
    if isinstance(choice, bool) or (choice not in ("all", "none") and not isinstance(choice, int)):
        raise InputError(f"trainable.{name}={choice} is unknown; use all, none, or the number of last blocks")
    for parameter in part.parameters:
        parameter.requires_grad_(choice == "all")
    if isinstance(choice, int):
        if not 0 < choice <= len(part.blocks):
            raise InputError(f"trainable.{name}={choice}: no such number of last blocks there; use all or none")
        for module in (*part.blocks[-choice:], *part.final_norm):
            module.requires_grad_(True)
