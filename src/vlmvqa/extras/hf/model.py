"""The model as a `PreTrainedModel` that transformers' `generate` drives.

    rows of several questions --VLM.decode, once--> cache of each row --gather--> cache of each question
    one standard sequence per question, all but its last token cached --GenerationMixin.generate--> answers

After a prompt, a token sees the image and all earlier tokens of its own question, whatever the attention pattern. So
each question's columns, moved together, form a causal sequence with padding on the left, as transformers expects it.

Legend: B rows, T tokens, Q questions, K columns in the cache, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from vlmvqa.errors import InputError
from vlmvqa.extras.hf.config import VlmvqaConfig
from vlmvqa.models.build import assemble, build_vision_encoder, random_weights
from vlmvqa.models.generation import last_prompt_tokens
from vlmvqa.models.language import LanguageModel
from vlmvqa.models.vlm import VLM
from vlmvqa.sequence.loss import divide_loss, supervised_loss
from vlmvqa.sequence.masks import Tokens
from vlmvqa.sequence.rows import IMAGE, NO_IMAGE, NONE, PADDING

COLUMNS = ("input_ids", "attention_mask", "position_ids", "branch", "role", "block", "pixel_values", "image_mask")
USE_PROCESSOR = "pass all that the processor returns: model.generate(**processor(images=..., text=...))"


class VlmvqaForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A `VLM` with transformers' methods; its parameters have the same names.

    The attention is the core's, which keeps Gemma 2's softcaps and counts sliding windows on positions.
    """

    config_class = VlmvqaConfig
    input_modalities = ("image", "text")
    accepts_loss_kwargs = True

    def __init__(self, config: VlmvqaConfig) -> None:
        super().__init__(config)
        dtype = torch.get_default_dtype()
        settings = dataclasses.replace(config.model_settings(), dtype=str(dtype).removeprefix("torch."))
        with torch.device("cpu"):  # not meta, for the values of its buffers
            encoder = build_vision_encoder(random_weights(settings.vision))
        # Buffers that are not saved, such as rotary periods; `from_pretrained` replaces them by empty ones.
        self._encoder_buffers = {f"vision.{name}": buffer.clone() for name, buffer in encoder.named_buffers()}
        language = LanguageModel(AutoModelForCausalLM.from_config(config.language_config, dtype=dtype))
        vlm = assemble(encoder, language, settings)
        self.vision, self.projector, self.language = vlm.vision, vlm.projector, vlm.language
        self.generation_config = config.generation_defaults()
        self.post_init()
        self._no_split_modules |= set(language.decoder._no_split_modules or ()) | {"Block"}

    @property
    def vlm(self) -> VLM:
        """The core's model over the same modules."""
        return VLM(self.vision, self.projector, self.language, self.config.model_settings().attention_pattern)

    # ---- forward

    @can_return_tuple
    def forward(  # noqa: PLR0913
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        branch: Tensor | None = None,
        role: Tensor | None = None,
        block: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        use_cache: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits, and the loss if there are labels.

        Args:
            input_ids, attention_mask, position_ids, branch, role, block, pixel_values, image_mask: rows, as the
                processor returns them; with a filled `past_key_values` only the next `input_ids`, and the
                `attention_mask` of all K columns.
            labels: int64[B, T], each at the position that predicts it, as the processor returns them; -100 for none.
            logits_to_keep: number of last positions that logits are computed for, or their indices (0: all).
            use_cache: fill a new cache with the rows' keys and values.
            num_items_in_batch: divisor of the summed loss (None: the number of labels).

        Returns:
            `logits float32[B, T, V]`, `loss` and `past_key_values`.

        Raises:
            InputError: rows are incomplete, or attention weights or hidden states are requested.
        """
        if options.get("output_attentions") or options.get("output_hidden_states"):
            raise InputError("this model returns neither attentions nor hidden states; leave output_... out")
        if pixel_values is not None:
            columns = (input_ids, attention_mask, position_ids, branch, role, block, pixel_values, image_mask)
            batch = _batch(dict(zip(COLUMNS, columns, strict=True)))
            cache = past_key_values if past_key_values is not None or not use_cache else DynamicCache()
            hidden = self.vlm.decode(batch, cache)
        else:
            if past_key_values is None or past_key_values.get_seq_length() == 0:
                raise InputError(f"the input has no pixel_values; {USE_PROCESSOR}")
            cache = past_key_values
            hidden = self._continue(input_ids, attention_mask, cache)
        loss = None
        if labels is not None:
            total, weight = supervised_loss(hidden, labels, self.language.logits)
            loss = divide_loss(total, weight, num_items_in_batch)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(loss, self.language.logits(hidden[:, kept]), cache)

    def _continue(self, input_ids: Tensor, attention_mask: Tensor | None, cache: Cache) -> Tensor:
        """Return the hidden states of the next tokens of one question per row, `float[B, T, D]`."""
        rows, length = input_ids.shape
        mask = input_ids.new_ones(rows, cache.get_seq_length() + length) if attention_mask is None else attention_mask
        keys = Tokens(
            document=torch.where(mask.bool(), 0, PADDING),
            branch=torch.zeros_like(mask),
            block=torch.full_like(mask, NONE),
            position=(mask.cumsum(-1) - 1).clamp(min=0),
        )
        hidden: Tensor = self.language(
            self.language.embed(input_ids), keys.map(lambda column: column[:, -length:]), keys, cache
        )
        return hidden

    # ---- generation

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **options: Any) -> Any:
        """Answer the questions of rows, in row order; the options are those of transformers' `generate`.

        Args:
            inputs: `input_ids`.
            generation_config: as in transformers; the model's default has its saved `decoding` settings.
            options: the other columns that the processor returns, and options of `generate`.

        Returns:
            As in transformers, one sequence per question: its row's prompt with the columns of other questions left out
            and padding on the left, `int64[Q, T]`, then the answer. So `sequences[:, T:]` holds the answers.

        Raises:
            InputError: columns are missing, or a cache is given.
        """
        options.pop("labels", None)
        columns = {name: options.pop(name, None) for name in COLUMNS}
        columns["input_ids"] = columns["input_ids"] if inputs is None else inputs
        if options.get("past_key_values") is not None:
            raise InputError("generate computes the prompt's cache itself; leave past_key_values out")
        questions = self._questions(_batch(columns))
        return super().generate(generation_config=generation_config, **questions, **options)

    def _questions(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """Compute the rows, and return a sequence per question with its cache, which lacks its last token."""
        cache = DynamicCache()
        self.vlm.decode(batch, cache)
        row, column = last_prompt_tokens(batch).nonzero(as_tuple=True)
        own, last = (batch[name][row, column][:, None] for name in ("branch", "position"))
        branch, position = batch["branch"][row], batch["position"][row]
        seen = (batch["document"][row] != PADDING) & ((branch == 0) | (branch == own)) & (position <= last)
        order = seen.long().argsort(dim=1, stable=True)  # what the question doesn't see becomes padding on the left
        cached = (row[:, None], slice(None), order[:, :-1])
        for layer in cache.layers:
            layer.keys, layer.values = (
                rearrange(states[cached], "q k g d -> q g k d").contiguous() for states in (layer.keys, layer.values)
            )
        mask = seen.gather(1, order)
        ids = batch["input_ids"][row].gather(1, order)
        padding = self.generation_config.pad_token_id
        return {
            "input_ids": ids if padding is None else ids.masked_fill(~mask, padding),
            "attention_mask": mask.long(),
            "past_key_values": cache,
        }

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, next_sequence_length: int | None = None, past_key_values: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the input of the next step: the tokens that are not cached, also if transformers would pass all.

        It would with `use_cache=False`, which therefore has no effect, and in the first step of assisted generation.
        """
        if next_sequence_length is None and past_key_values is not None:
            uncached = input_ids.shape[1] - past_key_values.get_seq_length()
            next_sequence_length = uncached if uncached > 0 else None  # else `input_ids` are a chunk of new tokens
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length, past_key_values, **kwargs
        )
        return inputs

    def _expand_inputs_for_generation(self, expand_size: int = 1, **inputs: Any) -> Any:
        """Repeat each question for its beams or samples; transformers doesn't repeat a cache that it is given."""
        if expand_size > 1:
            inputs["past_key_values"].batch_repeat_interleave(expand_size)
        return super()._expand_inputs_for_generation(expand_size=expand_size, **inputs)

    def adjust_generation_fn(self, *arguments: Any, **options: Any) -> None:
        """Read generation_config.json; without one, keep the config's `decoding` settings."""
        defaults = self.generation_config
        super().adjust_generation_fn(*arguments, **options)
        if self.generation_config._from_model_config:
            self.generation_config = defaults

    # ---- the rest of the interface

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.vlm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the output head; None if it is the token embedding."""
        return self.language.head

    def set_attn_implementation(self, *_: Any, **__: Any) -> None:
        """Raise InputError: another implementation could drop softcaps or count windows on columns."""
        raise InputError("the attention of this model cannot be exchanged; leave attn_implementation out")

    def save_pretrained(self, save_directory: str | os.PathLike[str], *arguments: Any, **options: Any) -> None:
        """Save config and weights to a folder that `vlmvqa.load` reads too, once the processor is saved there."""
        self.config.model = {**self.config.model, "dtype": str(self.dtype).removeprefix("torch.")}
        super().save_pretrained(save_directory, *arguments, **options)

    def _init_weights(self, module: nn.Module) -> None:
        """Set the encoder's buffers; raise InputError at a part whose weights the loaded file lacks."""
        name = next(name for name, one in self.named_modules() if one is module)
        if all(getattr(weight, "_is_hf_initialized", False) for weight in module.parameters(recurse=False)):
            for key, buffer in module.named_buffers(recurse=False):
                buffer.copy_(self._encoder_buffers[f"{name}.{key}"])
            return
        raise InputError(f"{self.name_or_path} holds no weights of {name}; save or copy the model again")

    def init_weights(self) -> None:
        """Keep the weights of the parts, which have initialized themselves."""


def _batch(columns: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Return rows of one image each, `COLUMNS`, as the core's batch.

    Raises:
        InputError: a column is missing.
    """
    rows = {name: column for name, column in columns.items() if column is not None}
    if missing := [name for name in COLUMNS if name not in rows and name != "image_mask"]:
        raise InputError(f"the input has no {', '.join(missing)}; {USE_PROCESSOR}")
    is_token = rows["attention_mask"].bool()
    is_image = is_token & (rows["role"] == IMAGE)
    index = (is_image.flatten().cumsum(0) - 1).view_as(is_image)  # row after row, as `pixel_values` are
    masked = {} if "image_mask" not in rows else {"image_mask": rows["image_mask"]}
    if masked:  # the row lacks the padding of letterboxed images
        index = rows["image_mask"].flatten().nonzero()[:, 0][index.clamp(min=0)]
    return {
        **masked,
        "input_ids": rows["input_ids"],
        "image_index": torch.where(is_image, index, NO_IMAGE),
        "document": torch.where(is_token, 0, PADDING),
        "branch": rows["branch"],
        "role": rows["role"],
        "block": rows["block"],
        "position": rows["position_ids"],
        "pixel_values": rows["pixel_values"],
    }
