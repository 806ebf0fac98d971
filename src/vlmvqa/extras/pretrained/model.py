"""Pretrained vision-language models of transformers, behind the methods of our own: `forward` and `generate`.

The network is the library's own class and computes as the library has it: its mask, its image tokens, its positions.
What is ours is where the loss is computed (supervised positions only, `sequence/loss.py`) and what is asked of it.

Legend: B rows, T tokens, D width, S supervised tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vlmvqa.errors import InputError, suggest
from vlmvqa.hub import OWN_CODE, SAFE_WEIGHTS, hub_or_cache, unread
from vlmvqa.models.generation import Generated, GenerationSettings, pick, streams_of
from vlmvqa.models.language import final_logits, recompute_activations, refuse_unknown_head
from vlmvqa.models.vlm import DTYPES, Batch, Part
from vlmvqa.progress import loading_bar
from vlmvqa.sequence.loss import divided, supervised_loss
from vlmvqa.sequence.rows import FILL, IGNORE

PREFIX = "net."  # before the library's own names of weights
OURS = set(FILL) - {"input_ids"}  # columns of a batch that the network does not take
# Where the classes of transformers keep what turns an image into the width of the words.
PROJECTORS = ("multi_modal_projector", "connector", "embed_vision", "mm_projector", "aligner")


@dataclass(frozen=True)
class PretrainedSettings:
    """Which pretrained model.

    Attributes:
        pretrained: a hub id or local folder; or, for random weights, an architecture of transformers ("paligemma",
            "idefics2") whose config class's defaults then apply.
        weights: "hub" (also for a local folder) or "random".
        overrides: fields of the config class, for random weights; parts of it as mappings.
        image_splitting: whether an image is read in pieces too, where the model can (null: as it was published).
        attention: transformers' implementation (null: its choice for the model): eager, sdpa, flash_attention_2.
        dtype: of the weights.
        tokenizer: for random weights "trained", on the training questions and answers.
        resolution: part of the names of some published weights (conf/model/paligemma_3b.yaml).
    """

    pretrained: str
    weights: str = "hub"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    image_splitting: bool | None = None
    attention: str | None = None
    dtype: str = "float32"
    tokenizer: str | None = None
    resolution: int | None = None

    def __post_init__(self) -> None:
        if self.weights not in ("hub", "random"):
            raise InputError(f"model.weights={self.weights} is unknown; use hub (also for a folder) or random")
        if self.dtype not in DTYPES:
            raise InputError(f"model.dtype={self.dtype} is unknown; use one of {', '.join(DTYPES)}")
        named = self.pretrained in CONFIG_MAPPING_NAMES
        if self.weights == "hub" and named:
            raise InputError(
                f"model.pretrained={self.pretrained} is an architecture, which has no weights; name a hub id or "
                "folder, or set model.weights=random"
            )
        if self.weights == "hub" and self.overrides:
            raise InputError(
                f"model.overrides would change the shape of {self.pretrained}'s trained weights; "
                "leave them out, or set model.weights=random"
            )


class PretrainedVLM(nn.Module):
    """A class of `AutoModelForImageTextToText`, with the methods of `VLM`; `places` are its parts' names in it."""

    accepts_loss_kwargs = True  # as `VLM`'s
    shares_images = False  # a question a row: some of these models let the image see its question

    def __init__(self, net: PreTrainedModel) -> None:
        super().__init__()
        if net.base_model is net or net.get_output_embeddings() is None:
            raise InputError(f"{type(net).__name__} has no decoder apart from its output head; choose another model")
        refuse_unknown_head(net.config.get_text_config())
        _refuse_saved_buffers(net)
        self.net = net
        names = {id(module): name for name, module in net.named_modules()}
        self.places = {part: names.get(id(getattr(self, part)), "-") for part in ("vision", "projector", "language")}
        self.attention_pattern = attention_pattern_of(net.config)

    # ---- parts

    @property
    def vision(self) -> nn.Module:
        """What sees the image."""
        encoder: nn.Module = self.net.get_encoder(modality="image")
        return encoder

    @property
    def projector(self) -> nn.Module:
        """What turns its features into the width of the words; empty where the encoder does it."""
        base = self.net.base_model
        return next((getattr(base, name) for name in PROJECTORS if hasattr(base, name)), nn.Identity())

    @property
    def language(self) -> Any:
        """The decoder."""
        return self.net.get_decoder()

    def part_of(self, name: str) -> str:
        """Which of "vision", "projector" and "language" a weight is of; the output head is the language model's."""
        for part in ("vision", "projector"):
            if name.startswith(f"{PREFIX}{self.places[part]}."):
                return part
        return "language"

    def part(self, name: str) -> Part:
        """A part as `set_trainable` wants it."""
        parameters = [p for known, p in self.named_parameters() if self.part_of(known) == name]
        module = getattr(self, name)
        norm = next((getattr(module, norm) for norm in ("norm", "post_layernorm") if hasattr(module, norm)), None)
        if norm is None and name == "vision":
            norm = getattr(getattr(module, "vision_model", None), "post_layernorm", None)
        blocks = [] if name == "projector" else _blocks(module)
        return Part(parameters, blocks, [norm] if norm is not None else [])

    @property
    def blocks(self) -> list[nn.Module]:
        """Every transformer block: what a strategy shards, and what is recomputed."""
        return _blocks(self.net)

    @property
    def attention(self) -> str:
        """transformers' implementation of it."""
        return str(self.language.config._attn_implementation)

    def get_input_embeddings(self) -> nn.Module:
        """What the Trainer adds NEFTune's noise to."""
        embedding: nn.Module = self.net.get_input_embeddings()
        return embedding

    # ---- the two methods

    def decode(self, batch: Batch) -> Tensor:
        """The last hidden state of every token: `float[B, T, D]`."""
        base: Any = self.net.base_model
        hidden: Tensor = base(**_inputs(batch), use_cache=False).last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """`float[S, D] -> float32[S, V]`, with the final softcap where the config has one."""
        head: Any = self.net.get_output_embeddings()
        return final_logits(head(hidden), self.net.config.get_text_config())

    def forward(self, num_items_in_batch: Tensor | int | None = None, **batch: Tensor) -> dict[str, Tensor]:
        """The loss over supervised positions; as `VLM.forward`."""
        hidden, labels = self.decode(batch), batch["labels"]
        loss, weight = supervised_loss(hidden, labels, self.logits, weights=batch.get("weights"))
        return {
            "loss": divided(loss, weight, num_items_in_batch),
            "supervised_tokens": (labels != IGNORE).sum(),
        }

    @torch.no_grad()
    def generate(
        self, batch: Batch, eos: Collection[int], decoding: GenerationSettings, keys: Sequence[int | str] | None = None
    ) -> list[Generated]:
        """Answer every row, by transformers' own `generate`; as `generation.generate`.

        Args:
            batch: rows without answers, padded on the left.
        """
        if decoding.num_beams > 1:
            return [best[0] for best in self.beam_candidates(batch, eos, decoding)]
        rows, read = batch["input_ids"].shape
        greedy = OneByOne(decoding, sorted(eos), range(rows) if keys is None else keys, batch["input_ids"].device)
        found = self._generated(batch, eos, decoding, greedy)
        return [
            Generated(_until(tokens, eos), float(total))
            for tokens, total in zip(found.sequences[:, read:].tolist(), greedy.total, strict=True)
        ]

    @torch.no_grad()
    def beam_candidates(
        self, batch: Batch, eos: Collection[int], decoding: GenerationSettings
    ) -> list[list[Generated]]:
        """Every row's finished beams, `decoding.num_beams` of them, the best first; as `generation.beam_candidates`."""
        if decoding.num_beams == 1:
            return [[one] for one in self.generate(batch, eos, decoding)]
        read = batch["input_ids"].shape[1]
        found = self._generated(batch, eos, decoding)
        beams = []
        for tokens, score in zip(found.sequences[:, read:].tolist(), found.sequences_scores.tolist(), strict=True):
            answer = _until(tokens, eos)
            length = min(len(answer) + 1, len(tokens))  # EOS counts
            beams.append(Generated(answer, score * length**decoding.length_penalty))
        return [beams[first : first + decoding.num_beams] for first in range(0, len(beams), decoding.num_beams)]

    def _generated(
        self, batch: Batch, eos: Collection[int], decoding: GenerationSettings, greedy: LogitsProcessor | None = None
    ) -> Any:
        """What transformers' `generate` gives: chosen by `greedy`, or every row's best beams."""
        training, net = self.training, cast("Any", self.net)
        published = net.generation_config
        config = GenerationConfig(
            max_new_tokens=decoding.max_new_tokens,
            num_beams=decoding.num_beams,
            num_return_sequences=1 if greedy else decoding.num_beams,
            length_penalty=decoding.length_penalty,
            early_stopping=False,
            do_sample=False,
            eos_token_id=sorted(eos),
            pad_token_id=min(eos),
            return_dict_in_generate=True,
            output_scores=greedy is None,  # of every step: only so are a beam's own told
        )
        self.eval()
        net.generation_config = GenerationConfig()  # its penalties would fill what ours leaves open
        try:
            return net.generate(
                **_inputs(batch), generation_config=config, logits_processor=[greedy] if greedy else None
            )
        finally:
            net.generation_config = published
            self.train(training)

    def checkpoint_activations(self) -> None:
        """Recompute the blocks' activations in the backward pass."""
        recompute_activations(self.net)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: Any = None, **options: Any) -> None:
        """What transformers' Trainer calls under `activation_checkpointing=true`."""
        if activation_checkpointing_kwargs or options.get("every_n_layers", 1) != 1 or options.get("offload"):
            raise InputError("trainer.activation_checkpointing_kwargs is not supported; leave it out")
        self.checkpoint_activations()


