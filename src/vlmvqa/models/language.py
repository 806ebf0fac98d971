"""The language model: a transformers decoder that reads embeddings and our masks.

Gemma 2 first; any decoder-only model of transformers that takes `inputs_embeds` works. The causal language model
is the library's own class: what is ours is the mask it gets and where its logits are computed.

Legend: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from vlmvqa.errors import InputError, suggest
from vlmvqa.hub import OWN_CODE, SAFE_WEIGHTS, hub_or_cache, unread
from vlmvqa.models.attention import SOFTCAP
from vlmvqa.progress import loading_bar
from vlmvqa.sequence.masks import Tokens, block_mask, dense_mask, spans

BACKENDS = ("dense", "flex")
LOSSES = ("chunked", "fused")
LAYER_KINDS = ("full_attention", "sliding_attention")
# Heads that rescale their logits in a way that `LanguageModel.logits` does not know would train on wrong numbers.
UNKNOWN_HEADS = ("logits_scaling", "logit_scale", "lm_head_multiplier")


@dataclass(frozen=True)
class LanguageSettings:
    """Which decoder.

    Attributes:
        name: a hub id or local folder (its config, and with weights="hub" its weights), or an architecture of
            transformers ("gemma2", "llama", "qwen2"...) whose config class's defaults then apply.
        weights: "hub" (also for a local folder) or "random".
        overrides: fields of the config class, for random weights.
        attention: "dense" (a boolean mask, any device) or "flex" (FlexAttention's BlockMask, CUDA).
        loss: "chunked" (logits of a piece of the supervised tokens at a time) or "fused" (cut-cross-entropy's kernel,
            CUDA, which holds none; Wijmans et al. 2024).
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
    """A causal language model of transformers, taken apart: `embed`, `forward` (its decoder), `logits` (its head).

    A head that is tied to the embedding is used through the embedding, so that each weight has one name: a
    checkpoint holds it once, and no strategy that shards parameters meets it twice.
    """

    def __init__(self, causal_lm: PreTrainedModel, attention: str = "dense", loss: str = "chunked") -> None:
        super().__init__()
        if loss not in LOSSES:
            raise InputError(f"model.language.loss={loss} is unknown; use one of {LOSSES}")
        self.loss = loss
        self.config: PreTrainedConfig = causal_lm.config
        _refuse_unknown(self.config)
        self.decoder = causal_lm.get_decoder()
        self.head = None if self.config.tie_word_embeddings else causal_lm.get_output_embeddings()
        self.set_attention(attention)

    @property
    def width(self) -> int:
        width: int = self.config.hidden_size
        return width

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.decoder.layers)

    @property
    def final_norm(self) -> nn.Module:
        norm: nn.Module = self.decoder.norm
        return norm

    def set_attention(self, attention: str) -> None:
        """Choose the backend. Softcapping is never dropped: SDPA, which cannot do it, is taken only without it."""
        if attention not in BACKENDS:
            raise InputError(f"model.language.attention={attention} is unknown; use one of {BACKENDS}")
        softcap = getattr(self.config, "attn_logit_softcapping", None)
        self.attention = attention
        dense = SOFTCAP if softcap is not None else "sdpa"
        self.decoder.set_attn_implementation("flex_attention" if attention == "flex" else dense)

    def embed(self, input_ids: Tensor) -> Tensor:
        """`int64[B, T] -> float[B, T, D]`, scaled as the model does it (Gemma: by sqrt(D), inside its embedding)."""
        embeddings: Tensor = self.decoder.get_input_embeddings()(input_ids)
        return embeddings

    def forward(
        self, embeddings: Tensor, tokens: Tokens, keys: Tokens | None = None, cache: Cache | None = None
    ) -> Tensor:
        """The last hidden state.

        Args:
            embeddings: float[B, T, D].
            tokens: their properties, `[B, T]`.
            keys: properties of cached and new tokens together, `[B, K]`, when a cache is used.
            cache: keys and values of the tokens before.

        Returns:
            float[B, T, D]
        """
        hidden: Tensor = self.decoder(
            inputs_embeds=embeddings,
            attention_mask=self._masks(tokens, keys or tokens, embeddings.dtype),
            # Padding's positions are arbitrary but must be valid.
            position_ids=tokens.position,
            past_key_values=cache,
            use_cache=cache is not None,
            **self._spans(tokens if keys is None else None),
        ).last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """`float[S, D] -> float32[S, V]`, with the final softcap where the config has one."""
        if self.head is None:
            logits = F.linear(hidden, self.decoder.get_input_embeddings().weight)
        else:
            logits = self.head(hidden)
        return final_logits(logits, self.config)

    def fused_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropies `float[S, D], int64[S] -> float32[S]` of the logits above, by one kernel."""
        try:
            from cut_cross_entropy import linear_cross_entropy
        except ImportError as error:
            raise InputError(
                "model.language.loss=fused needs cut-cross-entropy; install it with: pip install 'vlmvqa[fused]'"
            ) from error
        head = self.decoder.get_input_embeddings() if self.head is None else self.head
        if getattr(head, "bias", None) is not None:
            raise InputError(
                "model.language.loss=fused knows no bias of the output head; use model.language.loss=chunked"
            )
        if torch.is_autocast_enabled(hidden.device.type):  # a kernel of its own, so nobody casts for it
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        losses: Tensor = linear_cross_entropy(
            hidden,
            head.weight.to(hidden.dtype),
            targets,
            softcap=getattr(self.config, "final_logit_softcapping", None),
            reduction="none",
            filter_eps=None,  # every gradient, however small
            impl="cce" if hidden.is_cuda else "torch_compile",  # the library's reference, for tests
        )
        return losses.float()

    def checkpoint_activations(self) -> None:
        """Recompute layer activations in the backward pass (non-reentrant)."""
        recompute_activations(self.decoder)

    def _masks(self, tokens: Tokens, keys: Tokens, dtype: torch.dtype) -> Any:
        """The mask of each kind of layer, in the form this decoder takes: a dict by layer kind, or one mask."""
        window = getattr(self.config, "sliding_window", None)
        if window is not None and _farthest(keys) < window:
            window = None  # no position is that far back: the local mask is the global one
        layer_types = getattr(self.config, "layer_types", None)
        if layer_types is None:  # Llama; Mistral, whose layers are all local
            return self._mask(tokens, keys, window, dtype)
        full = self._mask(tokens, keys, None, dtype)
        local = full if window is None else self._mask(tokens, keys, window, dtype)
        return {"full_attention": full, "sliding_attention": local}

    def _spans(self, tokens: Tokens | None) -> dict[str, Any]:
        """For our dense attention on a CPU, which parts of the scores are hidden; where tokens attend to themselves."""
        if tokens is None or self.decoder.config._attn_implementation != SOFTCAP:
            return {}
        # On a GPU FlexAttention does it without being asked.
        return {"spans": spans(tokens)} if _readable(tokens.document) else {}

    def _mask(self, tokens: Tokens, keys: Tokens, window: int | None, dtype: torch.dtype) -> Any:
        if self.attention == "flex":
            return block_mask(tokens, window)
        mask = dense_mask(tokens, keys, window)
        if self.decoder.config._attn_implementation == "sdpa":
            return mask
        # Added to the scores.
        return torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), torch.finfo(dtype).min)


def _readable(column: Tensor) -> bool:
    """Whether numbers can be read at once: a GPU would be waited for, a tracer's tensors hold none."""
    return type(column) is Tensor and column.device.type == "cpu" and not torch.compiler.is_compiling()


