"""Adapters: where they are, what they compute, the files they leave, 4 bits for real."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

import vlmvqa
from tests import pretrained, tiny
from tests.unit.test_pretrained import predictor, training_batch
from vlmvqa import fingerprint
from vlmvqa.errors import InputError
from vlmvqa.extras.adapters import peft_adapters
from vlmvqa.extras.adapters.peft_adapters import AdapterSettings
from vlmvqa.extras.pretrained.model import OURS, PretrainedSettings, PretrainedVLM
from vlmvqa.models.build import build
from vlmvqa.models.interface import DTYPES, PARTS, cast_parameters
from vlmvqa.models.vlm import VLM
from vlmvqa.training.log import parts_table
from vlmvqa.training.optimizer import set_trainable

peft = pytest.importorskip("peft", reason="peft is an extra: pip install 'vlmvqa[adapters]'")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is an extra: pip install 'vlmvqa[adapters]'")

LORA = AdapterSettings(rank=4, alpha=8, compute_dtype="float32")
DORA, QLORA = replace(LORA, method="dora"), replace(LORA, bits=4)
KINDS = {"lora": LORA, "dora": DORA, "qlora": QLORA, "qdora": replace(DORA, bits=4)}
LINEAR = 7  # of a decoder layer
# 64 and 128 wide: what bitsandbytes packs right on every CPU.
WIDE = tiny.settings(hidden_size=64, intermediate_size=128, head_dim=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained.save("paligemma", tmp_path_factory.mktemp("base"))


@pytest.fixture(params=["paligemma", "ours"])
def model(request: pytest.FixtureRequest, folder: Path) -> VLM | PretrainedVLM:
    return pretrained.load(folder)[0] if request.param == "paligemma" else build(WIDE)


def batch_of(model: VLM | PretrainedVLM, folder: Path) -> dict[str, Any]:
    if isinstance(model, PretrainedVLM):
        return training_batch(pretrained.load(folder)[1], pretrained.examples())
    return tiny.batch(model, [[document] for document in tiny.documents([2, 1])], tiny.images(2))


def logits(model: VLM | PretrainedVLM, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        head = model.logits if isinstance(model, PretrainedVLM) else model.language.logits
        return head(model.eval().decode(batch)[batch["labels"] != -100])


def learn(model: nn.Module) -> None:
    """Adapters that add something: peft begins with ones that add nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_was_named_gets_adapters_and_trains(model: VLM | PretrainedVLM, kind: str, folder: Path) -> None:
    layers = len([block for block in model.blocks if hasattr(block, "mlp") and hasattr(block.mlp, "gate_proj")])
    paths = peft_adapters.attach(model, KINDS[kind])
    assert len(paths) == LINEAR * layers and all(path.startswith("language.") for path in paths)
    assert {path.rpartition(".")[2] for path in paths} == {*peft_adapters.ATTENTION, *peft_adapters.FEED_FORWARD}
    trained = pretrained.trained(model)
    each = 3 if "dora" in kind else 2
    assert len(trained) == each * len(paths) and all("lora_" in name for name in trained)
    assert all(parameter.dtype == torch.float32 for parameter in trained.values())
    batch = batch_of(model, folder)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    before = model.train()(**batch)["loss"]
    before.backward()
    optimizer.step()
    assert model(**batch)["loss"] < before
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_a_new_adapter_changes_nothing(model: VLM | PretrainedVLM, folder: Path) -> None:
    batch = batch_of(model, folder)
    before = logits(model, batch)
    for settings in (LORA, DORA):
        other = copy.deepcopy(model)
        peft_adapters.attach(other, settings)
        assert torch.allclose(logits(other, batch), before, atol=1e-5)


def test_the_scale_and_the_dropout_are_those_asked_for() -> None:
    model = tiny.model()
    peft_adapters.attach(model, replace(LORA, rank=4, alpha=8, dropout=0.25, targets=("language.*.q_proj",)))
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert len(layers) == 4
    assert all(layer.scaling["default"] == 2 and layer.lora_dropout["default"].p == 0.25 for layer in layers)


def test_towers_by_option(folder: Path) -> None:
    model, _ = pretrained.load(folder)
    paths = peft_adapters.attach(model, replace(LORA, targets=("vision.*.q_proj", "projector.*")))
    assert {path.split(".")[0] for path in paths} == {"vision", "projector"}
    assert "projector.linear" in paths and len(paths) == 3
    own = tiny.model()
    assert len(peft_adapters.attach(own, replace(LORA, targets=("vision.*.attn.qkv",)))) == 2


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        (
            ["language.*.q_prj"],
            r"adapt.targets: language.\*.q_prj matches no linear layer.*language.layers.\*.self_attn",
        ),
        (["language.*.q_proj", "vision.*.nothing"], r"vision.\*.nothing matches no linear layer"),
    ],
)
def test_a_pattern_that_matches_nothing_is_said(folder: Path, targets: list[str], sentence: str) -> None:
    model, _ = pretrained.load(folder)
    with pytest.raises(InputError, match=sentence):
        peft_adapters.attach(model, replace(LORA, targets=targets))
    assert all(p.requires_grad for p in model.parameters())


