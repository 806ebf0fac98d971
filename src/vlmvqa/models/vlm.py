"""The model: a vision encoder, a projector, and a language model that reads image features as prefix tokens.

    pixel_values [I, 3, H, H] --vision--> [I, N, Dv] --projector--> [I, M, D] --+ (place)
    input_ids    [B, T]       --embedding-------------------------> [B, T, D] --+--> decoder --> [B, T, D]
    document, branch, block, position [B, T] --one predicate---> mask [B, 1, T, T] --^              |
    labels       [B, T]       ---------------supervised positions only: logits [S, V], loss <-------+

`models/build.py` builds it from settings and loads its weights.

Legend: B rows, T tokens, I images, N features and M tokens of an image (equal unless the projector merges patches),
D width, Dv vision width, S supervised tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers.cache_utils import Cache

from vlmvqa.errors import InputError, suggest
from vlmvqa.models.interface import Generated, GenerationSettings, Model, Part
from vlmvqa.models.language import LanguageModel, LanguageSettings
from vlmvqa.models.projector import Projector
from vlmvqa.models.vision import VisionEncoder, VisionSettings
from vlmvqa.sequence.loss import divide_loss, supervised_loss
from vlmvqa.sequence.masks import Tokens
from vlmvqa.sequence.rows import ATTENTION_PATTERNS, IGNORE, NO_IMAGE, SHAREABLE, Batch

if TYPE_CHECKING:
    from vlmvqa.models.flops import Flops


@dataclass(frozen=True)
class ProjectorSettings:
    """Settings of the projector.

    Attributes:
        kind: one of `projector.LAYERS`, or a further kind.
        dropout: dropout on the projected features.
        scale_to_text: whether the initial output is scaled to the standard deviation of the text embeddings.
        options: arguments of a further kind's class.
    """

    kind: str = "linear"
    dropout: float = 0.0
    scale_to_text: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelSettings:
    """Settings of a `VLM`; `dtype` of the weights: "float32", "bfloat16", or for frozen weights "float16"."""

    family: ClassVar[str] = "vlm"
    vision: VisionSettings = field(default_factory=VisionSettings)
    projector: ProjectorSettings = field(default_factory=ProjectorSettings)
    language: LanguageSettings = field(default_factory=LanguageSettings)
    attention_pattern: str = "blockwise_prefix"
    dtype: str = "float32"


class VLM(Model):
    """Vision encoder, projector and language model; `attention_pattern` is a key of `rows.ATTENTION_PATTERNS`."""

    text_folder = "tokenizer"

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

    # ---- embed, place, mask, decode, loss

    def image_embeddings(self, batch: Batch) -> Tensor:
        """Project `pixel_values [I, 3, H, H]` or cached `image_features [I, N, Dv]` to `float[I * M, D]`."""
        dtype = next(self.projector.parameters()).dtype
        features = batch.get("image_features")
        if features is None:
            features = self.vision(batch["pixel_values"].to(dtype), batch.get("image_mask"))
        projected: Tensor = self.projector(features.to(dtype))
        return rearrange(projected, "i n d -> (i n) d")

    def embed(self, batch: Batch) -> Tensor:
        """Place the image embeddings among the text embeddings, `float[B, T, D]`: one gather and one `where`."""
        images = self.image_embeddings(batch)
        text = self.language.embed(batch["input_ids"])  # second: FSDP gathers its weight while the encoder computes
        index = batch["image_index"].flatten()
        is_image = index != NO_IMAGE
        # Text positions gather different image tokens, so that their zero gradients are not all added to one row.
        source = torch.where(is_image, index, torch.arange(len(index), device=index.device) % len(images))
        placed = rearrange(images.to(text.dtype).index_select(0, source), "(b t) d -> b t d", b=len(text))
        return torch.where(rearrange(is_image, "(b t) -> b t 1", b=len(text)), placed, text)

    def tokens(self, batch: Batch) -> Tokens:
        """Return the token properties that determine which tokens attend to which."""
        return Tokens.of(batch)

    def decode(self, batch: Batch, cache: Cache | None = None) -> Tensor:
        """Return the last hidden state of every token, `float[B, T, D]`; fill `cache` with keys and values."""
        hidden: Tensor = self.language(self.embed(batch), self.tokens(batch), cache=cache)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the output head: `float[S, D] -> float32[S, V]`."""
        return self.language.logits(hidden)

    def forward(self, num_items_in_batch: Tensor | int | None = None, **batch: Tensor) -> dict[str, Tensor]:
        """Compute the loss over supervised positions.

        Args:
            num_items_in_batch: divisor of the summed loss. The trainer passes the weight of all accumulation steps and
                ranks; by default it is the weight of this batch's supervised tokens.
            batch: as `data/processor.py` collates it; `weights` is optional.

        Returns:
            `loss` and `supervised_tokens`, both scalars.
        """
        hidden, labels = self.decode(batch), batch["labels"]
        fused = self.language.fused_losses
        loss, weight = supervised_loss(hidden, labels, self.logits, weights=batch.get("weights"), fused=fused)
        return {
            "loss": divide_loss(loss, weight, num_items_in_batch),
            "supervised_tokens": (labels != IGNORE).sum(),
        }

    # ---- answers

    def generate(
        self, batch: Batch, eos: Collection[int], decoding: GenerationSettings, keys: Sequence[int | str] | None = None
    ) -> list[Generated]:
        """Answer every question of rows without answers, in row order (see `generation.generate`)."""
        from vlmvqa.models.generation import generate

        return generate(self, batch, eos, decoding, keys)

    def beam_candidates(
        self, batch: Batch, eos: Collection[int], decoding: GenerationSettings
    ) -> list[list[Generated]]:
        """Return the finished beams of every question, best first, at most `decoding.num_beams`."""
        from vlmvqa.models.generation import beam_candidates

        return beam_candidates(self, batch, eos, decoding)

    # ---- the rest of the interface

    @property
    def blocks(self) -> list[nn.Module]:
        """Every transformer block of encoder and decoder."""
        return [*self.vision.blocks, *self.language.blocks]

    @property
    def attention(self) -> str:
        """Name of the decoder's attention backend."""
        return self.language.attention

    @property
    def num_image_tokens(self) -> int:
        """Number of tokens of an image in a row, M."""
        return self.projector.output.tokens

    @property
    def shares_images(self) -> bool:
        """Whether one row may hold several questions about an image."""
        return self.attention_pattern in SHAREABLE

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding, to which transformers' Trainer adds NEFTune's noise."""
        embedding: nn.Module = self.language.decoder.get_input_embeddings()
        return embedding

    def part(self, name: str) -> Part:
        """Return one of `interface.PARTS`."""
        if name == "projector":
            return Part(self.projector, list(self.projector.parameters()))
        module = self.vision if name == "vision" else self.language
        return Part(module, list(module.parameters()), module.blocks, module.final_norms)

    def checkpoint_activations(self) -> None:
        """Recompute activations of encoder blocks and decoder layers in the backward pass: less memory, more time."""
        self.vision.checkpoint_activations()
        self.language.checkpoint_activations()

    def describe_attention(self) -> str:
        """Return attention pattern and backend; raise InputError if the backend is not the configured one."""
        return f"{self.attention_pattern}, {self.language.describe_attention()}"

    def eager_attention(self) -> AbstractContextManager[Sequence[nn.Module]]:
        """Use attention that returns its weights, within the context; yield the decoder's attention modules."""
        return self.language.eager_attention()

    def patch_grid(self, batch: Batch) -> tuple[int, int]:
        """Return the rows and columns of patches of an image."""
        return self.vision.patch_grid

    def token_grid(self, batch: Batch) -> tuple[int, int] | None:
        """Return the rows and columns of image tokens; None if they form no grid."""
        return self.projector.output.grid

    def flops(self) -> Flops | None:
        """Return the floating-point operations per image and token (see `flops.count_flops`)."""
        from vlmvqa.models.flops import count_flops

        return count_flops(self.vision, self.projector, self.language)

    def saved_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of `config.json`: the given entries, the decoder's config, and names for `vlmvqa.hf`."""
        own = {"model_type": "vlmvqa", "architectures": ["VlmvqaForConditionalGeneration"]}
        return {**config, **own, "language_config": self.language.config.to_dict()}
