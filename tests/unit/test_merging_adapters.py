"""Merging adapters: equal to peft's merge and to merging full models; one into its base; over 4 bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import DEFAULT, Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from tests import pretrained, tiny
from tests.unit.test_predictor import examples as own_examples
from tests.unit.test_predictor import predictor as own_predictor
from vlmvqa import fingerprint
from vlmvqa.errors import InputError
from vlmvqa.extras.adapters import peft_adapters
from vlmvqa.extras.adapters.peft_adapters import AdapterSettings
from vlmvqa.extras.merging import files, methods
from vlmvqa.extras.merging.logit_diff import LogitDiff, answer_logits, logit_diff, one_question_each
from vlmvqa.extras.merging.merge import Merge
from vlmvqa.extras.merging.settings import MergeSettings
from vlmvqa.inference.predictor import Predictor, load
from vlmvqa.models.build import build
from vlmvqa.models.checkpoint import WEIGHTS
from vlmvqa.models.interface import DTYPES, cast_parameters

peft = pytest.importorskip("peft", reason="peft is an extra: pip install 'vlmvqa[adapters]'")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is an extra: pip install 'vlmvqa[adapters]'")

LORA = AdapterSettings(rank=4, alpha=8, compute_dtype="float32")
KINDS = {"lora": LORA, "dora": replace(LORA, method="dora")}
ADD = MergeSettings("task_arithmetic")


def own(folder: Path) -> Path:
    """Save a model of our architecture, 64 and 128 wide: sizes that bitsandbytes quantizes correctly on every CPU."""
    sizes = tiny.settings(hidden_size=64, intermediate_size=128, head_dim=16, vocab_size=300)
    replace(own_predictor(), model=build(sizes), settings=sizes).save(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    return {"ours": own(root / "ours"), "paligemma": pretrained.save("paligemma", root / "paligemma")}


def over(
    base: Path,
    folder: Path,
    settings: AdapterSettings = LORA,
    seed: int = 1,
    full: str = "",
    kept: str = "float32",
) -> Predictor:
    """Save an adapter with random matrices and return its model.

    Args:
        base: Folder of the base.
        folder: Where the adapter is saved.
        settings: Settings of the adapter.
        seed: Seed of the matrices.
        full: A part that trains without adapters.
        kept: Dtype of the frozen weights.
    """
    predictor = load(base)
    predictor.settings = replace(predictor.settings, dtype=kept)
    cast_parameters(predictor.model, DTYPES[kept])
    peft_adapters.attach(predictor.model, settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in predictor.model.named_parameters():
            if predictor.model.part_of(name) == full:
                parameter.requires_grad_(True).mul_(1.1)
            if "lora_" in name:
                noise = 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter * (1 + noise) if "magnitude" in name else noise)
    predictor.adapter = peft_adapters.Adapter(settings, str(base), fingerprint.weights_in(base))
    predictor.prompts = {f"task{seed}": f"{seed} {{question}}\n"}
    folder.mkdir(parents=True)
    peft_adapters.save(folder, predictor.model, str(base), pretrained.trained(predictor.model))
    predictor.describe(folder)
    return predictor


def asked(predictor: Predictor) -> list[Tensor]:
    """Return the logits of six questions."""
    given = own_examples() if predictor.model.shares_images else pretrained.examples()
    answered = [replace(one, questions=tuple(replace(q, target="red") for q in one.questions)) for one in given]
    return answer_logits(predictor, one_question_each(answered, 6))


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return found


def close(one: list[Tensor], other: list[Tensor], atol: float) -> bool:
    diff = logit_diff(one, other)
    assert diff.range > 0.5
    return diff.largest <= atol


@pytest.mark.parametrize("kind,chunk_size", [("lora", 5000), ("dora", 5000), ("dora", 1 << 20)])
def test_one_adapter_is_merged_as_peft_merges_it(
    kind: str, chunk_size: int, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result equals `merge_and_unload` of the same files, and answers like the trained model."""
    trained = over(bases["paligemma"], tmp_path / "a", KINDS[kind])
    monkeypatch.setattr(files, "CHUNK_SIZE", chunk_size)
    Merge(None, [tmp_path / "a"], ADD).run(tmp_path / "out")
    net = AutoModelForImageTextToText.from_pretrained(bases["paligemma"])
    theirs = dict(peft.PeftModel.from_pretrained(net, tmp_path / "a").merge_and_unload().named_parameters())
    ours = dict(AutoModelForImageTextToText.from_pretrained(tmp_path / "out").named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)
    untouched = AutoModelForImageTextToText.from_pretrained(bases["paligemma"]).state_dict()
    moved = {
        name.rpartition(".")[0].rpartition(".")[2] for name in ours if not torch.equal(ours[name], untouched[name])
    }
    assert moved == {*peft_adapters.ATTENTION, *peft_adapters.FEED_FORWARD}
    merged = load(tmp_path / "out")
    assert close(asked(trained), asked(merged), 1e-3)
    assert merged.prompts == {"task1": "1 {question}\n"} and merged.adapter is None
    texts = [str(one) for one in merged.answer_examples(pretrained.examples()).values()]
    assert texts == [str(one) for one in trained.answer_examples(pretrained.examples()).values()]


