"""Encoder, projector, language model and VLM from settings: what is built, what trains, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests import tiny
from vlmvqa.errors import InputError
from vlmvqa.models.build import build, build_language_model, build_vision_encoder, language_config
from vlmvqa.models.generation import generate
from vlmvqa.models.interface import GenerationSettings
from vlmvqa.models.language import LanguageSettings
from vlmvqa.models.vision import VisionEncoder, VisionSettings
from vlmvqa.models.vlm import VLM
from vlmvqa.training.optimizer import set_trainable


def encoder(name: str = VisionSettings.name, size: int = 28, **overrides: object) -> VisionEncoder:
    arguments = {**tiny.VISION, **overrides}
    return build_vision_encoder(VisionSettings(name, size, weights="random", overrides=arguments)).eval()


def test_register_tokens_are_dropped_and_the_class_token_kept() -> None:
    plain = encoder()
    with_registers = encoder("vit_base_patch14_reg4_dinov2.lvd142m")
    assert with_registers.encoder.num_reg_tokens == 4
    pixels = tiny.images(1)
    with torch.no_grad():
        features = with_registers.encoder.forward_features(pixels)
        assert torch.equal(with_registers(pixels), torch.cat([features[:, :1], features[:, 5:]], dim=1))
    assert with_registers.features.tokens == plain.features.tokens == 17
    assert with_registers(pixels).shape == (1, 17, 32)


def test_an_encoder_without_class_token_gives_patches_alone() -> None:
    siglip = encoder("vit_base_patch16_siglip_224", init_values=None)
    assert siglip.features.tokens == 16
    assert siglip(tiny.images(2)).shape == (2, 16, 32)


def test_weights_from_a_local_file_at_another_size(tmp_path: Path) -> None:
    """timm interpolates the position embedding; at the same size the features are the same."""
    settings = VisionSettings("test_vit", 32, weights="random")  # timm's own small one: 300,096 parameters
    trained = build_vision_encoder(settings).eval()
    save_file(trained.encoder.state_dict(), tmp_path / "weights.safetensors")
    settings = replace(settings, weights=str(tmp_path / "weights.safetensors"))
    again = build_vision_encoder(settings).eval()
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(pixels), trained(pixels))
    larger = build_vision_encoder(replace(settings, image_size=64)).eval()
    assert larger.features.tokens == 1 + 4 * 4
    assert larger.encoder.pos_embed.shape[1] == 17


def test_trained_weights_keep_their_shape(tmp_path: Path) -> None:
    for weights in ("hub", str(tmp_path / "weights.safetensors")):
        with pytest.raises(InputError, match=r"overrides would change the shape of .* model\.vision\.weights=random"):
            build_vision_encoder(VisionSettings(weights=weights, overrides={"depth": 3}))


def test_positions_begin_as_large_as_patches() -> None:
    """With timm's own, fifty times smaller, an encoder that is trained from scratch sees no places for a long time."""
    positions = encoder().encoder.pos_embed
    assert 0.8 < positions.std() < 1.2


def test_the_encoders_own_normalisation() -> None:
    assert encoder().data_config["mean"] == (0.485, 0.456, 0.406)
    assert encoder("vit_base_patch16_siglip_224", init_values=None).data_config["mean"] == (0.5, 0.5, 0.5)


def test_what_is_no_vision_transformer_is_refused() -> None:
    with pytest.raises(InputError, match=r"vit_bsae.* is no timm model; did you mean 'vit_b"):
        encoder("vit_bsae_patch14_dinov2")
    with pytest.raises(InputError, match="does not take these settings"):
        encoder(depht=3)
    with pytest.raises(InputError, match="no such file"):
        build_vision_encoder(VisionSettings(weights="/nowhere.safetensors"))
    with pytest.raises(InputError, match=r"resnet18 cannot be used: its batch normalisation"):
        build_vision_encoder(VisionSettings("resnet18", 224, weights="random"))


def test_a_language_model_from_a_local_folder(tmp_path: Path) -> None:
    """The path that `google/gemma-2-2b` takes, on a folder."""
    settings = LanguageSettings("gemma2", "random", tiny.FAMILIES["gemma2"])
    trained = AutoModelForCausalLM.from_config(language_config(settings))
    trained.save_pretrained(tmp_path)
    loaded = build_language_model(LanguageSettings(str(tmp_path)))
    for name, weight in loaded.decoder.state_dict().items():
        assert torch.equal(weight, trained.get_decoder().state_dict()[name]), name
    assert loaded.head is None  # tied: used through the embedding
    with pytest.raises(InputError, match="would change the shape"):
        build_language_model(LanguageSettings(str(tmp_path), overrides={"num_hidden_layers": 1}))
    with pytest.raises(InputError, match="no 'num_hiden_layers'"):
        build_language_model(LanguageSettings(str(tmp_path), "random", {"num_hiden_layers": 1}))


