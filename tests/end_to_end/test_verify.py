"""launch/verify.py: both halves against the libraries' own classes, on saved weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.end_to_end.scripts import call, done
from vlmvqa.config.schema import RunSettings
from vlmvqa.errors import InputError
from vlmvqa.extras.parity import verify
from vlmvqa.extras.parity.verify import VerifyConfig
from vlmvqa.models.build import language_config
from vlmvqa.models.language import LanguageModel, LanguageSettings
from vlmvqa.models.vision import VisionSettings
from vlmvqa.models.vlm import ModelSettings


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> ModelSettings:
    """Weights large enough that scores reach the softcaps."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    random = LanguageSettings("gemma2", "random", tiny.FAMILIES["gemma2"])
    AutoModelForCausalLM.from_config(language_config(random)).save_pretrained(folder)
    encoder = timm.create_model("test_vit", num_classes=0)
    save_file(encoder.state_dict(), folder / "vision.safetensors")
    vision = VisionSettings("test_vit", 160, str(folder / "vision.safetensors"))
    return ModelSettings(vision=vision, language=LanguageSettings(str(folder)))


def test_both_halves_equal_the_libraries(saved: ModelSettings, tmp_path: Path) -> None:
    settings = (
        f"model.vision.name={saved.vision.name}",
        f"model.vision.weights={saved.vision.weights}",
        "model.vision.image_size=160",
        f"model.language.name={saved.language.name}",
    )
    printed = done(call("verify", *settings, f"run.dir={tmp_path}")).out.splitlines()
    equal = [line for line in printed if "equal up to rounding: largest difference" in line]
    assert [line.split(",")[0] for line in equal] == ["vision encoder", "language model"]


def test_a_softcap_that_is_lost_is_noticed(saved: ModelSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_cap(settings: LanguageSettings) -> LanguageModel:
        config = language_config(settings)
        config.attn_logit_softcapping = 500.0
        return LanguageModel(AutoModelForCausalLM.from_pretrained(settings.name, config=config))

    monkeypatch.setattr(verify, "build_language_model", without_cap)
    with pytest.raises(InputError, match="an output differs from the library's"):
        verify.verify(VerifyConfig(RunSettings("verify", "runs/verify"), saved))


def test_other_features_are_refused(saved: ModelSettings) -> None:
    """timm's features of the last layer would not be those that the model reads."""
    for changed in ({"layers": -2}, {"class_token": False}, {"norm": False}, {"fused": (saved.vision,)}):
        other = replace(saved, vision=replace(saved.vision, **changed))  # type: ignore[arg-type]
        with pytest.raises(InputError, match="compares the last layer of one encoder, with class token and norm"):
            verify.verify(VerifyConfig(RunSettings("verify", "runs/verify"), other))


def test_random_weights_are_refused() -> None:
    with pytest.raises(InputError, match=r"model.vision.weights=random: there are no weights to compare"):
        verify.verify(VerifyConfig(RunSettings("verify", "runs/verify"), tiny.settings()))