def test_a_head_that_is_the_embedding_gets_no_adapter(folder: Path) -> None:
    """What it learnt could not be merged; a head of its own may learn."""
    model, _ = pretrained.load(folder)
    paths = peft_adapters.attach(model, replace(LORA, targets=("language.*",)))
    assert paths and "language.lm_head" not in paths
    adapted = {id(module.base_layer) for module in model.modules() if isinstance(module, peft.tuners.lora.Linear)}
    assert id(model.net.get_output_embeddings()) not in adapted
    tied, _ = pretrained.load(folder)
    with pytest.raises(InputError, match=r"language\.lm_head matches no linear layer"):
        peft_adapters.attach(tied, replace(LORA, targets=("language.lm_head",)))
    own = tiny.model(tie_word_embeddings=False)
    assert peft_adapters.attach(own, replace(LORA, targets=("language.head",))) == ["language.head"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"method": "lorra"}, "adapt.method=lorra is unknown.*lora"),
        ({"bits": 8}, "adapt.bits=8 is unknown; use 4"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"targets": ()}, "adapt.targets names no module"),
        ({"quantization": "int4"}, "adapt.quantization=int4 is unknown"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        AdapterSettings(**settings)


@pytest.mark.parametrize(("missing", "settings"), [("peft", LORA), ("bitsandbytes", QLORA)])
def test_a_missing_package_is_named_with_its_extra(
    missing: str, settings: AdapterSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=rf"needs {missing}; install it with: pip install 'vlmvqa\[adapters\]'"):
        peft_adapters.attach(tiny.model(), settings)


# ---- 4 bits


def test_four_bits_are_four_bits(model: VLM | PretrainedVLM, folder: Path) -> None:
    """Linear layers of the blocks, and nothing else; what they compute is near what the whole weights do."""
    batch = batch_of(model, folder)
    before = logits(model, batch)
    whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    inside = {
        id(linear.weight) for block in model.blocks for linear in block.modules() if isinstance(linear, nn.Linear)
    }
    chosen = {name for name, p in model.named_parameters() if id(p) in inside}
    peft_adapters.quantize(model, QLORA)
    packed = {name: p for name, p in model.named_parameters() if p.dtype == torch.uint8}
    assert packed.keys() <= chosen
    assert packed
    for name in chosen - packed.keys():  # bitsandbytes' error on some CPUs
        assert whole[name].shape[1] % 64
    for name, weight in packed.items():
        assert weight.numel() == whole[name].numel() / 2
        error = (peft_adapters.dequantize(weight) - whole[name]).norm() / whole[name].norm()
        assert 0.03 < error < 0.12  # NF4 of normal weights: about a tenth
    after = logits(model, batch)
    assert 0 < (after - before).norm() / before.norm() < 0.6
    # Answering first and training then is the same: some CPUs' packing would not be.
    loss = model.train()(**batch)["loss"]
    assert loss.item() == pytest.approx(copy.deepcopy(model).train()(**batch)["loss"].item())


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_activations_reach_the_adapters(kind: str, folder: Path) -> None:
    """Although nothing before them needs a gradient, the embedding is frozen."""
    model, _ = pretrained.load(folder)
    batch = batch_of(model, folder)
    peft_adapters.attach(model, KINDS[kind])
    learn(model)

    def gradients(of: PretrainedVLM) -> dict[str, Tensor]:
        of.zero_grad()
        of.train()(**batch)["loss"].backward()
        return {name: p.grad for name, p in of.named_parameters() if p.grad is not None}

    kept = gradients(model)
    model.checkpoint_activations()
    recomputed = gradients(model)
    assert kept.keys() == recomputed.keys() == pretrained.trained(model).keys()
    assert all(torch.allclose(kept[name], recomputed[name], atol=1e-6) for name in kept)
    assert all(gradient.abs().sum() > 0 for gradient in kept.values())


def test_recomputing_leaves_a_frozen_encoder_alone(model: VLM | PretrainedVLM, folder: Path) -> None:
    """Nothing there trains, so no backward pass goes through it."""
    peft_adapters.attach(model, LORA)
    model.checkpoint_activations()
    seen = []
    model.projector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].requires_grad))
    model.train()(**batch_of(model, folder))["loss"].backward()
    assert seen == [False]


# ---- files


