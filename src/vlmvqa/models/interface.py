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
    """A part of a model: its module (`nn.Module`), parameters, transformer blocks, and the norm after them."""

    module: Any
    parameters: Sequence[nn.Parameter]
    blocks: Sequence[nn.Module] = ()
    final_norm: Sequence[nn.Module] = ()


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

    @property
    def adapter_host(self) -> nn.Module:
        """The module whose parameter names appear in files of weights and adapters."""

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

    def part_of(self, name: str) -> str:
        """Return the part that the parameter `name` belongs to."""

    def checkpoint_activations(self) -> None:
        """Recompute the activations of every block in the backward pass."""

    def describe_attention(self) -> str:
        """Return a line for the table of a run; raise InputError if another implementation runs than configured."""

    def eager_attention(self) -> AbstractContextManager[Sequence[nn.Module]]:
        """Use attention that returns its weights, within the context; yield the decoder's attention modules."""

    def patch_grid(self, batch: Batch) -> tuple[int, int]:
        """Return the rows and columns of patches that the encoder computes from an image of the batch."""

    def flops(self) -> Flops | None:
        """Return the floating-point operations per image and token; None if they cannot be counted."""

    def module_path(self, name: str) -> str:
        """Return the path of a module of `adapter_host`: its part, then its name within that part."""

    def saved_name(self, name: str) -> str:
        """Return the name that the parameter `name` has in files of weights."""

    def saved_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of `config.json`: the given entries with the network's own config."""

    def save_extras(self, folder: Path) -> None:
        """Write the files of a saved model other than config, weights and tokenizer."""


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
        """Return the part that a parameter belongs to."""
        return name.split(".")[0]

    def module_path(self, name: str) -> str:
        """Return a module's part with its name in it."""
        return name

    def saved_name(self, name: str) -> str:
        """Return a parameter's name in files of weights."""
        return name

    def save_extras(self, folder: Path) -> None:
        """Write no files other than config, weights and tokenizer."""

    def flops(self) -> Flops | None:
        """Return None: the operations cannot be counted."""
        return None


def answering_dtype(choice: str, saved: str, device: str | torch.device) -> str:
    """Return the data type of the weights of a model that answers questions, a key of `DTYPES`.

    Args:
        choice: a key of `DTYPES`; "saved"; or "auto": bfloat16 for float32 weights on a GPU that computes in it, else
            `saved`.
        saved: data type in which the weights are saved or trained.
        device: where the model runs.

    Raises:
        InputError: unknown choice.
    """
    if choice in DTYPES:
        return choice
    if choice not in ("auto", "saved"):
        raise InputError(f"dtype={choice} is unknown; use auto, saved, {', '.join(DTYPES)}")
    if choice == "saved" or saved != "float32" or torch.device(device).type != "cuda":
        return saved
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else saved


def set_trainable(part: Part, choice: str | int, name: str) -> None:
    """Set which parameters of a part train.

    Args:
        choice: "all", "none", or an int n for the last n blocks with the final norm.
        name: the part's name, for error messages.

    Raises:
        InputError: unknown choice, or the part has fewer blocks.
    """
    if isinstance(choice, bool) or (choice not in ("all", "none") and not isinstance(choice, int)):
        raise InputError(f"trainable.{name}={choice} is unknown; use all, none, or the number of last blocks")
    for parameter in part.parameters:
        parameter.requires_grad_(choice == "all")
    if isinstance(choice, int):
        if not 0 < choice <= len(part.blocks):
            raise InputError(f"trainable.{name}={choice}: no such number of last blocks there; use all or none")
        for module in (*part.blocks[-choice:], *part.final_norm):
            module.requires_grad_(True)


def set_trainable_parts(model: Model, trainable: Mapping[str, str | int]) -> None:
    """Set which parameters of each part train; values as in `set_trainable`."""
    for name, choice in trainable.items():
        set_trainable(model.part(name), choice, name)


def cast_parameters(model: AnyModule, dtype: torch.dtype) -> AnyModule:
    """Cast the weights, but not the buffers: rotary frequencies rounded to bfloat16 are other frequencies."""
    for parameter in model.parameters():
        if parameter.is_floating_point():  # 4-bit weights are packed into bytes
            parameter.data = parameter.data.to(dtype)
    return model
