"""The language model: a transformers decoder that takes embeddings and this project's masks.

Any decoder-only model of transformers that takes `inputs_embeds` works; the project is built around Gemma 2. The causal
language model is the library's class: only its masks, and where its logits are computed, differ.

Legend: B rows, T tokens, K keys, D width, S supervised tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from vlmvqa.errors import InputError
from vlmvqa.models.attention import SOFTCAP
from vlmvqa.sequence.masks import Tokens, block_mask, dense_mask, key_spans

BACKENDS = ("dense", "flex")
LOSSES = ("chunked", "fused")
LAYER_KINDS = ("full_attention", "sliding_attention")
# Config fields of output heads that rescale logits, which `final_logits` does not do.
UNKNOWN_HEADS = ("logits_scaling", "logit_scale", "lm_head_multiplier")


@dataclass(frozen=True)
class LanguageSettings:
    """Settings of the decoder.

    Attributes:
        name: a hub id or local folder (its config, and with weights="hub" its weights), or an architecture of
            transformers ("gemma2", "llama", "qwen2"...) with its config class's defaults.
        weights: "hub" (also for a local folder) or "random".
        overrides: fields of the config class, for random weights.
        attention: "dense" (a boolean mask, any device) or "flex" (FlexAttention's BlockMask, CUDA).
        loss: "chunked" (logits of some supervised tokens at a time) or "fused" (cut-cross-entropy's kernel, CUDA,
            which stores no logits; Wijmans et al. 2024).
        tokenizer: a hub id or local folder, "trained" (on the training questions and answers), or None for the
            decoder's own.
    """

    name: str = "google/gemma-2-2b"
    weights: str = "hub"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    attention: str = "dense"
    loss: str = "chunked"
    tokenizer: str | None = None


class LanguageModel(nn.Module):
    """A causal language model of transformers in three parts: `embed`, `forward` (the decoder), `logits` (the head).

    If the output head is tied to the embedding, the embedding is used for both, so that each weight has one name:
    checkpoints store it once, and no strategy that shards parameters meets it twice.
    """

    def __init__(self, causal_lm: PreTrainedModel, attention: str = "dense", loss: str = "chunked") -> None:
        super().__init__()
        if loss not in LOSSES:
            raise InputError(f"model.language.loss={loss} is unknown; use one of {LOSSES}")
        self.loss = loss
        self.config: PreTrainedConfig = causal_lm.config
        _refuse_unknown_layers(self.config)
        refuse_unknown_head(self.config)
        self.decoder = causal_lm.get_decoder()
        self.head = None if self.config.tie_word_embeddings else causal_lm.get_output_embeddings()
        self.set_attention(attention)

    @property
    def width(self) -> int:
        """D."""
        width: int = self.config.hidden_size
        return width

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder layers."""
        return list(self.decoder.layers)

    @property
    def final_norms(self) -> list[nn.Module]:
        """The norm after the last layer."""
        return [self.decoder.norm]

    def set_attention(self, attention: str) -> None:
        """Select the backend. SDPA, which cannot cap scores, is used only if the model has no softcap."""
        if attention not in BACKENDS:
            raise InputError(f"model.language.attention={attention} is unknown; use one of {BACKENDS}")
        softcap = getattr(self.config, "attn_logit_softcapping", None)
        self.attention = attention
        dense = SOFTCAP if softcap is not None else "sdpa"
        self.decoder.set_attn_implementation("flex_attention" if attention == "flex" else dense)

    def describe_attention(self) -> str:
        """Return the backend with transformers' name of the implementation.

        Raises:
            InputError: the decoder runs another implementation than `set_attention` selected.
        """
        runs = self.decoder.config._attn_implementation
        expected = ("flex_attention",) if self.attention == "flex" else (SOFTCAP, "sdpa")
        if runs not in expected:
            raise InputError(
                f"attention: the config sets {self.attention}, but {runs} would run; please report it with the command"
            )
        return f"{self.attention} ({runs})"

    @contextmanager
    def eager_attention(self) -> Iterator[Sequence[nn.Module]]:
        """Use transformers' eager attention, which returns its weights and keeps the softcap; yield its modules."""
        before = self.attention
        self.set_attention("dense")  # eager attention takes the same masks
        self.decoder.set_attn_implementation("eager")
        try:
            yield [layer.self_attn for layer in self.decoder.layers]
        finally:
            self.set_attention(before)

    def embed(self, input_ids: Tensor) -> Tensor:
        """`int64[B, T] -> float[B, T, D]`, scaled as the model does (Gemma's embedding scales by sqrt(D))."""
        embeddings: Tensor = self.decoder.get_input_embeddings()(input_ids)
        return embeddings

    def forward(
        self, embeddings: Tensor, tokens: Tokens, keys: Tokens | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Return the last hidden state.

        Args:
            embeddings: float[B, T, D].
            tokens: properties of these tokens, `[B, T]`.
            keys: properties of cached and new tokens together, `[B, K]`, if a cache is used.
            cache: keys and values of earlier tokens.

        Returns:
            float[B, T, D]

        Raises:
            InputError: a cache under FlexAttention, or its kernels don't fit the GPU.
        """
        if cache is not None and self.attention == "flex":
            raise InputError(
                "model.language.attention=flex does not support a cache of keys and values; generate with "
                "model.language.attention=dense"
            )
        hidden: Tensor = self.decoder(
            inputs_embeds=embeddings,
            attention_mask=self._masks(tokens, keys or tokens, embeddings.dtype),
            # Padding's positions are arbitrary but must be valid.
            position_ids=tokens.position,
            past_key_values=cache,
            use_cache=cache is not None,
            **self._spans(tokens if keys is None else None),
            **self._kernel_options(embeddings),
        ).last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """`float[S, D] -> float32[S, V]`, with the final softcap if the config has one."""
        if self.head is None:
            logits = F.linear(hidden, self.decoder.get_input_embeddings().weight)
        else:
            logits = self.head(hidden)
        return final_logits(logits, self.config)

    @property
    def fused_losses(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """The kernel of `loss: fused`, `float[S, D], int64[S] -> float32[S]`; None for "chunked"."""
        if self.loss != "fused":
            return None
        from vlmvqa.models.fused_loss import fused_losses

        return partial(fused_losses, self)

    def checkpoint_activations(self) -> None:
        """Recompute layer activations in the backward pass (non-reentrant)."""
        recompute_activations(self.decoder)

    def _masks(self, tokens: Tokens, keys: Tokens, dtype: torch.dtype) -> Any:
        """Return the masks in the form the decoder takes: a dict by kind of layer, or one mask."""
        window = getattr(self.config, "sliding_window", None)
        if window is not None and _max_distance(keys) < window:
            window = None  # every position is within the window, so the local mask equals the global one
        layer_types = getattr(self.config, "layer_types", None)
        if layer_types is None:  # Llama; Mistral, whose layers are all local
            return self._mask(tokens, keys, window, dtype)
        full = self._mask(tokens, keys, None, dtype)
        local = full if window is None else self._mask(tokens, keys, window, dtype)
        return {"full_attention": full, "sliding_attention": local}

    def _spans(self, tokens: Tokens | None) -> dict[str, Any]:
        """Return the argument that lets softcap attention on a CPU skip hidden scores, if tokens attend to themselves.

        On a GPU it would need a synchronization; FlexAttention skips blocks by itself.
        """
        if tokens is None or self.decoder.config._attn_implementation != SOFTCAP or not _is_readable(tokens.document):
            return {}
        if self.blocks[0]._compiled_call_impl is not None:  # compiled layers would be compiled again for each batch
            return {}
        return {"spans": key_spans(tokens)}

    def _kernel_options(self, embeddings: Tensor) -> dict[str, Any]:
        """Return the argument that sets the tile sizes of FlexAttention's CUDA kernels."""
        if self.attention != "flex" or not embeddings.is_cuda:
            return {}
        from vlmvqa.models.flex_tiles import kernel_options

        head_dim = getattr(self.config, "head_dim", None) or self.width // self.config.num_attention_heads
        return {"kernel_options": kernel_options(head_dim, embeddings)}

    def _mask(self, tokens: Tokens, keys: Tokens, window: int | None, dtype: torch.dtype) -> Any:
        if self.attention == "flex":
            return block_mask(tokens, window)
        mask = dense_mask(tokens, keys, window)
        if self.decoder.config._attn_implementation == "sdpa":
            return mask
        # Added to the scores.
        return torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), torch.finfo(dtype).min)


