"""DDP = FSDP = ZeRO-1 = ZeRO-2 = ZeRO-3 = one process, and each resumes the others' checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.harness import work
from tests.distributed.worker import Case, model
from vlmvqa.config.schema import STRATEGIES

STEPS, SAVED = 4, 2  # of a training, and of the checkpoint that others resume
# The strategy that resumes each strategy's checkpoint.
NEXT = dict(zip(STRATEGIES, (*STRATEGIES[1:], STRATEGIES[0]), strict=True))
# An epoch has 14 rows and 2 that fill its fourth step, in which one rank's micro-batch has no supervised token.
PACKED: dict[str, Any] = {"row_tokens": 80, "weighting": "question_sqrt", "steps": 6}
TURNED: dict[str, dict[str, Any]] = {
    "accumulated": {"batch": 1, "trainer": {"gradient_accumulation_steps": 2}},
    "recomputed": {"trainer": {"activation_checkpointing": True}},
    # SGD, because AdamW is nearly invariant to the gradient's norm.
    "percentile": {"clip_percentile": 50, "optim": "sgd", "trainer": {"learning_rate": 0.3, "max_grad_norm": 0.0}},
    "image_prefix": {"attention_pattern": "image_prefix"},
    "partial": {"trained": "projector"},
    "fused": {"vision": "fused"},
    "half": {"bf16": True, "optim": "adamw_bnb_8bit"},
}

# Traced and differentiated only, since inductor takes minutes to build C++.
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each strategy on 2 ranks: plain, resuming from another's checkpoint, and with packed rows."""
    cases = [Case(strategy, strategy, steps=STEPS) for strategy in STRATEGIES]
    cases += [Case(f"{NEXT[s]}-on-{s}", NEXT[s], steps=STEPS, resume=(s, SAVED)) for s in STRATEGIES]
    cases += [Case(f"{strategy}-packed", strategy, **PACKED) for strategy in STRATEGIES]
    kept: dict[str, Any] = {"keep_gathered": True, "reduce_dtype": "bfloat16", "steps": STEPS}
    cases += [Case("fsdp-kept", "fsdp", **kept), Case("ddp-on-kept", "ddp", steps=STEPS, resume=("fsdp-kept", SAVED))]
    cases.append(Case("kept-on-ddp", "fsdp", resume=("ddp", SAVED), **kept))
    cases.append(Case("fsdp-packed-on-ddp", "fsdp", resume=("ddp-packed", 2), **PACKED))
    return work(tmp_path_factory.mktemp("two"), cases, 2)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, two: dict[str, Any]) -> dict[str, Any]:
    """The same in one process with the global batch; and checkpoints of 2 ranks resumed in one process."""
    folder = tmp_path_factory.mktemp("one")
    alone = [Case("plain", batch=4, steps=STEPS), Case("packed", batch=4, **PACKED)]
    for strategy in STRATEGIES:
        saved = Path(two[strategy]["weights"]).parent.with_name(f"checkpoint-{SAVED}")
        (folder / strategy).mkdir()
        (folder / strategy / saved.name).symlink_to(saved)
        # As many rows per step as on two ranks, in two accumulated micro-batches.
        halves = {"gradient_accumulation_steps": 2}
        alone.append(Case(f"on-{strategy}", steps=STEPS, resume=(strategy, SAVED), trainer=halves))
    return work(folder, alone, 1)


@pytest.fixture(scope="module")
def two_turned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each strategy on 2 ranks, with each variant of the settings."""
    cases = [Case(f"{s}-{name}", s, **turned) for s in STRATEGIES for name, turned in TURNED.items()]
    cases.append(Case("fsdp-percentile-on-ddp", "fsdp", resume=("ddp-percentile", 2), **TURNED["percentile"]))
    cases += [Case(f"{strategy}-offload", strategy, offload=True) for strategy in ("fsdp", "zero3")]
    return work(tmp_path_factory.mktemp("two"), cases, 2)


@pytest.fixture(scope="module")
def two_compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each strategy on 2 ranks with compiled blocks, and one without."""
    cases = [Case("plain"), *(Case(f"{strategy}-compiled", strategy, trainer=COMPILED) for strategy in STRATEGIES)]
    return work(tmp_path_factory.mktemp("two"), [replace(case, steps=2, saves=False) for case in cases], 2)


