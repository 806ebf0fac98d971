"""Merging: the papers' definitions on hand-computed tensors, peft's functions, and full saved models."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import DEFAULT, Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.configs import train_config
from tests.unit.test_predictor import examples, predictor
from vlmvqa.config import compatibility
from vlmvqa.config.schema import DistSettings, TrainConfig
from vlmvqa.errors import InputError
from vlmvqa.extras.merging import files, methods
from vlmvqa.extras.merging.files import Weights
from vlmvqa.extras.merging.merge import Merge
from vlmvqa.extras.merging.settings import MergeSettings
from vlmvqa.inference.predictor import load
from vlmvqa.models.interface import DTYPES, cast_parameters
from vlmvqa.training import initial_model

ONES = torch.ones(2)


def row(*values: float) -> Tensor:
    return torch.tensor(values)


# --- methods --------------------------------------------------------------------------------------


def test_ties_by_hand() -> None:
    """Algorithm 1 of the paper, three models, the 60 % that are largest of five entries kept."""
    deltas = torch.tensor([[3.0, -1.0, 0.5, 2.0, 0.1], [1.0, -4.0, 0.2, -5.0, 0.3], [2.0, 6.0, 0.4, -1.0, 0.6]])
    thresholds = torch.tensor([methods.kth_magnitude(lambda d=d: [d], 3) for d in deltas])  # type: ignore[misc]
    assert thresholds.tolist() == [1.0, 1.0, 1.0]
    trimmed = methods.trim(deltas, thresholds)
    expected = [[3.0, -1.0, 0.0, 2.0, 0.0], [1.0, -4.0, 0.0, -5.0, 0.0], [2.0, 6.0, 0.0, -1.0, 0.0]]
    assert trimmed.tolist() == expected
    weights = torch.ones(3)
    # 3, 1 and 2 agree; 6 alone is positive; nobody moves the third; -5 and -1 outweigh 2; nobody moves the last.
    assert methods.ties(trimmed, weights).tolist() == [2.0, 6.0, 0.0, -3.0, 0.0]
    # The first model counts double: 3, 3, 1, 2 are the mean of four; -2 - 4 + 6 is even; 2 x 2 loses against 5 + 1.
    assert methods.ties(trimmed, torch.tensor([2.0, 1.0, 1.0])).tolist() == [9 / 4, 0.0, 0.0, -3.0, 0.0]


def test_the_others_by_hand() -> None:
    one, two = row(1.0, 2.0), row(3.0, -2.0)
    both = torch.stack([one, two])
    assert methods.linear(both, torch.tensor([3.0, 1.0])).tolist() == [1.5, 1.0]
    assert methods.weighted_sum(both, torch.tensor([0.5, -1.0])).tolist() == [-2.5, 3.0]
    # At a right angle, half way: both times sin(45 degrees) / sin(90 degrees).
    first, second = methods.slerp_shares(0.0, (1.0, 2.0), 0.5)
    assert first == pytest.approx(math.sqrt(0.5)) == pytest.approx(second)
    assert methods.slerp_shares(2.0, (1.0, 2.0), 0.25) == (0.75, 0.25)  # parallel: a straight line
    assert methods.slerp_shares(0.0, (0.0, 2.0), 0.25) == (0.75, 0.25)  # no direction


def test_dare_keeps_the_mean() -> None:
    deltas = torch.full((2, 100_000), 3.0)
    found = methods.drop_and_rescale(deltas, 0.3, [torch.Generator().manual_seed(n) for n in (1, 2)])
    assert {0.0, 10.0} == {round(value, 4) for value in found.unique().tolist()}
    assert found.mean(1).tolist() == pytest.approx([3.0, 3.0], abs=0.05)
    assert not torch.equal(found[0], found[1])


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60), st.data())
@settings(max_examples=200, deadline=None)
def test_the_threshold_is_exact(values: list[float], data: st.DataObject) -> None:
    """The same as sorting, for any split into chunks."""
    kept = data.draw(st.integers(1, len(values)))
    cut = data.draw(st.integers(0, len(values)))
    entries = torch.tensor(values)
    found = methods.kth_magnitude(lambda: [entries[:cut], entries[cut:]], kept)
    wanted = entries.abs().sort(descending=True).values[kept - 1].item()
    assert found == (wanted if kept < len(values) else 0.0)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_and_the_rest_equal_pefts(density: float) -> None:
    """`peft.utils.merge_utils` with weights of 1, where its mean equals the paper's."""
    peft = pytest.importorskip("peft.utils.merge_utils", reason="peft is an extra")
    deltas = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    weights = torch.ones(3)
    kept = int(density * 1000)
    thresholds = torch.tensor([methods.kth_magnitude(lambda d=d: [d], kept) for d in deltas])  # type: ignore[misc]
    ours = methods.ties(methods.trim(deltas, thresholds), weights)
    assert torch.allclose(ours, peft.ties(list(deltas), weights, density), atol=1e-6)
    assert torch.allclose(methods.weighted_sum(deltas, weights), peft.task_arithmetic(list(deltas), weights))