@pytest.mark.parametrize("kind", KINDS)
def test_our_own_model_too(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """With adapters in the encoder too, and a projector trained without adapters."""
    settings = replace(KINDS[kind], targets=("vision.*.attn.qkv", "language.*.q_proj"))
    trained = over(bases["ours"], tmp_path / "a", settings, full="projector")
    merging = Merge(None, [tmp_path / "a"], ADD)
    merging.run(tmp_path / "out")
    assert close(asked(trained), asked(load(tmp_path / "out")), 1e-4)
    before, after = tensors(bases["ours"]), tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.partition(".")[0] for name in changed} == {"vision", "projector", "language"}
    theirs = pretrained.merged_by_peft(trained.model)
    assert theirs.keys() == after.keys()
    assert all(torch.allclose(theirs[name], after[name], atol=1e-5) for name in after)
    assert merging.statistics["language"].record()["norms_of_deltas"][0] > 0
    (tmp_path / "a" / peft_adapters.WEIGHTS).unlink()  # a training checkpoint has the model's names
    save_file(pretrained.trained(trained.model), tmp_path / "a" / "model.safetensors")
    Merge(None, [tmp_path / "a"], ADD).run(tmp_path / "again")
    assert all(torch.equal(after[name], weight) for name, weight in tensors(tmp_path / "again").items())


def test_peft_reads_what_we_save(bases: dict[str, Path], tmp_path: Path) -> None:
    """`PeftModel.from_pretrained` over the base in transformers gives our logits."""
    for kind, settings in KINDS.items():
        ours = over(bases["paligemma"], tmp_path / kind, settings)
        net = AutoModelForImageTextToText.from_pretrained(bases["paligemma"])
        theirs = replace(load(bases["paligemma"]), prompts=ours.prompts)
        peft.PeftModel.from_pretrained(net, tmp_path / kind)  # puts its layers into the net
        theirs.model.net = net  # type: ignore[union-attr, assignment]
        assert close(asked(ours), asked(theirs), 1e-4)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", ["ours", "paligemma"])