@pytest.fixture(scope="module")
def one_turned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same in one process with the global batch."""
    turned = {name: {**values, "batch": 2 * values.get("batch", 2)} for name, values in TURNED.items()}
    return work(tmp_path_factory.mktemp("one"), [Case(name, **values) for name, values in turned.items()], 1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_are_one(two: dict[str, Any], one: dict[str, Any], strategy: str) -> None:
    """Losses, gradient norms and the final weights."""
    expected, found = one["plain"], two[strategy]
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-4) and len(found["losses"]) == STEPS
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-3)
    weights, whole = load_file(found["weights"]), load_file(expected["weights"])
    start = dict(model("blockwise_prefix").named_parameters())
    assert max(float((whole[name] - start[name].detach()).abs().max()) for name in whole) > 2e-3
    # AdamW divides by the gradient's magnitude, which amplifies rounding where a gradient is close to zero.
    worst = {name: float((weights[name] - whole[name]).abs().max()) for name in whole}
    assert max(worst.values()) < 1e-3, max(worst, key=lambda name: worst[name])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_packed_rows_on_two_ranks_are_those_on_one(two: dict[str, Any], one: dict[str, Any], strategy: str) -> None:
    assert two[f"{strategy}-packed"]["losses"] == pytest.approx(one["packed"]["losses"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", TURNED)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_whatever_is_turned(two_turned: dict[str, Any], one_turned: dict[str, Any], strategy: str, name: str) -> None:
    tolerance = 1e-2 if TURNED[name].get("bf16") else 1e-4
    assert two_turned[f"{strategy}-{name}"]["losses"] == pytest.approx(one_turned[name]["losses"], abs=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_embeddings_keep_fp32_moments(two_turned: dict[str, Any], strategy: str) -> None:
    """The other parameters' moments have 8 bits; under ZeRO, embeddings are a partition of their own."""
    assert two_turned[f"{strategy}-half"]["types_of_large_moments"] == ["32", "8 bits"]


def test_packed_rows_go_on_where_they_stood(two: dict[str, Any]) -> None:
    """Resume in the middle of an epoch, under another strategy, and continue into the next epoch."""
    rest = {step: loss for step, loss in two["ddp-packed"]["losses"].items() if step > 2}
    assert two["fsdp-packed-on-ddp"]["losses"] == pytest.approx(rest, abs=1e-4) and len(rest) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp-offload", "zero3-offload"])