# --- whole models -----------------------------------------------------------------------------------------


def tuned(folder: Path, seed: int) -> Path:
    """Save a copy of the base with noise added to each weight."""
    model = predictor()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    model.save(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and two models fine-tuned from it."""
    root = tmp_path_factory.mktemp("models")
    predictor().save(root / "base")
    return {"base": root / "base", "a": tuned(root / "a", 1), "b": tuned(root / "b", 2)}


def weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return found


def merge(saved: dict[str, Path], output: Path, **given: Any) -> dict[str, Tensor]:
    Merge(saved["base"], [saved["a"], saved["b"]], MergeSettings(**given)).run(output)
    return weights(output)


@pytest.fixture(params=[1 << 24, 1000], ids=["whole tensors", "chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The result doesn't depend on the chunk size."""
    monkeypatch.setattr(files, "CHUNK_SIZE", request.param)
    yield


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "slerp"])
def test_a_merged_model_is_what_the_tensors_say(
    method: str, saved: dict[str, Path], tmp_path: Path, chunks: None
) -> None:
    found = merge(saved, tmp_path / "out", method=method, density=0.4, weights=(1.0, 3.0), scale=0.5)
    base, one, two = (weights(saved[name]) for name in ("base", "a", "b"))
    shares = torch.tensor([1.0, 3.0])
    for name, value in base.items():
        values = torch.stack([one[name].flatten(), two[name].flatten()])
        deltas = values - value.flatten()
        if method == "linear":
            expected = (values[0] + 3 * values[1]) / 4
        elif method == "slerp":
            a, b = values.double()
            angle = torch.arccos((a @ b / (a.norm() * b.norm()).clamp(min=1e-300)).clamp(-1, 1))
            straight = abs(torch.cos(angle)) > methods.PARALLEL or not a.norm() * b.norm()
            expected = (
                0.25 * a + 0.75 * b
                if straight
                else (torch.sin(0.25 * angle) * a + torch.sin(0.75 * angle) * b) / torch.sin(angle)
            )
        else:
            if method == "ties":
                kept = max(1, int(0.4 * value.numel()))
                limits = deltas.abs().sort(1, descending=True).values[:, kept - 1]
                trimmed = torch.where(deltas.abs() >= limits[:, None], deltas, 0.0)
                sign = (shares[:, None] * trimmed).sum(0).sign()
                agrees = shares[:, None] * (trimmed.sign() == sign) * (trimmed != 0)
                change = (agrees * trimmed).sum(0) / agrees.sum(0).clamp(min=1e-30)
            else:
                change = (shares[:, None] * deltas).sum(0)
            expected = value.flatten() + 0.5 * change
        assert found[name].shape == value.shape and found[name].dtype == value.dtype
        assert torch.allclose(found[name].flatten(), expected.float(), atol=1e-6), name


def test_the_merged_model_answers(saved: dict[str, Path], tmp_path: Path) -> None:
    """It loads like any other model."""
    merge(saved, tmp_path / "out")
    model = load(tmp_path / "out")
    assert len(model.answer_examples(examples())) == 16 and model.prompt == predictor().prompt
    for name, value in model.model.state_dict().items():
        assert torch.equal(value, weights(tmp_path / "out")[name])


