"""Pretrained vision-language models of transformers, with the interface of `models/interface.py`.

The network is the library's class, with its mask, image tokens and positions. Only the loss is computed here, at
supervised positions (`sequence/loss.py`), and answers are chosen by the rules of `models/generation.py`.

Legend: B rows, T tokens, I images, N image tokens, D width, S supervised tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from vlmvqa.errors import InputError
from vlmvqa.extras.pretrained.sampling import SamplingProcessor
from vlmvqa.models.interface import DTYPES, PARTS, Generated, GenerationSettings, Model, Part
from vlmvqa.models.language import final_logits, recompute_activations, refuse_unknown_head
from vlmvqa.sequence.loss import divide_loss, supervised_loss
from vlmvqa.sequence.rows import FILL, IGNORE, Batch

PREFIX = "net."  # precedes the library's names of weights
OURS = set(FILL) - {"input_ids"}  # columns of a batch that the network does not take
# Attributes of transformers' classes that map image features to the decoder's width.
PROJECTORS = ("multi_modal_projector", "connector", "embed_vision", "mm_projector", "aligner")


@dataclass(frozen=True)
class PretrainedSettings:
    """Settings of a pretrained model; conf/model/pretrained.yaml documents the keys.

    Attributes:
        pretrained: a hub id or local folder; for random weights also an architecture of transformers ("paligemma",
            "idefics2") with its config class's defaults.
        overrides: fields of the config class, for random weights; nested configs as mappings.
        tokenizer: for random weights "trained", on the training questions and answers.
        resolution: part of the names of some published weights (conf/model/paligemma_3b.yaml).
    """

    family: ClassVar[str] = "pretrained"
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


class PretrainedVLM(Model):
    """A class of `AutoModelForImageTextToText`.

    Attributes:
        net: the network.
        part_names: the names of vision encoder, projector and language model in it.
    """

    text_folder = "."  # transformers reads the processor's files next to config.json
    shares_images = False  # one question per row: in some of these models the image sees its question

    def __init__(self, net: PreTrainedModel) -> None:
        super().__init__()
        if net.base_model is net or net.get_output_embeddings() is None:
            raise InputError(f"{type(net).__name__} has no decoder apart from its output head; choose another model")
        refuse_unknown_head(net.config.get_text_config())
        _refuse_saved_buffers(net)
        self.net = net
        names = {id(module): name for name, module in net.named_modules()}
        self.part_names = {part: names.get(id(getattr(self, part)), "-") for part in PARTS}
        self.attention_pattern = attention_pattern_of(net.config)

    # ---- parts

    @property
    def vision(self) -> nn.Module:
        """The vision encoder."""
        encoder: nn.Module = self.net.get_encoder(modality="image")
        return encoder

    @property
    def projector(self) -> nn.Module:
        """The module that maps image features to the decoder's width; an identity if the encoder does it."""
        base = self.net.base_model
        found: nn.Module = next((getattr(base, name) for name in PROJECTORS if hasattr(base, name)), nn.Identity())
        return found

    @property
    def language(self) -> Any:
        """The decoder."""
        return self.net.get_decoder()

    @property
    def adapter_host(self) -> nn.Module:
        """The network, whose parameter names appear in files of weights and adapters."""
        network: nn.Module = self.net
        return network

    def part(self, name: str) -> Part:
        """Return one of `interface.PARTS`."""
        parameters = [p for known, p in self.named_parameters() if self.part_of(known) == name]
        module: nn.Module = getattr(self, name)
        owners = (module, getattr(module, "vision_model", None))
        norms = (getattr(owner, norm, None) for owner in owners for norm in ("norm", "post_layernorm"))
        blocks = [] if name == "projector" else _blocks(module)
        return Part(module, parameters, blocks, [norm for norm in norms if norm is not None][:1])

    def part_of(self, name: str) -> str:
        """Return the part that a parameter belongs to; the output head belongs to the language model."""
        return self.module_path(name.removeprefix(PREFIX)).partition(".")[0]

    def module_path(self, name: str) -> str:
        """Return a module's part with its name in it, which is the same path in models of either family."""
        inside = {part: f"{self.part_names[part]}." for part in PARTS}
        part = next((part for part in PARTS if name.startswith(inside[part])), "language")
        return f"{part}.{name.removeprefix(inside[part])}"

    @property
    def blocks(self) -> list[nn.Module]:
        """Every transformer block of the network."""
        return _blocks(self.net)

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding, to which transformers' Trainer adds NEFTune's noise."""
        embedding: nn.Module = self.net.get_input_embeddings()
        return embedding

    def tie_weights(self) -> None:
        """Share tied weights again after parameters were replaced."""
        self.net.tie_weights()

    def checkpoint_activations(self) -> None:
        """Recompute the blocks' activations in the backward pass."""
        recompute_activations(self.net)

    # ---- attention and patches

    @property
    def attention(self) -> str:
        """Name of transformers' attention implementation."""
        return str(self.language.config._attn_implementation)

    def describe_attention(self) -> str:
        """Return the implementation: the network's own choice, so that nothing needs checking."""
        return f"the library's own ({self.attention})"

    @contextmanager
    def eager_attention(self) -> Iterator[Sequence[nn.Module]]:
        """Use attention that returns its weights, within the context; yield the decoder's attention modules."""
        before = self.attention
        self.language.set_attn_implementation("eager")
        try:
            yield [layer.self_attn for layer in self.language.layers]
        finally:
            self.language.set_attn_implementation(before)

    def patch_grid(self, batch: Batch) -> tuple[int, int]:
        """Return the rows and columns of patches of an image, or of a crop of it."""
        height, width = batch["pixel_values"].shape[-2:]
        side = self.net.config.vision_config.patch_size
        return height // side, width // side

    def token_grid(self, batch: Batch) -> tuple[int, int] | None:
        """Return the rows and columns of patches; None if a resampler mixes them, as in Idefics2."""
        mixed = any("resampler" in name for name, _ in self.projector.named_modules())
        return None if mixed else self.patch_grid(batch)

    # ---- loss

    def image_embeddings(self, batch: Batch) -> Tensor:
        """Return the embeddings of the image tokens, in the order of the rows: `float[I * N, D]`."""
        network: Any = self.net
        names = inspect.signature(network.get_image_features).parameters
        images = {name: column for name, column in batch.items() if name in names}
        found = network.get_image_features(**images).pooler_output  # [I, N, D], or a list of [N, D]
        return rearrange(found, "i n d -> (i n) d") if isinstance(found, Tensor) else torch.cat(found)

    def decode(self, batch: Batch) -> Tensor:
        """Return the last hidden state of every token: `float[B, T, D]`."""
        base: Any = self.net.base_model
        hidden: Tensor = base(**_inputs(batch), use_cache=False).last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """`float[S, D] -> float32[S, V]`, with the final softcap if the config has one."""
        head: Any = self.net.get_output_embeddings()
        return final_logits(head(hidden), self.net.config.get_text_config())

    def forward(self, num_items_in_batch: Tensor | int | None = None, **batch: Tensor) -> dict[str, Tensor]:
        """Compute the loss over supervised positions; arguments and result as in `VLM.forward`."""
        hidden, labels = self.decode(batch), batch["labels"]
        loss, weight = supervised_loss(hidden, labels, self.logits, weights=batch.get("weights"))
        return {
            "loss": divide_loss(loss, weight, num_items_in_batch),
            "supervised_tokens": (labels != IGNORE).sum(),
        }

    # ---- answers

    @torch.no_grad()
    def generate(
        self, batch: Batch, eos: Collection[int], decoding: GenerationSettings, keys: Sequence[int | str] | None = None
    ) -> list[Generated]:
        """Answer every row, padded on the left, with transformers' `generate` (see `generation.generate`)."""
        if decoding.num_beams > 1:
            return [best[0] for best in self.beam_candidates(batch, eos, decoding)]
        if decoding.static_cache:
            kind = self.net.config.model_type
            raise InputError(f"decoding.static_cache=true is not supported by {kind}; set it to false")
        ids = batch["input_ids"]
        sampling = SamplingProcessor(decoding, sorted(eos), range(len(ids)) if keys is None else keys, ids.device)
        answers, _ = self._generate(batch, eos, decoding, sampling)
        return [Generated(answer[0], float(total)) for answer, total in zip(answers, sampling.total, strict=True)]

    @torch.no_grad()
    def beam_candidates(
        self, batch: Batch, eos: Collection[int], decoding: GenerationSettings
    ) -> list[list[Generated]]:
        """Return every row's finished beams, best first, at most `decoding.num_beams`."""
        if decoding.num_beams == 1:
            return [[one] for one in self.generate(batch, eos, decoding)]
        answers, scores = self._generate(batch, eos, decoding)
        beams = [
            Generated(answer, score * length**decoding.length_penalty)
            for (answer, length), score in zip(answers, scores, strict=True)
        ]
        return [beams[first : first + decoding.num_beams] for first in range(0, len(beams), decoding.num_beams)]

    def _generate(
        self,
        batch: Batch,
        eos: Collection[int],
        decoding: GenerationSettings,
        sampling: SamplingProcessor | None = None,
    ) -> tuple[list[tuple[list[int], int]], list[float]]:
        """Call transformers' `generate`: tokens are chosen by `sampling`, or by beam search.

        Returns:
            The tokens of every answer without EOS, and their number with EOS; the scores of the beams.
        """
        training, net = self.training, cast("Any", self.net)
        published = net.generation_config
        config = GenerationConfig(
            max_new_tokens=decoding.max_new_tokens,
            num_beams=decoding.num_beams,
            num_return_sequences=decoding.num_beams,
            length_penalty=decoding.length_penalty,
            early_stopping=False,
            do_sample=False,
            eos_token_id=sorted(eos),
            pad_token_id=min(eos),
            return_dict_in_generate=True,
            output_scores=sampling is None,  # without them transformers returns no scores of the beams
        )
        self.eval()
        net.generation_config = GenerationConfig()  # the published one would fill options that are unset here
        try:
            found = net.generate(
                **_inputs(batch), generation_config=config, logits_processor=[sampling] if sampling else None
            )
        finally:
            net.generation_config = published
            self.train(training)
        answers = []
        for tokens in found.sequences[:, batch["input_ids"].shape[1] :].tolist():
            end = next((place for place, token in enumerate(tokens) if token in eos), len(tokens))
            answers.append((tokens[:end], min(end + 1, len(tokens))))
        return answers, [] if sampling else found.sequences_scores.tolist()

    # ---- files

    def saved_name(self, name: str) -> str:
        """Return the library's name of a parameter."""
        return name.removeprefix(PREFIX)

    def saved_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return transformers' config of the network, with the given entries as its entry `vlmvqa`."""
        # A cast leaves the config's dtype unchanged.
        own = {"architectures": [type(self.net).__name__], "dtype": config["model"]["dtype"]}
        return {**self.net.config.to_dict(), **own, "vlmvqa": dict(config)}

    def save_extras(self, folder: Path) -> None:
        """Write the published generation config."""
        self.net.generation_config.save_pretrained(folder)


def attention_pattern_of(config: PreTrainedConfig) -> str:
    """Return the attention pattern of a model of transformers, a key of `rows.ATTENTION_PATTERNS`."""
    return "prefix_lm" if config.model_type == "paligemma" else "causal"


def _refuse_saved_buffers(net: PreTrainedModel) -> None:
    """Raise if a model has persistent buffers: only parameters are trained, saved and merged here."""
    for path, module in net.named_modules():
        for name in module._buffers.keys() - module._non_persistent_buffers_set:
            raise InputError(
                f"{type(net).__name__} has a buffer {path}.{name}, and only parameters are saved here; "
                "choose another model"
            )


def _inputs(batch: Batch) -> dict[str, Tensor]:
    """Return the columns that the network takes."""
    return {name: column for name, column in batch.items() if name not in OURS}


def _blocks(module: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks of a module of transformers."""
    return [found for found in module.modules() if isinstance(found, GradientCheckpointingLayer)]