class OneByOne(LogitsProcessor):  # type: ignore[misc] # transformers is not analysed
    """Chooses each row's next token as our own generation does, and adds up what the choices cost."""

    def __init__(
        self, decoding: GenerationSettings, eos: list[int], keys: Sequence[int | str], device: torch.device
    ) -> None:
        self.decoding, self.streams = decoding, streams_of(decoding, keys)
        self.ends = torch.tensor(eos, device=device)
        self.total = torch.zeros(len(keys), device=device)
        self.open = torch.ones(len(keys), dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = torch.tensor([stream.random() for stream in self.streams], dtype=torch.float64, device=scores.device)
        chosen, log_prob = pick(scores.float().log_softmax(-1), drawn, self.decoding.temperature)
        self.total += log_prob * self.open
        self.open &= ~torch.isin(chosen, self.ends)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)


def attention_pattern_of(config: PreTrainedConfig) -> str:
    """Who sees whom in a model of the library's, by the name that it has in `sequence/masks.py`."""
    return "prefix_lm" if config.model_type == "paligemma" else "causal"


def pretrained_config(settings: PretrainedSettings) -> PreTrainedConfig:
    """The model's config: from the hub or a folder, or an architecture's defaults with overrides.

    Raises:
        InputError: unknown name or key, unreachable or gated, or not a vision-language model.
    """
    if settings.pretrained in CONFIG_MAPPING_NAMES:
        known = AutoConfig.for_model(settings.pretrained).to_dict()
        for key in settings.overrides:
            if key not in known:
                raise InputError(f"model.overrides has no '{key}' for {settings.pretrained}{suggest(key, known)}")
        config: PreTrainedConfig = AutoConfig.for_model(settings.pretrained, **settings.overrides)
    else:
        try:
            with hub_or_cache(settings.pretrained):
                config = AutoConfig.from_pretrained(settings.pretrained, **OWN_CODE)
        except (OSError, ValueError) as error:
            raise unread(f"model.pretrained={settings.pretrained}", error) from error
    if config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise InputError(
            f"{settings.pretrained} is not a vision-language model of transformers but of model_type "
            f"{config.model_type}; name one that takes an image and text, such as PaliGemma or Idefics2"
        )
    return config