def test_trimming_by_the_whole_model_keeps_the_share_of_all(saved: dict[str, Path], tmp_path: Path) -> None:
    for trim in ("tensor", "model"):
        made = Merge(saved["base"], [saved["a"], saved["b"]], MergeSettings(trim=trim, density=0.25))
        made.run(tmp_path / trim)
        total = sum(statistics.entries for statistics in made.statistics.values())
        kept = [sum(statistics.kept[model] for statistics in made.statistics.values()) / total for model in (0, 1)]
        assert kept == pytest.approx([0.25, 0.25], abs=0.002)
    assert any(
        not torch.equal(value, weights(tmp_path / "model")[name])
        for name, value in weights(tmp_path / "tensor").items()
    )


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_draws_the_same_again_and_otherwise_under_another_seed(
    method: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    first = merge(saved, tmp_path / "1", method=method, density=0.5)
    again = merge(saved, tmp_path / "2", method=method, density=0.5)
    other = merge(saved, tmp_path / "3", method=method, density=0.5, seed=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    whole = merge(saved, tmp_path / "4", method=method, density=1.0)
    plain = merge(saved, tmp_path / "5", method="ties" if method == "dare_ties" else "task_arithmetic", density=1.0)
    assert all(torch.allclose(whole[name], plain[name], atol=1e-6) for name in whole)


def test_weights_of_a_pattern(saved: dict[str, Path], tmp_path: Path) -> None:
    """The encoder of one model, the rest of the other."""
    found = merge(saved, tmp_path / "out", method="linear", weights=(0.0, 1.0), layers={r"^vision\.": (1.0, 0.0)})
    one, two = weights(saved["a"]), weights(saved["b"])
    assert all(torch.equal(found[name], (one if name.startswith("vision.") else two)[name]) for name in found)


def largest(delta: Tensor, density: float) -> Tensor:
    kept = max(1, int(density * delta.numel()))
    flat = delta.flatten()
    return torch.where(flat.abs() >= flat.abs().sort(descending=True).values[kept - 1], flat, 0.0)


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_what_was_counted(density: float, saved: dict[str, Path], tmp_path: Path) -> None:
    """Norms are of all deltas, sign conflicts of the kept ones."""
    made = Merge(saved["base"], [saved["a"], saved["b"]], MergeSettings(density=density))
    made.run(tmp_path / "out")
    base, one, two = (weights(saved[name]) for name in ("base", "a", "b"))
    names = [name for name in base if name.startswith("language.")]
    deltas = [torch.cat([(x[n] - base[n]).flatten() for n in names]) for x in (one, two)]
    found = made.statistics["language"].record()
    assert found["norms_of_deltas"] == pytest.approx([float(delta.norm()) for delta in deltas], rel=1e-5)
    kept = [torch.cat([largest(x[n] - base[n], density) for n in names]) for x in (one, two)]
    moved = (kept[0] != 0) | (kept[1] != 0)
    opposed = kept[0] * kept[1] < 0
    assert found["sign_conflicts"] == pytest.approx(float(opposed.sum() / moved.sum()), abs=1e-4)
    assert set(made.statistics) == {"vision", "projector", "language"}


@pytest.mark.parametrize(("density", "lowest"), [(0.3, 0.28), (1.0, 1.0)])
@pytest.mark.parametrize("method", ["ties", "dare_linear"])
def test_what_was_kept_is_a_share_of_what_was_moved(
    method: str, density: float, lowest: float, saved: dict[str, Path], tmp_path: Path
) -> None:
    """Weights that no model changes don't count, such as most weights under adapters."""
    base = weights(saved["base"])
    for name in ("a", "b"):
        shutil.copytree(saved[name], tmp_path / name)
        moved = weights(saved[name])
        save_file({n: moved[n] if "_proj" in n else base[n] for n in base}, tmp_path / name / "model.safetensors")
    made = Merge(saved["base"], [tmp_path / "a", tmp_path / "b"], MergeSettings(method, density=density))
    made.run(tmp_path / "out")
    assert made.statistics["vision"].record()["kept"] == [None, None]
    assert all(lowest <= share <= density + 0.02 for share in made.statistics["language"].record()["kept"])


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_a_mean_tells_how_far_the_models_moved_where_the_base_is_known(
    method: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    both = [saved["a"], saved["b"]]
    untold = Merge(None, both, MergeSettings(method))
    untold.run(tmp_path / "untold")
    assert untold.statistics == {} and not untold.knows_base
    told, ties = Merge(saved["base"], both, MergeSettings(method)), Merge(saved["base"], both, MergeSettings(density=1))
    told.run(tmp_path / "told")
    ties.run(tmp_path / "ties")
    assert told.statistics.keys() == ties.statistics.keys()
    assert all(one.record() == ties.statistics[part].record() for part, one in told.statistics.items())
    assert told.base.folder == saved["base"]
    one, other = weights(tmp_path / "told"), weights(tmp_path / "untold")
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_only_the_settings_that_a_method_uses_are_recorded() -> None:
    always = {"method", "weights", "layers"}
    used: dict[str, set[str]] = {
        "linear": set(),
        "slerp": set(),
        "task_arithmetic": {"scale"},
        "ties": {"density", "scale", "trim"},
        "dare_ties": {"density", "scale", "seed"},
        "dare_linear": {"density", "scale", "seed"},
    }
    assert all(set(MergeSettings(method).record()) == always | keys for method, keys in used.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_files_are_written_as_the_library_reads_them(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5).to(dtype), "odd": torch.randn(7).to(dtype), "one": torch.tensor(2.0).to(dtype)}
    tensors |= {"none": torch.zeros(0, 4).to(dtype), "steps": torch.arange(5)}
    save_file(tensors, tmp_path / "model.safetensors")
    read = Weights(tmp_path)
    copied = ((name, piece) for name in read.entries for piece in read.chunks(name))
    files.write(tmp_path / "copy.safetensors", read.entries, copied)
    found = load_file(tmp_path / "copy.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)


def test_weights_in_several_files(saved: dict[str, Path], tmp_path: Path) -> None:
    """Sharded weights, as transformers saves large models."""
    shutil.copytree(saved["a"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    whole = weights(saved["a"])
    names = sorted(whole)
    places = {name: f"part-{n % 2}.safetensors" for n, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: whole[name] for name in names if places[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    parts = {**saved, "a": tmp_path}
    one, other = merge(parts, tmp_path / "1"), merge(saved, tmp_path / "2")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_cut_short_does_not_look_whole(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(saved, tmp_path / "out")
    fifth_stops = Mock(wraps=methods.trim, side_effect=[*[DEFAULT] * 4, KeyboardInterrupt])
    monkeypatch.setattr(methods, "trim", fifth_stops)
    with pytest.raises(KeyboardInterrupt):
        merge(saved, tmp_path / "out", density=0.1)
    with pytest.raises(InputError, match="is not a saved model"):
        load(tmp_path / "out")


def edited(folder: Path, output: Path, edit: Any) -> Path:
    output.mkdir()
    tensors = weights(folder)
    edit(tensors)
    save_file(tensors, output / "model.safetensors")
    (output / "config.json").write_text((folder / "config.json").read_text())
    return output


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            lambda t: t.pop("projector.layers.0.weight"),
            r"projector\.layers\.0\.weight is only in .*/base; merge models fine-tuned from the same base",
        ),
        (lambda t: t.update(extra=torch.zeros(2)), r"extra is only in .*/odd"),
        (
            lambda t: t.update({"projector.layers.0.weight": torch.zeros(2, 2)}),
            r"projector\.layers\.0\.weight has shape \[2, 2\], in the base \[\d+, \d+\]",
        ),
        (
            lambda t: t.update({"projector.layers.0.weight": torch.zeros(2, dtype=torch.uint8)}),
            "has dtype U8, as in quantized models",
        ),
    ],
)
def test_other_models_are_refused(edit: Any, said: str, saved: dict[str, Path], tmp_path: Path) -> None:
    odd = edited(saved["a"], tmp_path / "odd", edit)
    with pytest.raises(InputError, match=said):
        Merge(saved["base"], [odd, saved["b"]], MergeSettings())


def test_models_in_different_types_are_merged(saved: dict[str, Path], tmp_path: Path) -> None:
    """One model was fine-tuned in another dtype than the base's."""
    other = load(saved["b"])
    other.settings = replace(other.settings, dtype="bfloat16")
    cast_parameters(other.model, torch.bfloat16)
    other.save(tmp_path / "b")
    found = merge({**saved, "b": tmp_path / "b"}, tmp_path / "out")
    expected = merge(saved, tmp_path / "expected")
    assert all(torch.allclose(found[name], expected[name], atol=0.1) for name in found)
    assert load(tmp_path / "out").settings.dtype == "float32"


def test_models_that_are_asked_otherwise_are_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    """Image settings and tokenizers must agree; the prompt of each task is kept."""
    changes: list[tuple[dict[str, Any], str]] = [
        ({"images": {"size": 14}}, "differ in their images settings"),
        (
            {"prompts": {"gqa": "b {question}"}},
            "has the prompt 'b {question}' for gqa, another model 'a {question}'; merge models with",
        ),
    ]
    for number, (change, said) in enumerate(changes):
        for name, more in (("a", {"prompts": {"gqa": "a {question}"}}), ("b", change)):
            folder = shutil.copytree(saved[name], tmp_path / f"{name}{number}")
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, **more}))
        with pytest.raises(InputError, match=said):
            Merge(saved["base"], [tmp_path / f"a{number}", tmp_path / f"b{number}"], MergeSettings())
    made = Merge(saved["base"], [tmp_path / "a0", saved["b"]], MergeSettings())
    assert made.config["prompts"] == {"gqa": "a {question}"}
    (tmp_path / "a0" / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="differ in their tokenizers"):
        Merge(saved["base"], [tmp_path / "a0", saved["b"]], MergeSettings())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": "tie"}, "method=tie is unknown; use linear, .*; did you mean 'ties'"),
        ({"density": 0}, "density=0 should be above 0 and at most 1"),
        ({"trim": "all"}, "trim=all is unknown; use tensor or model"),
        ({"weights": (1.0,)}, "should hold a number for each of the 2 models"),
        (
            {"weights": (1.0, -0.5)},
            r"weights=\[1.0, -0.5\]: ties needs non-negative weights, at least one of them above 0; use",
        ),
        ({"weights": (0.0, 0.0)}, "at least one of them above 0"),
        ({"layers": {"^vision": (2, -1)}}, r"layers.\^vision=\[2, -1\]: ties needs non-negative weights"),
        ({"weights": (2.0, -1.0), "method": "linear"}, "linear needs non-negative weights"),
        ({"weights": (2.0, -1.0), "method": "slerp"}, "slerp needs non-negative weights"),
        ({"weights": (2.0, -1.0), "method": "dare_ties"}, "dare_ties needs non-negative weights"),
        ({"layers": {"nowhere": (1, 1)}}, "'nowhere' matches no tensor name, such as"),
        ({"layers": {"(": (1, 1)}}, "is not a regular expression"),
    ],
)
def test_settings_without_sense_are_refused(given: dict[str, Any], said: str, saved: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=said):
        Merge(saved["base"], [saved["a"], saved["b"]], MergeSettings(**given))


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_linear"])
def test_what_a_model_has_learned_is_taken_away(method: str, saved: dict[str, Path], tmp_path: Path) -> None:
    found = merge(saved, tmp_path, method=method, density=1.0, weights=(1.0, -2.0))
    base, one, two = (weights(saved[name]) for name in ("base", "a", "b"))
    for name, value in base.items():
        assert torch.allclose(found[name], value + (one[name] - value) - 2 * (two[name] - value), atol=1e-6)


def test_what_is_missing(saved: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"base=\.\.\. must be set: ties merges differences from a base"):
        Merge(None, [saved["a"], saved["b"]], MergeSettings())
    with pytest.raises(InputError, match="models names 1; ties merges two or more models"):
        Merge(saved["base"], [saved["a"]], MergeSettings())
    with pytest.raises(InputError, match="slerp merges two models"):
        Merge(None, [saved["a"]] * 3, MergeSettings("slerp"))
    with pytest.raises(InputError, match="contains neither model"):
        Merge(tmp_path, [saved["a"], saved["b"]], MergeSettings())


# --- training from a merged model ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def merged_in_halves(saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model merged into a float16 base."""
    root = tmp_path_factory.mktemp("halves")
    base = predictor()
    base.settings = replace(base.settings, dtype="float16")
    cast_parameters(base.model, torch.float16)
    base.save(root / "base")
    Merge(root / "base", [saved["a"], saved["b"]], MergeSettings()).run(root / "merged")
    return root / "merged"


def initialised_from(folder: Path, *given: str) -> TrainConfig:
    """The config of `launch/train.py init_from=...`."""
    return initial_model.with_saved_model(train_config(f"init_from={folder}", *given))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_model_is_trained_on_in_the_type_that_is_asked_for(
    dtype: str, merged_in_halves: Path, tmp_path: Path
) -> None:
    """Training in float16 is refused; the dtypes that the error message recommends work."""
    config = initialised_from(merged_in_halves)
    assert config.model.dtype == "float16"
    with pytest.raises(InputError, match=r"set model\.dtype=float32"):
        compatibility.check(config, DistSettings())
    config = initialised_from(merged_in_halves, f"model.dtype={dtype}")
    compatibility.check(config, DistSettings())
    found = initial_model.initial_model(config, [])
    assert found.settings.dtype == config.model.dtype == dtype
    for name, value in load(merged_in_halves).model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], value.to(DTYPES[dtype]))
    found.save(tmp_path)
    assert load(tmp_path).settings.dtype == dtype
    assert {value.dtype for value in weights(tmp_path).values()} == {DTYPES[dtype]}


def test_what_start_from_refuses(merged_in_halves: Path) -> None:
    with pytest.raises(InputError, match=r"model\.dtype=float61 is unknown; use one of float32, bfloat16, float16"):
        initialised_from(merged_in_halves, "model.dtype=float61")
    with pytest.raises(InputError, match=r"model\.attention_pattern cannot be set here"):
        initialised_from(merged_in_halves, "model.attention_pattern=causal", "model.dtype=float32")
    with pytest.raises(InputError, match=r"model= cannot be set together with init_from=.*with trainer=<its name>"):
        initialised_from(merged_in_halves, "model=tiny_paligemma")
    assert initialised_from(merged_in_halves, "trainer=paligemma_3b").trainer["learning_rate"] == 2e-5