def test_an_untied_head_is_kept(tmp_path: Path) -> None:
    settings = LanguageSettings("llama", "random", tiny.FAMILIES["llama"])
    trained = AutoModelForCausalLM.from_config(language_config(settings))
    trained.save_pretrained(tmp_path)
    loaded = build_language_model(LanguageSettings(str(tmp_path)))
    assert loaded.head is not None and torch.equal(loaded.head.weight, trained.lm_head.weight)


def test_language_models_that_cannot_be_had_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="HF_TOKEN"):
        build_language_model(LanguageSettings(str(tmp_path / "nothing")))
    with pytest.raises(InputError, match="is an architecture, which has no weights"):
        build_language_model(LanguageSettings("gemma2"))
    with pytest.raises(InputError, match="no 'hiden_size' for gemma2; did you mean 'hidden_size'"):
        build_language_model(LanguageSettings("gemma2", "random", {"hiden_size": 3}))
    with pytest.raises(InputError, match=r"rescales its logits \(logits_scaling\)"):
        build_language_model(LanguageSettings("granite", "random", {**tiny.FAMILIES["qwen2"], "logits_scaling": 8.0}))
    with pytest.raises(InputError, match="attention=flexx is unknown"):
        build_language_model(LanguageSettings("llama", "random", tiny.FAMILIES["llama"], attention="flexx"))


def trained_names(vlm: VLM) -> set[str]:
    return {name for name, parameter in vlm.named_parameters() if parameter.requires_grad}


def test_freezing_whole_parts_and_last_blocks() -> None:
    vlm = tiny.model()
    set_trainable(vlm.part("vision"), "none", "vision")
    set_trainable(vlm.part("projector"), "all", "projector")
    set_trainable(vlm.part("language"), "none", "language")
    assert trained_names(vlm) == {"projector.layers.0.weight", "projector.layers.0.bias"}
    set_trainable(vlm.part("vision"), 1, "vision")
    blocks = {name.split(".")[3] for name in trained_names(vlm) if name.startswith("vision.encoder.blocks")}
    assert blocks == {"1"} and "vision.encoder.norm.weight" in trained_names(vlm)
    for wrong in (9, 0, "some", True):
        with pytest.raises(InputError, match=r"trainable\.vision="):
            set_trainable(vlm.part("vision"), wrong, "vision")


def test_frozen_parts_get_no_gradient() -> None:
    vlm = tiny.model()
    set_trainable(vlm.part("vision"), "none", "vision")
    set_trainable(vlm.part("language"), "none", "language")
    vlm(**tiny.batch(vlm, [tiny.documents([2])], tiny.images(1)))["loss"].backward()
    assert {name for name, p in vlm.named_parameters() if p.grad is not None} == trained_names(vlm)


def loss_and_gradients(vlm: VLM) -> tuple[torch.Tensor, list[torch.Tensor]]:
    vlm.zero_grad()
    loss = vlm(**tiny.batch(vlm, [tiny.documents([3, 1])], tiny.images(2)))["loss"]
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in vlm.parameters() if p.grad is not None]


def test_recomputed_activations_change_nothing() -> None:
    vlm = tiny.model().train()
    loss, gradients = loss_and_gradients(vlm)
    vlm.checkpoint_activations()
    again, recomputed = loss_and_gradients(vlm)
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(recomputed, gradients)


def test_bfloat16_weights_compute_and_stay_bfloat16() -> None:
    vlm = build(replace(tiny.settings(initializer_range=0.02), dtype="bfloat16"))
    assert {p.dtype for p in vlm.parameters()} == {torch.bfloat16}
    batch = tiny.batch(vlm, [tiny.documents([2])], tiny.images(1))
    loss = vlm(**batch)["loss"]
    assert loss.dtype == vlm.language.logits(vlm.decode(batch)[0]).dtype == torch.float32
    asked = tiny.batch(vlm, [tiny.without_answers(tiny.documents([2]))], tiny.images(1))
    assert len(generate(vlm, asked, {tiny.EOS}, GenerationSettings(3))) == 2
    expected = vlm.float()(**tiny.batch(vlm, [tiny.documents([2])], tiny.images(1)))["loss"]
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    with pytest.raises(InputError, match="dtype=float64 is unknown"):
        build(replace(tiny.settings(), dtype="float64"))


def test_cached_features_are_the_encoders() -> None:
    vlm = tiny.model()
    batch = tiny.batch(vlm, [tiny.documents([2])], tiny.images(1))
    cached = {**batch, "image_features": vlm.vision(batch.pop("pixel_values"))}
    batch["pixel_values"] = tiny.images(1)
    assert torch.equal(vlm(**batch)["loss"], vlm(**cached)["loss"])


def test_an_unknown_mode_suggests() -> None:
    with pytest.raises(InputError, match="did you mean 'prefix_lm'"):
        tiny.model("prefixlm")