def _is_readable(column: Tensor) -> bool:
    """Whether values can be read at once: a GPU needs a synchronization, and fake tensors have no values."""
    return type(column) is Tensor and column.device.type == "cpu"


def _max_distance(tokens: Tokens) -> int:
    """Return an upper bound of the distance in positions between any two tokens."""
    return int(tokens.position.max()) if _is_readable(tokens.position) else tokens.position.shape[1] - 1


def final_logits(logits: Tensor, config: PreTrainedConfig) -> Tensor:
    """Return the output head's result in float32, with the final softcap if the config has one."""
    logits = logits.float()
    softcap = getattr(config, "final_logit_softcapping", None)
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def recompute_activations(model: PreTrainedModel) -> None:
    """Recompute a transformers model's layer activations in the backward pass (non-reentrant)."""
    # transformers renamed the method in 5.2x; 5.17 has the old name only.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # If the model has adapters, `enable` makes the embeddings require gradients, those of pixels too, so that the
    # backward pass would run through a frozen encoder. Non-reentrant checkpointing doesn't need that.
    model.disable_input_require_grads()


def _refuse_unknown_layers(config: PreTrainedConfig) -> None:
    """Raise if a decoder has kinds of layers that the masks don't cover."""
    kinds = set(getattr(config, "layer_types", None) or LAYER_KINDS)
    if not kinds <= set(LAYER_KINDS):
        raise InputError(
            f"model.language: {config.model_type} has layers of kind {sorted(kinds - set(LAYER_KINDS))}, "
            f"which our masks do not cover; choose a model of {LAYER_KINDS}"
        )


def refuse_unknown_head(config: PreTrainedConfig) -> None:
    """Raise if a model's output head rescales logits in a way that `final_logits` doesn't."""
    odd = [name for name in UNKNOWN_HEADS if getattr(config, name, None) not in (None, 1, 1.0)]
    if odd:
        raise InputError(
            f"model.language: {config.model_type} rescales its logits ({', '.join(odd)}), "
            "which is not supported; choose another model"
        )