def test_offloaded_is_the_same(two_turned: dict[str, Any], name: str) -> None:
    assert two_turned[name]["losses"] == pytest.approx(two_turned["ddp-recomputed"]["losses"], abs=1e-4)
    assert "offloaded to host memory" in two_turned[name]["table"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compiled_is_the_same(two_compiled: dict[str, Any], strategy: str) -> None:
    found = two_compiled[f"{strategy}-compiled"]
    assert found["losses"] == pytest.approx(two_compiled["plain"]["losses"], abs=1e-3)
    assert "4 blocks compiled by aot_eager" in found["table"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_percentile_clipping_is_of_the_global_norm(
    two_turned: dict[str, Any], one_turned: dict[str, Any], strategy: str
) -> None:
    """The recorded norms are the logged ones, and under every strategy those of one process."""
    result = two_turned[f"{strategy}-percentile"]
    assert result["limits"] == pytest.approx(list(result["norms"].values()), rel=1e-4)
    assert result["limits"] == pytest.approx(one_turned["percentile"]["limits"], rel=1e-3)


@pytest.mark.slow
def test_the_norms_are_remembered(two_turned: dict[str, Any]) -> None:
    """A resumed run restores the norm history: the same bounds, so the same losses."""
    before, resumed = two_turned["ddp-percentile"], two_turned["fsdp-percentile-on-ddp"]
    assert resumed["limits"] == pytest.approx(before["limits"], rel=1e-4) and len(resumed["limits"]) == 4
    rest = {step: loss for step, loss in before["losses"].items() if step > 2}
    assert resumed["losses"] == pytest.approx(rest, abs=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_checkpoint_goes_on_elsewhere(two: dict[str, Any], one: dict[str, Any], strategy: str) -> None:
    """Under the next strategy and in one process: the same next example and the same losses."""
    rest = {step: loss for step, loss in two[strategy]["losses"].items() if step > SAVED}
    elsewhere = two[f"{NEXT[strategy]}-on-{strategy}"]["losses"]
    assert elsewhere == pytest.approx(rest, abs=1e-4) and len(elsewhere) == STEPS - SAVED
    assert one[f"on-{strategy}"]["losses"] == pytest.approx(rest, abs=1e-4)


def test_kept_blocks_and_gradients_reduced_in_bfloat16_save_and_resume(two: dict[str, Any]) -> None:
    """The losses are those of fp32 up to bfloat16's rounding; a checkpoint goes to and comes from DDP."""
    kept, plain = two["fsdp-kept"], two["fsdp"]["losses"]
    assert kept["losses"] == pytest.approx(plain, abs=1e-2) and kept["losses"] != plain
    assert kept["whole_model_is_the_checkpoint"]
    rest = {step: loss for step, loss in kept["losses"].items() if step > SAVED}
    assert two["ddp-on-kept"]["losses"] == pytest.approx(rest, abs=1e-2)
    assert two["kept-on-ddp"]["losses"] == pytest.approx(two["ddp-on-kept"]["losses"], abs=1e-2)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_weights_are_whole_and_load_on_one_cpu(two: dict[str, Any], strategy: str) -> None:
    """A checkpoint contains the weights that are evaluated, under plain names, in the model's own dtype."""
    assert two[strategy]["whole_model_is_the_checkpoint"]
    assert not model("blockwise_prefix").load_state_dict(load_file(two[strategy]["weights"])).missing_keys


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_keep_their_type_and_frozen_ones_their_values(two_turned: dict[str, Any], strategy: str) -> None:
    half = load_file(two_turned[f"{strategy}-half"]["weights"])
    assert {weight.dtype for weight in half.values()} == {torch.float32}
    frozen = load_file(two_turned[f"{strategy}-partial"]["weights"])
    before = dict(model("blockwise_prefix").named_parameters())
    moved = {name for name in before if not torch.equal(frozen[name], before[name])}
    assert moved == {"projector.layers.0.weight", "projector.layers.0.bias"}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_table_says_what_runs(two: dict[str, Any], strategy: str) -> None:
    table = two[strategy]["table"]
    total = sum(p.numel() for p in model("blockwise_prefix").parameters())
    assert table.splitlines()[0].split() == ["strategy", f"{strategy},", "2", "ranks", "on", "cpu"]
    sharded = strategy in ("fsdp", "zero3")
    assert ("of which" in table) == sharded and f"{total:,}" in table
    assert "float32, weights kept in float32" in table and "fp32 moments" in table


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_table_says_that_it_is_halved(two_turned: dict[str, Any], strategy: str) -> None:
    half = two_turned[f"{strategy}-half"]["table"]
    assert "bfloat16, weights kept in float32" in half and "8-bit moments" in half
    assert ("adamw_bnb_8bit cannot step on shards" in half) == (strategy == "fsdp")
    # DeepSpeed casts images, but not the loss weights, whose sum divides the loss.
    types = two_turned[f"{strategy}-half"]["types_of_the_batch"]
    assert types["weights"] == "torch.float32"
    assert types["pixel_values"] == ("torch.bfloat16" if strategy.startswith("zero") else "torch.float32")