def saved(folder: Path, kind: str, to: Path) -> tuple[PretrainedVLM, dict[str, Any]]:
    """A learnt adapter over the base of a folder, written as a run leaves it."""
    model, processor = pretrained.load(folder)
    settings = KINDS[kind]
    peft_adapters.attach(model, settings)
    learn(model)
    to.mkdir()
    peft_adapters.save(to, model, str(folder), {name: p.detach() for name, p in pretrained.trained(model).items()})
    one = predictor(model, processor)
    one.adapter = peft_adapters.Adapter(settings, str(folder), fingerprint.weights_in(folder))
    one.describe(to)
    return model, batch_of(model, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_alone_and_loaded_over_the_base(folder: Path, kind: str, tmp_path: Path) -> None:
    model, batch = saved(folder, kind, tmp_path / "adapter")
    size = sum(file.stat().st_size for file in (tmp_path / "adapter").glob("*.safetensors"))
    assert size < 0.2 * sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    again = vlmvqa.load(tmp_path / "adapter", "cpu")
    assert torch.equal(logits(again.model, batch), logits(model, batch))
    assert again.prompt == "answer en {question}\n"
    (tmp_path / "adapter" / peft_adapters.WEIGHTS).unlink()  # in a training checkpoint names are the model's
    named = {model.saved_name(name): weight for name, weight in pretrained.trained(model).items()}
    save_file(named, tmp_path / "adapter" / "model.safetensors")
    assert torch.equal(logits(vlmvqa.load(tmp_path / "adapter", "cpu").model, batch), logits(model, batch))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_peft_reads_the_folder(folder: Path, kind: str, tmp_path: Path) -> None:
    model, batch = saved(folder, kind, tmp_path / "adapter")
    base = AutoModelForImageTextToText.from_pretrained(folder)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        found = theirs(**{name: value for name, value in batch.items() if name not in OURS}).logits
    assert torch.allclose(found[batch["labels"] != -100].float(), logits(model, batch), atol=1e-5)


def with_a_part_whole(family: str, dtype: str, folder: Path, part: str = "projector") -> tuple[PretrainedVLM, Path]:
    """A bfloat16 or float32 base with a learnt adapter and a part that was trained whole, and where it is saved."""
    base = pretrained.save(family, folder / "base")
    model, processor = pretrained.load(base)
    cast_parameters(model, DTYPES[dtype])
    peft_adapters.attach(model, LORA)
    learn(model)
    set_trainable(model.part(part), "all", part)
    peft_adapters.keep_float32(model, [part])
    with torch.no_grad():
        for parameter in model.part(part).parameters:
            parameter.add_(1e-3 * torch.randn(parameter.shape))
    (folder / "adapter").mkdir()
    peft_adapters.save(folder / "adapter", model, str(base), pretrained.trained(model))
    one = predictor(model, processor)
    one.settings = PretrainedSettings("somewhere", dtype=dtype)
    one.adapter = peft_adapters.Adapter(LORA, str(base), fingerprint.weights_in(base))
    one.describe(folder / "adapter")
    return model, folder / "adapter"


@pytest.mark.parametrize("family", ["paligemma", "idefics2"])
def test_a_part_that_trains_whole_is_saved_beside(family: str, tmp_path: Path) -> None:
    """For us and for peft, whose wrapper of a module takes all that is in it."""
    model, adapter = with_a_part_whole(family, "float32", tmp_path)
    batch = batch_of(model, tmp_path / "base")
    again = vlmvqa.load(adapter, "cpu")
    assert torch.equal(logits(again.model, batch), logits(model, batch))
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        found = theirs(**{name: value for name, value in batch.items() if name not in OURS}).logits
    assert torch.allclose(found[batch["labels"] != -100].float(), logits(model, batch), atol=1e-5)
    merged = theirs.merge_and_unload().state_dict()
    for name, parameter in model.named_parameters():
        if model.part_of(name) == "projector":
            assert torch.equal(merged[name.removeprefix("net.")], parameter)


@pytest.mark.parametrize("part", ["vision", "projector"])
@pytest.mark.parametrize("family", ["paligemma", "idefics2"])
def test_a_part_that_trains_whole_is_float32_over_any_base(family: str, part: str, tmp_path: Path) -> None:
    """It computes in a bfloat16 model with and without autocast, is read back as it was, and answers."""
    model, adapter = with_a_part_whole(family, "bfloat16", tmp_path, part)
    batch = batch_of(model, tmp_path / "base")
    again = vlmvqa.load(adapter, "cpu")
    kinds = {model.part_of(name): p.dtype for name, p in again.model.named_parameters() if "lora_" not in name}
    assert kinds == dict.fromkeys(PARTS, torch.bfloat16) | {part: torch.float32}
    assert torch.equal(logits(again.model, batch), logits(model, batch))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(logits(model, batch)).all()
    assert len(again.answer_examples(pretrained.examples(1))) == 1


@pytest.mark.parametrize("part", ["vision", "projector"])
def test_small_steps_move_a_part_that_trains_whole(model: VLM | PretrainedVLM, part: str, folder: Path) -> None:
    """In the base's bfloat16 all but a few would be rounded away."""
    model = cast_parameters(model, torch.bfloat16).train()
    peft_adapters.attach(model, LORA)
    set_trainable(model.part(part), "all", part)
    peft_adapters.keep_float32(model, [part])
    parameters = [p for p in model.part(part).parameters if p.ndim > 1]
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5, weight_decay=0)
    batch = batch_of(model, folder)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
    moved = torch.cat([(p != old).flatten() for p, old in zip(parameters, before, strict=True)])
    assert moved.float().mean() > 0.9