def build_pretrained(settings: PretrainedSettings, config: PreTrainedConfig, blank: bool = False) -> PretrainedVLM:
    """The model, weights included.

    Args:
        config: `pretrained_config`'s.
        blank: leave the weights to be filled in.

    Raises:
        InputError: unreachable, gated or broken weights, or a model that takes no image.
    """
    more: dict[str, Any] = {} if settings.attention is None else {"attn_implementation": settings.attention}
    dtype = DTYPES[settings.dtype]
    try:
        if settings.weights == "random" or blank:
            made = PretrainedVLM(AutoModelForImageTextToText.from_config(config, dtype=dtype, **more))
            made.net.tie_weights()  # transformers does so where it draws weights, not where they are left blank
            _tell_latents_apart(made)
            return made
        with hub_or_cache(settings.pretrained), loading_bar():
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                settings.pretrained, config=config, dtype=dtype, output_loading_info=True, **more, **SAFE_WEIGHTS
            )
    except (OSError, RuntimeError, ValueError, ImportError, SafetensorError) as error:
        raise unread(f"model.pretrained={settings.pretrained}", error) from error
    net, about = loaded
    if about["missing_keys"]:
        missing = sorted(about["missing_keys"])
        raise InputError(
            f"{settings.pretrained} holds no weights for {missing[0]} ({len(missing)} are missing), which would be "
            "random; fetch it again, or name the whole model"
        )
    return PretrainedVLM(net)


def _refuse_saved_buffers(net: PreTrainedModel) -> None:
    """Stop at a model whose files hold what is no parameter: only parameters are trained, saved and merged here."""
    for path, module in net.named_modules():
        for name in module._buffers.keys() - module._non_persistent_buffers_set:
            raise InputError(
                f"{type(net).__name__} keeps {path}.{name} beside its parameters, which would not be saved here; "
                "choose another model"
            )


def _tell_latents_apart(model: PretrainedVLM) -> None:
    """A resampler's random queries: transformers makes them all ones, and what is the same learns the same."""
    latents = getattr(getattr(model.projector, "perceiver_resampler", None), "latents", None)
    if latents is not None:
        nn.init.normal_(latents, std=0.02)


def _until(tokens: list[int], eos: Collection[int]) -> list[int]:
    """The tokens before the one that ends an answer."""
    return tokens[: next((place for place, token in enumerate(tokens) if token in eos), len(tokens))]


def _inputs(batch: Batch) -> dict[str, Tensor]:
    return {name: column for name, column in batch.items() if name not in OURS}


def _blocks(module: nn.Module) -> list[nn.Module]:
    return [found for found in module.modules() if isinstance(found, GradientCheckpointingLayer)]