def _farthest(tokens: Tokens) -> int:
    """How many positions back a token can see at most; not fewer."""
    return int(tokens.position.max()) if _readable(tokens.position) else tokens.position.shape[1] - 1


def final_logits(logits: Tensor, config: PreTrainedConfig) -> Tensor:
    """What the output head has made, in float32, with the final softcap where the config has one."""
    logits = logits.float()
    softcap = getattr(config, "final_logit_softcapping", None)
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def recompute_activations(model: PreTrainedModel) -> None:
    """Recompute a transformers model's layers in the backward pass (non-reentrant)."""
    # transformers renamed it in 5.2x; 5.17 has the old name only.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # With adapters it makes the embeddings ask for gradients, those of pixels too, and the backward pass would go
    # through a frozen encoder; recomputed without reentering, no block needs that.
    model.disable_input_require_grads()


def language_config(settings: LanguageSettings) -> PreTrainedConfig:
    """The decoder's config: from the hub or a folder, or an architecture's defaults with overrides."""
    try:
        if settings.name in CONFIG_MAPPING_NAMES:
            config = AutoConfig.for_model(settings.name)
        else:
            with hub_or_cache(settings.name):
                config = AutoConfig.from_pretrained(settings.name, **OWN_CODE)
    except (OSError, ValueError) as error:
        raise unread(f"model.language.name={settings.name}", error) from error
    known = config.to_dict()
    for key in settings.overrides:
        if key not in known:
            raise InputError(f"model.language.overrides has no '{key}' for {settings.name}{suggest(key, known)}")
    if settings.name in CONFIG_MAPPING_NAMES:
        made: PreTrainedConfig = type(config)(**settings.overrides)
    else:
        with hub_or_cache(settings.name):
            made = AutoConfig.from_pretrained(settings.name, **settings.overrides, **OWN_CODE)
    return made