def test_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    saved(folder, "lora", tmp_path / "adapter")
    other = pretrained.save("paligemma", tmp_path / "other", seed=1)
    path = tmp_path / "adapter" / "config.json"
    config = json.loads(path.read_text())
    config["adapter"]["base"] = str(other)
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"was trained over other weights than .*other holds now"):
        vlmvqa.load(tmp_path / "adapter", "cpu")
    config["adapter"]["base"] = str(tmp_path / "gone")
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match="gone; the nearest is"):
        vlmvqa.load(tmp_path / "adapter", "cpu")


def test_weights_of_another_model_are_refused(folder: Path, tmp_path: Path) -> None:
    saved(folder, "lora", tmp_path / "adapter")
    file = tmp_path / "adapter" / peft_adapters.WEIGHTS
    weights = load_file(file)
    first = sorted(weights)[0]
    for change, sentence in (
        ({first: None}, "it holds nothing for"),
        ({"base_model.model.odd.lora_A.weight": torch.zeros(2)}, "there is no base_model.model.odd"),
        ({first: torch.zeros(3, 3)}, r"has shape \(3, 3\), here"),
    ):
        changed = {name: value for name, value in {**weights, **change}.items() if value is not None}
        save_file(changed, file)
        with pytest.raises(InputError, match=sentence):
            vlmvqa.load(tmp_path / "adapter", "cpu")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be read"):
        vlmvqa.load(tmp_path / "adapter", "cpu")


def test_the_fingerprint_sees_every_tensor(tmp_path: Path) -> None:
    """Whatever the number of files, and one entry of the smallest one."""
    weights = {f"w{number}": torch.randn(300, 40) for number in range(5)} | {"bias": torch.zeros(3)}
    save_file(weights, tmp_path / "model.safetensors")
    whole = fingerprint.weights_in(tmp_path)
    for change in ("bias", "w3"):
        other = {**weights, change: weights[change] + 1e-3}
        save_file(other, tmp_path / "model.safetensors")
        assert fingerprint.weights_in(tmp_path) != whole
    (tmp_path / "model.safetensors").unlink()
    for number, names in enumerate((["w0", "bias", "w4"], ["w1", "w2", "w3"])):
        save_file({name: weights[name] for name in names}, tmp_path / f"model-{number}.safetensors", {"format": "pt"})
    assert fingerprint.weights_in(tmp_path) == whole


def test_a_folder_without_weights_has_no_fingerprint(folder: Path, tmp_path: Path) -> None:
    """All such folders would have the same, and any would be an adapter's base."""
    shutil.copytree(folder, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(InputError, match="empty has no weights in safetensors files"):
        fingerprint.weights_in(tmp_path / "empty")


def test_a_layer_that_cannot_be_read_back_stays_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As SigLIP's of width 4,304 on some CPUs; and it is said."""
    monkeypatch.setattr(peft_adapters, "_reads_back", lambda packed: packed.quant_state.shape[-1] == 128)
    model, _ = pretrained.load(folder)
    paths = peft_adapters.attach(model, QLORA)
    packed = [name for name, p in model.named_parameters() if p.dtype == torch.uint8]
    assert packed and all("fc2" in name or "down_proj" in name for name in packed)
    assert "layers of width 32, 64 are not quantized" in peft_adapters.describe(model, QLORA, paths)


def test_adapters_are_float32_over_any_base(folder: Path) -> None:
    """In the base's bfloat16 small steps would be rounded away."""
    model = pretrained.load(folder)[0].to(torch.bfloat16)
    peft_adapters.attach(model, LORA)
    assert {parameter.dtype for parameter in pretrained.trained(model).values()} == {torch.float32}


def test_weights_in_four_bits_count_whole(folder: Path) -> None:
    """Two lie in a byte."""
    totals = []
    for settings in (LORA, QLORA):
        model, _ = pretrained.load(folder)
        peft_adapters.attach(model, settings)
        totals.append(parts_table(model, []).splitlines()[-1].split()[1:3])
    assert totals[0] == totals[1]