def test_a_merged_model_is_of_the_type_of_its_files(
    family: str, stored: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    """Independent of the dtype of the adapters' frozen weights."""
    predictor = load(bases[family])
    cast_parameters(predictor.model, DTYPES[stored])
    predictor.settings = replace(predictor.settings, dtype=stored)
    if family == "ours":
        predictor.save(tmp_path / "base")
    else:  # as published: no vlmvqa entry in its config
        shutil.copytree(bases[family], tmp_path / "base")
        save_file(
            {predictor.model.saved_name(n): p.data for n, p in predictor.model.named_parameters()},
            tmp_path / "base" / WEIGHTS,
        )
    for kept in {"float32", "float16"} - {stored}:
        over(tmp_path / "base", tmp_path / kept, kept=kept)
        Merge(None, [tmp_path / kept], ADD).run(tmp_path / f"{kept}-merged")
        merged = load(tmp_path / f"{kept}-merged")
        assert merged.settings.dtype == stored
        assert {weight.dtype for weight in merged.model.parameters()} == {DTYPES[stored]}


METHODS = ({}, {"trim": "model"}, {"method": "dare_ties"}, {"method": "linear"})


@pytest.mark.parametrize(
    "family,given",
    [
        *(("ours", given) for given in METHODS),
        *(pytest.param("paligemma", given, marks=pytest.mark.slow if given else ()) for given in METHODS),
    ],
    ids=str,
)
def test_adapters_merge_as_the_full_models_do(
    family: str, given: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    """Two adapters, or an adapter and a full model, give the result of two full models."""
    base = bases[family]
    for name, kind, seed in (("a", "lora", 1), ("b", "dora", 2)):
        over(base, tmp_path / name, KINDS[kind], seed)
        Merge(None, [tmp_path / name], ADD).run(tmp_path / f"full-{name}")
    settings = MergeSettings(**{"density": 0.3, "weights": (1.0, 2.0), "scale": 0.7, **given})
    Merge(base, [tmp_path / "full-a", tmp_path / "full-b"], settings).run(tmp_path / "full")
    for number, pair in enumerate((["a", "b"], ["a", "full-b"])):
        merging = Merge(None, [tmp_path / name for name in pair], settings)
        merging.run(tmp_path / str(number))
        expected, found = tensors(tmp_path / "full"), tensors(tmp_path / str(number))
        # Rounding may move entries across the threshold.
        for name in expected:
            differ = ~torch.isclose(found[name], expected[name], atol=1e-5)
            assert differ.float().mean() < 0.002, name
    assert load(tmp_path / "0").prompts == {"task1": "1 {question}\n", "task2": "2 {question}\n"}
    if not given:
        kept = merging.statistics["language"].record()["kept"]
        assert kept == pytest.approx([0.3, 0.3], abs=0.01)


@pytest.mark.parametrize("family", ["ours", "paligemma"])
@pytest.mark.parametrize("kind", KINDS)
def test_over_four_bits(family: str, kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Merged into the dequantized weights: equal up to rounding. Into the full ones: the logits differ."""
    settings = replace(KINDS[kind], bits=4)
    over(bases[family], tmp_path / "a", settings)
    trained = load(tmp_path / "a")
    found: dict[str, LogitDiff] = {}
    for into in ("full", "dequantized"):
        merging = Merge(None, [tmp_path / "a"], ADD, into)
        assert merging.over_four_bits == [tmp_path / "a"]
        merging.run(tmp_path / into)
        found[into] = logit_diff(asked(trained), asked(load(tmp_path / into)))
    assert found["dequantized"].largest < 1e-3 * found["dequantized"].range
    assert found["full"].largest > 10 * found["dequantized"].largest
    # Only adapted weights change, with either base.
    base, full, unpacked = (tensors(one) for one in (bases[family], tmp_path / "full", tmp_path / "dequantized"))
    kinds = [name for name in base if "norm" in name]
    assert kinds and all(torch.equal(base[name], one[name]) for name in kinds for one in (full, unpacked))


def test_into_what_cannot_be(bases: dict[str, Path], tmp_path: Path) -> None:
    over(bases["ours"], tmp_path / "a")
    over(bases["ours"], tmp_path / "q", replace(LORA, bits=4))
    over(bases["ours"], tmp_path / "r", replace(LORA, bits=4, quantization="fp4"))
    with pytest.raises(
        InputError, match=r"into=nf4 is unknown; use full .* or dequantized .*: a merged model has full"
    ):
        Merge(None, [tmp_path / "q"], ADD, "nf4")
    for models in (["a"], ["a", "q"], ["q", "r"]):
        with pytest.raises(
            InputError, match="into=dequantized: not all models are adapters over the same 4-bit weights"
        ):
            Merge(None, [tmp_path / name for name in models], ADD, "dequantized")


def moved(base: Path, folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> Path:
    """Save a copy of a base with edited weights."""
    folder.mkdir()
    for path in base.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    found = tensors(base)
    edit(found)
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_other_bases_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["paligemma"]
    other = moved(base, tmp_path / "other", lambda found: next(iter(found.values())).add_(1))
    over(base, tmp_path / "a")
    over(other, tmp_path / "b", seed=2)
    with pytest.raises(InputError, match=r"b was trained over .*/other, .*/a over .*, which has other weights; merge"):
        Merge(None, [tmp_path / "a", tmp_path / "b"], MergeSettings())
    with pytest.raises(InputError, match=r"a was trained over other weights than those of .*/other; remove base="):
        Merge(other, [tmp_path / "a"], ADD)
    next(iter(found := tensors(other))) and found["language_model.model.norm.weight"].add_(1)
    save_file(found, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"was trained over other weights than .* holds now"):
        Merge(None, [tmp_path / "b"], ADD)


def test_other_bases_are_told_apart_by_their_folders(bases: dict[str, Path], tmp_path: Path) -> None:
    """Also if both adapters record the same relative path."""
    for run, base in (("one", bases["ours"]), ("two", bases["paligemma"])):
        over(base, tmp_path / run / "model")
        path = tmp_path / run / "model" / "config.json"
        config = json.loads(path.read_text())
        config["adapter"]["base"] = "../base"
        path.write_text(json.dumps(config))
    with pytest.raises(
        InputError,
        match=rf"two/model was trained over {tmp_path}/two/base, .*/one/model over {tmp_path}/one/base, which",
    ):
        Merge(None, [tmp_path / "one" / "model", tmp_path / "two" / "model"], MergeSettings())


def test_an_adapter_over_an_adapter_is_told_the_whole_command(bases: dict[str, Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        over(bases["ours"], tmp_path / name)
    path = tmp_path / "a" / "config.json"
    config = json.loads(path.read_text())
    config["adapter"] |= {"base": str(tmp_path / "b"), "fingerprint": fingerprint.weights_in(tmp_path / "b")}
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"b is an adapter; .* launch/merge\.py adapter=.*/b output=\.\.\."):
        Merge(None, [tmp_path / "a"], ADD)


def test_a_broken_or_odd_file_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    over(bases["paligemma"], tmp_path / "a")
    path = tmp_path / "a" / peft_adapters.WEIGHTS
    known = load_file(path)
    odd = {name.replace("layers.0", "layers.9"): weight.clone() for name, weight in known.items()}
    save_file(odd, path)
    with pytest.raises(InputError, match=r"belongs to another model than .*: .*layers\.9.* does not exist there"):
        Merge(None, [tmp_path / "a"], ADD)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"adapter_model\.safetensors cannot be read"):
        Merge(None, [tmp_path / "a"], ADD)


def test_what_is_cut_short_does_not_look_whole(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        over(bases["paligemma"], tmp_path / name, seed=seed)
    fifth_stops = Mock(wraps=methods.trim, side_effect=[*[DEFAULT] * 4, KeyboardInterrupt])
    monkeypatch.setattr(methods, "trim", fifth_stops)
    with pytest.raises(KeyboardInterrupt):
        Merge(None, [tmp_path / "a", tmp_path / "b"], MergeSettings()).run(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    with pytest.raises(InputError, match="is not a saved model"):
        load(tmp_path / "out")
    with pytest.raises((OSError, ValueError)):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "out")


def test_the_merge_says_where_it_comes_from(bases: dict[str, Path], tmp_path: Path) -> None:
    """So it can be merged again, only with models of the same base."""
    over(bases["ours"], tmp_path / "a")
    Merge(None, [tmp_path / "a"], ADD).run(tmp_path / "one")
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["started_from"] == {"model": str(bases["ours"]), "weights": fingerprint.weights_in(bases["ours"])}
    Merge(bases["ours"], [tmp_path / "one", tmp_path / "a"], MergeSettings())
    with pytest.raises(InputError, match=r"was trained from .*/ours, not"):
        Merge(tmp_path / "one", [tmp_path / "one", tmp_path / "one"], MergeSettings())