def build_language_model(settings: LanguageSettings, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The decoder with weights from the hub or a folder, or random ones.

    Raises:
        InputError: unknown name, unreachable or gated weights, an architecture without weights.
    """
    if settings.weights == "hub" and settings.overrides:
        raise InputError(
            f"model.language.overrides would change the shape of {settings.name}'s trained weights; "
            "leave them out, or set model.language.weights=random"
        )
    config = language_config(settings)
    if settings.weights == "random":
        causal_lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    elif settings.weights != "hub":
        raise InputError(
            f"model.language.weights={settings.weights} is unknown; use 'hub' (also for a folder) or 'random'"
        )
    elif settings.name in CONFIG_MAPPING_NAMES:
        raise InputError(
            f"model.language.name={settings.name} is an architecture, which has no weights; "
            "name a hub id or folder, or set model.language.weights=random"
        )
    else:
        try:
            with hub_or_cache(settings.name), loading_bar():
                causal_lm = AutoModelForCausalLM.from_pretrained(
                    settings.name, config=config, dtype=dtype, **SAFE_WEIGHTS
                )
        except (OSError, ValueError, SafetensorError) as error:
            raise unread(f"model.language.name={settings.name}", error) from error
    return LanguageModel(causal_lm, settings.attention, settings.loss)


def _refuse_unknown(config: PreTrainedConfig) -> None:
    kinds = set(getattr(config, "layer_types", None) or LAYER_KINDS)
    if not kinds <= set(LAYER_KINDS):
        raise InputError(
            f"model.language: {config.model_type} has layers of kind {sorted(kinds - set(LAYER_KINDS))}, "
            f"which our masks do not cover; choose a model of {LAYER_KINDS}"
        )
    refuse_unknown_head(config)


def refuse_unknown_head(config: PreTrainedConfig) -> None:
    """Stop at a model whose output head does more than `final_logits` knows."""
    odd = [name for name in UNKNOWN_HEADS if getattr(config, name, None) not in (None, 1, 1.0)]
    if odd:
        raise InputError(
            f"model.language: {config.model_type} rescales its logits ({', '.join(odd)}), "
            "which is not supported; choose another model"
        )
