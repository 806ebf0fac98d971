"""Interface of the model families, and functions for any model.

Training, inference and the extras use these methods only. The families are `VLM` (`models/vlm.py`) and `PretrainedVLM`
(`extras/pretrained/model.py`), which wraps a vision-language model of transformers.

Legend: B rows, T tokens, I images, N image tokens, D width, S supervised tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import Field, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from vlmvqa.errors import InputError
from vlmvqa.sequence.rows import Batch

if TYPE_CHECKING:
    from vlmvqa.models.flops import Flops

AnyModule = TypeVar("AnyModule", bound=nn.Module)
PARTS = ("vision", "projector", "language")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Settings(Protocol):
    """The dataclass that a family's models are built from, and the family's name."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    family: ClassVar[str]

    @property
    def dtype(self) -> str:
        """Data type of the weights, a key of `DTYPES`."""


@dataclass(frozen=True)
class Part:
    """A part of a model: its module (`nn.Module`), parameters, transformer blocks, and the norms after them."""

    module: Any
    parameters: Sequence[nn.Parameter]
    blocks: Sequence[nn.Module] = ()
    final_norms: Sequence[nn.Module] = ()


@dataclass(frozen=True)
class GenerationSettings:
    """Settings of generation.

    Attributes:
        max_new_tokens: most tokens in an answer, EOS included.
        num_beams: 1 for greedy decoding or sampling, more for beam search.
        temperature: 0 for the most probable token, above 0 for sampling (one beam only).
        length_penalty: beam search divides a log-probability by length ** length_penalty (transformers' rule).
        seed: seed of the sampling. Every question has its own random stream, whatever else is in its batch.
        static_cache: keep keys and values in tensors of a fixed size, so that a GPU replays each decode step as one
            CUDA graph (one beam only; see `models/static_cache.py`).
    """

    max_new_tokens: int = 20
    num_beams: int = 1
    temperature: float = 0.0
    length_penalty: float = 1.0
    seed: int = 0
    static_cache: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.num_beams < 1 or self.temperature < 0:
            raise InputError("decoding: max_new_tokens and num_beams must be at least 1, temperature at least 0")
        if self.num_beams > 1 and self.temperature > 0:
            raise InputError(
                "decoding: beam search does not sample; set decoding.temperature=0 or decoding.num_beams=1"
            )
        if self.num_beams > 1 and self.static_cache:
            raise InputError(
                "decoding: beam search does not support a static cache; set decoding.static_cache=false or "
                "decoding.num_beams=1"
            )


@dataclass(frozen=True)
class Generated:
    """Token ids of an answer without EOS, and their log-probability, EOS included."""

    tokens: list[int]
    log_probability: float


class VisionLanguageModel(Protocol):
    """The interface of a model family.

    Attributes:
        attention_pattern: which tokens see which, a key of `sequence.rows.ATTENTION_PATTERNS`.
        text_folder: subfolder of a saved model that holds its tokenizer or processor.
    """

    attention_pattern: str
    text_folder: ClassVar[str]

    @property
    def shares_images(self) -> bool:
        """Whether one row may hold several questions about an image."""

    @property
    def attention(self) -> str:
        """Name of the decoder's attention implementation."""

    @property
    def blocks(self) -> list[nn.Module]:
        """Every transformer block: the units that are sharded and recomputed."""

    def forward(self, num_items_in_batch: Tensor | int | None = None, **batch: Tensor) -> dict[str, Tensor]:
        """Return `loss` (supervised losses over `num_items_in_batch`) and `supervised_tokens`, both scalars."""

    def image_embeddings(self, batch: Batch) -> Tensor:
        """Return the embeddings of the image tokens, in the order of the rows: `float[I * N, D]`."""

    def decode(self, batch: Batch) -> Tensor:
        """Return the last hidden state of every token: `float[B, T, D]`."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the output head: `float[S, D] -> float32[S, V]`."""

    def generate(
        self, batch: Batch, eos: Collection[int], decoding: GenerationSettings, keys: Sequence[int | str] | None = None
    ) -> list[Generated]:
        """Answer every question of rows without answers, in row order (see `generation.generate`)."""

    def beam_candidates(
        self, batch: Batch, eos: Collection[int], decoding: GenerationSettings
    ) -> list[list[Generated]]:
        """Return the finished beams of every question, best first, at most `decoding.num_beams`."""

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding, to which transformers' Trainer adds NEFTune's noise."""

    def part(self, name: str) -> Part:
        """Return one of `PARTS`."""

    def checkpoint_activations(self) -> None:
        """Recompute the activations of every block in the backward pass."""

    def describe_attention(self) -> str:
        """Return a line for the table of a run; raise InputError if another implementation runs than configured."""

    def eager_attention(self) -> AbstractContextManager[Sequence[nn.Module]]:
        """Use attention that returns its weights, within the context; yield the decoder's attention modules."""

    def patch_grid(self, batch: Batch) -> tuple[int, int]:
        """Return the rows and columns of patches that the encoder computes from an image of the batch."""

    def saved_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of `config.json`: the given entries with the network's own config."""


class Model(nn.Module, VisionLanguageModel):
    """A `torch.nn.Module` with the interface: the base class of both families, and the type in signatures."""

    # transformers' Trainer then passes `num_items_in_batch`: only it knows the size of the global batch.
    accepts_loss_kwargs = True

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: Any = None, **options: Any) -> None:
        """Enable activation checkpointing; transformers' Trainer calls this.

        Raises:
            InputError: options were given.
        """
        if activation_checkpointing_kwargs or options.get("every_n_layers", 1) != 1 or options.get("offload"):
            raise InputError("trainer.activation_checkpointing_kwargs is not supported; leave it out")
        self.checkpoint_activations()

    def tie_weights(self) -> None:
        """Share tied weights again after parameters were replaced."""

    # ---- A family whose network is the model itself has the same names everywhere.

    @property
    def adapter_host(self) -> nn.Module:
        """The module whose parameter names appear in files of weights and adapters."""
        return self

    def part_of(self, name: str) -> str:
        """Return the part that the parameter `name` belongs to."""
        return name.split(".")[0]

    def module_path(self, name: str) -> str:
        """Return the path of a module of `adapter_host`: its part, then its name within that part."""
        return name

    def saved_name(self, name: str) -> str:
        """Return the name that the parameter `name` has in files of weights."""
        return name

    def save_extras(self, folder: Path) -> None:
        """Write the files of a saved model other than config, weights and tokenizer: none."""

    def flops(self) -> Flops | None:
        """Return the floating-point operations per image and token; None: they cannot be counted."""
        return None

    def token_grid(self, batch: Batch) -> tuple[int, int] | None:
        """Return the rows and columns of an image's last tokens; None if they form no grid."""
        return self.patch_grid(batch)


def cast_parameters(model: AnyModule, dtype: torch.dtype) -> AnyModule:
    """Cast the weights, but not the buffers: rotary frequencies rounded to bfloat16 are other frequencies."""
    for parameter in model.parameters():
        if parameter.is_floating_point():  # 4-bit weights are packed into bytes
            parameter.data = parameter.data.to(dtype)
    return model
