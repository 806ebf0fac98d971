"""The config class of our models: the entries of `config.json` as `models/checkpoint.py` writes them."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from vlmvqa.config.compose import build_settings
from vlmvqa.models.checkpoint import CONFIG, FORMAT, OURS
from vlmvqa.models.interface import GenerationSettings
from vlmvqa.models.trained_model import BARE
from vlmvqa.models.vlm import ModelSettings


class VlmvqaConfig(PreTrainedConfig):
    """The `config.json` of a saved `VLM`; further entries are kept as attributes.

    Attributes:
        language_config: the decoder's config.
        model: the settings that the model is built from (`ModelSettings`).
        images: the preprocessing of images (`ImageSettings`).
        prompt: the template of a question, which contains `{question}`.
        max_text_tokens: limit on prompt plus answer tokens of one question (None: no limit).
        decoding: the settings of generation (`GenerationSettings`).
        end_token_ids: the token ids that end an answer.
    """

    model_type = OURS
    sub_configs_defaults = {"language_config": SubConfigSpec(config_class=AutoConfig, model_type="gemma2")}  # noqa: RUF012

    language_config: dict[str, Any] | PreTrainedConfig | None = None
    format: int = FORMAT
    model: dict[str, Any] | None = None
    images: dict[str, Any] | None = None
    prompt: str = BARE
    max_text_tokens: int | None = None
    decoding: dict[str, Any] | None = None
    end_token_ids: list[int] | None = None

    def get_text_config(self, *_: Any, **__: Any) -> Any:
        """Return the decoder's config."""
        return self.language_config

    def model_settings(self) -> ModelSettings:
        """Return the settings that the model is built from."""
        return build_settings(ModelSettings, self.model or {}, f"{CONFIG}: model")

    def generation_defaults(self) -> GenerationConfig:
        """Return the `decoding` settings by transformers' names, with the tokens that end an answer."""
        decoding = build_settings(GenerationSettings, self.decoding or {}, f"{CONFIG}: decoding")
        options: dict[str, Any] = {"max_new_tokens": decoding.max_new_tokens, "num_beams": decoding.num_beams}
        if decoding.num_beams > 1:
            options |= {"length_penalty": decoding.length_penalty}
        if decoding.temperature > 0:  # transformers would sample from the 50 most probable tokens
            options |= {"do_sample": True, "temperature": decoding.temperature, "top_k": 0}
        language: Any = self.language_config
        ends = self.end_token_ids or language.eos_token_id
        padding = language.pad_token_id
        if padding is None:
            padding = ends[0] if isinstance(ends, list) else ends
        return GenerationConfig(eos_token_id=ends, pad_token_id=padding, **options)
