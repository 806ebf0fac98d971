"""The planner's time of a step: terms, what changes them, the documented table, and recorded measurements."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from bench.gpu import recorded, sizes
from tests.configs import config
from tests.conftest import ROOT
from tests.unit.test_planner import ALL, planner, wide
from vlmvqa.config.schema import DistSettings
from vlmvqa.errors import InputError
from vlmvqa.extras.planning import report
from vlmvqa.extras.planning.batches import Rows, computed_blocks
from vlmvqa.extras.planning.gpus import GIB, GPUS
from vlmvqa.extras.planning.memory import build_on_meta
from vlmvqa.extras.planning.planner import Planner, RunChoice, Training
from vlmvqa.extras.planning.run import PlanConfig, build_planner
from vlmvqa.extras.planning.strategy_memory import StrategyMemory, strategy_memory, weights_of
from vlmvqa.extras.planning.time import (
    Assumptions,
    Rates,
    StepWork,
    comparison,
    questions_per_second,
    sensitivity,
    step_terms,
)
from vlmvqa.extras.report.text_tables import aligned, piped

FAST = DistSettings("fsdp", reduce_dtype="bfloat16", keep_gathered=True)
RATES = Rates.of(GPUS["a10g"], True, Assumptions())
MEMORY = StrategyMemory(0, 4_000_000_000, 6_000_000_000, 0, 0, gathered_each_pass=6e9, reduced_each_pass=4e9)
WORK = StepWork(100, 2, {"decoder": 35e12}, replace(MEMORY, exposed_each_pass=1e9), "adamw_torch_fused")


def seconds(work: StepWork, rates: Rates = RATES) -> dict[str, float]:
    return {term.name: term.seconds for term in step_terms(work, rates)}


def test_a_step_by_hand() -> None:
    """35 TFLOP take a second at 50 % of 70; 10 GB/s; the smaller of 2 s and 2 s is half hidden; 600 GB/s of memory."""
    found = seconds(WORK)
    assert found == pytest.approx(
        {
            "decoder": 2.0,
            "gathers": 1.2,
            "reductions": 0.8,
            "hidden": -1.0,
            "exposed": 0.2,
            "adding gradients": 0.02,
            "optimizer": 0.06,
        }
    )
    assert questions_per_second(WORK, RATES) == pytest.approx(100 / sum(found.values()))
    assert seconds(replace(WORK, optimizer="adamw_torch"))["optimizer"] == pytest.approx(0.06 + 13 * 4 / 600)
    full = seconds(WORK, replace(RATES, overlap=1.0, link=1000))
    assert full["hidden"] == pytest.approx(-0.02)  # at most what is sent


@pytest.mark.parametrize("given", [{"efficiency": 50}, {"efficiency": 0}, {"overlap": 3}, {"link": 0}], ids=str)
def test_impossible_assumptions_are_refused(given: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"plan.{next(iter(given))}="):
        Assumptions(**given)


def test_better_constants_are_never_slower() -> None:
    (_, *rows) = sensitivity(WORK, RATES)
    assert [row[:2] for row in rows[:4]] == [["5", "0%"], ["5", "50%"], ["5", "100%"], ["10", "0%"]]
    speeds = [[float(cell) for cell in row[2:]] for row in rows]
    assert all(row == sorted(row) for row in speeds)
    for better, worse in ((1, 0), (2, 1), (3, 0), (6, 3)):
        assert all(a >= b for a, b in zip(speeds[better], speeds[worse], strict=True))


def test_a_comparison_adds_up() -> None:
    (_, *rows) = comparison(WORK, RATES, "other", replace(WORK, passes=4, questions=80))
    for column in (1, 2, 3):
        assert sum(float(row[column]) for row in rows[:-1]) == pytest.approx(float(rows[-1][column]), abs=0.06)


def test_fsdps_keys_send_less_and_take_memory() -> None:
    weights, training = weights_of(build_on_meta(wide(), ALL)), Training("bf16", "adamw_torch_fused")
    plain, fast = (strategy_memory(weights, dist, 4, training) for dist in (DistSettings("fsdp"), FAST))
    blocks = sum(weight.numel for weight in weights if weight.unit is not None)
    everything = sum(weight.numel for weight in weights)
    embedding = sum(weight.numel for weight in weights if weight.embedding)
    sent = 3 / 4
    assert plain.gathered_each_pass == sent * 2 * 2 * blocks and plain.reduced_each_pass == sent * 4 * blocks
    assert plain.exposed_each_pass == sent * (2 + 4) * (everything - blocks)
    assert fast.gathered_each_pass == sent * 2 * (blocks + embedding) and fast.reduced_each_pass == sent * 2 * blocks
    assert fast.exposed_each_pass == sent * (4 * (everything - blocks) - 2 * embedding)
    assert fast.decoder > plain.decoder and fast.reduction < plain.reduction


@pytest.mark.slow
def test_the_fastest_run_has_the_fewest_micro_batches() -> None:
    """Without a rule: each micro-batch sends weights and gradients, and adds gradients up."""
    counted = planner(training=Training("bf16", "adamw_torch_fused", 6))
    best = counted.fastest("fsdp")
    assert best is not None and (best.rows, best.accumulation, best.checkpointing) == (12, 1, False)
    for name in counted.names():
        runs = [RunChoice(name, rows, True, 12 // rows) for rows in (1, 2, 3, 4, 6, 12)]
        speeds = [counted.questions_per_second(run) for run in runs]
        assert speeds == sorted(speeds), name


def test_flex_attention_computes_the_blocks_that_tokens_see() -> None:
    """Documents of 256 tokens fill two blocks; a causal document of n blocks computes n (n + 1) / 2 of them."""
    rows = Rows(1, 1.0, 129, 4, 1024)  # EOS is no input
    assert computed_blocks(rows, 1, 128, "causal") == 3 / 64
    assert computed_blocks(rows, 4, 128, "causal") == 4 * 3 / 64


@pytest.mark.slow
def test_time_counts_mean_texts_with_their_padding_and_memory_the_longest() -> None:
    texts = Rows(2, 1.0, 64, 3, mean_text_tokens=13)
    plain, mean = planner(rows=replace(texts, mean_text_tokens=None)), planner(rows=texts)
    image = mean.num_image_tokens
    assert mean.shape == plain.shape and mean.step_tokens == -(-int(image + 1.5 * 13) // 8) * 8 < plain.step_tokens
    assert mean.padding == pytest.approx(1 - (image + 13) / mean.step_tokens)
    run = RunChoice("ddp", 2, True, 1)
    flops = mean.pass_flops(run)
    assert sum(flops.values()) < sum(plain.pass_flops(run).values())
    assert flops["padding"] / (flops["padding"] + flops["decoder"]) == pytest.approx(mean.padding)
    assert "recomputation" in flops and mean.pass_flops(run._replace(checkpointing=False))["recomputation"] == 0


def test_the_tables_fit_a_terminal() -> None:
    counted = planner()
    run = RunChoice("fsdp", 2, True, 1)
    tables = report.time_tables(counted, run, ("vlm_vqa_4xa10g", WORK))
    assert len(tables) == 4
    assert max(len(line) for _, rows in tables for line in aligned(rows, report.TEXTS).splitlines()) <= 100
    assert len(report.time_tables(counted, run, ("itself", counted.work(run)))) == 3
    written = json.dumps(report.record(counted, [counted.memory("fsdp", 2, True)], "fsdp", tables))
    assert "A step, term by term" in json.loads(written)["time"]


# ---- the documented table

RECIPE = "experiment=vlm_vqa_4xa10g"
LARGE = ("trainer.per_device_train_batch_size=60", "trainer.gradient_accumulation_steps=1")


def planned(*given: str) -> tuple[Planner, RunChoice]:
    loaded = config(PlanConfig, "plan", *given)
    assert loaded.dist is not None
    found = build_planner(loaded)
    found.add(loaded.dist)
    return found, RunChoice("fsdp", found.rows.rows, True, found.training.accumulation)


def steps_page() -> str:
    """The table of three steps, and the fast one's formulas and sensitivity, in Markdown."""
    runs = {"recipe, 6 x 10": (RECIPE,), "60 x 1": (RECIPE, *LARGE), "fast": (f"{RECIPE}_fast",)}
    plans = {name: planned(*given) for name, given in runs.items()}
    works = [one.work(run) for one, run in plans.values()]
    terms = [seconds(work, one.rates) for work, (one, _) in zip(works, plans.values(), strict=True)]
    rows = [["seconds per step", *plans]]
    names = dict.fromkeys(name for found in terms for name in found)
    rows += [[name, *(f"{found.get(name, 0):.2f}" for found in terms)] for name in names]
    speeds = [work.questions / sum(found.values()) for work, found in zip(works, terms, strict=True)]
    needed = [one.memory("fsdp", run.rows, True).needed / GIB for one, run in plans.values()]
    rows.append(["sum", *(f"{sum(found.values()):.2f}" for found in terms)])
    rows.append(["questions per step", *(f"{work.questions:.0f}" for work in works)])
    rows.append(["questions/s", *(f"{speed:.1f}" for speed in speeds)])
    rows.append(["hours per epoch of VQAv2", *(f"{443_757 / speed / 3600:.1f}" for speed in speeds)])
    rows.append(["GiB needed, of 22.0", *(f"{size:.1f}" for size in needed)])
    fast, run = plans["fast"]
    details = (f"{title}\n\n{piped(table)}" for title, table in report.time_tables(fast, run, None))
    return "\n\n".join([piped(rows), "The fast experiment:", *details]) + "\n"


@pytest.mark.long
def test_the_documented_steps_are_the_planners() -> None:
    """docs/scaling.md contains the tables; VLMVQA_WRITE_DOCS=1 updates them."""
    page, found = ROOT / "docs" / "scaling.md", steps_page()
    before, begin, rest = page.read_text().partition("<!-- steps -->\n")
    written, end, after = rest.partition("<!-- end of steps -->")
    assert begin and end
    if os.environ.get("VLMVQA_WRITE_DOCS"):
        page.write_text(f"{before}{begin}{found}{end}{after}")
    else:
        assert written == found


@pytest.mark.long
def test_the_fast_experiment_fits_with_as_many_questions() -> None:
    fast, run = planned(f"{RECIPE}_fast")
    plan = fast.memory("fsdp", run.rows, run.checkpointing)
    assert plan.needed < 0.95 * plan.capacity and not fast.memory("fsdp", run.rows, False).fits
    assert fast.work(run).questions == pytest.approx(240, rel=0.02)
    assert fast.strategies["fsdp"] == FAST and fast.training.optimizer == "adamw_torch_fused"


# ---- measurements


def test_the_planner_agrees_with_every_recorded_measurement() -> None:
    """Within the range of assumed efficiencies, and memory within 15 %."""
    folders = sorted(path.parent for path in recorded.RECORDED.glob("*/steps.json"))
    if not folders:
        pytest.skip(f"{recorded.RECORDED.relative_to(ROOT)} has no recorded results of bench.gpu to compare with")
    for folder in folders:
        for row in recorded.compare(folder):
            assert row.least <= row.measured <= row.most, (folder.name, row)
            if row.measured_bytes:
                assert row.planned_bytes == pytest.approx(row.measured_bytes, rel=0.15), (folder.name, row)


def test_a_record_is_compared_row_by_row(tmp_path: Path) -> None:
    gpu = {"name": "versions", "gpu": "NVIDIA H200", "memory_bytes": 150_000_000_000}
    (tmp_path / "machine.json").write_text(json.dumps({"rows": [{"name": "copy rate"}, gpu]}))
    rows = [
        {"name": "fp32 masters, fused, 3 x 1", "seconds": 2.0, "peak_bytes": 7, "row_tokens": 320, "supervised": 9},
        {"name": "fp32 masters, fused, 1 x 3", "seconds": 1.0, "row_tokens": 320, "supervised": 9},
        {"name": "FSDP2, fused, 3 x 1", "skipped": "deadline"},
    ]
    (tmp_path / "steps.json").write_text(json.dumps({"size": sizes.TINY.name, "rows": rows}))
    large, small = recorded.compare(tmp_path)
    assert (large.name, large.measured, large.measured_bytes) == (rows[0]["name"], 2.0, 7)
    assert small.measured_bytes is None and large.least < large.planned < large.most
    assert large.planned < small.planned  # adding gradients up
    assert large.planned_bytes > small.planned_bytes
    (tmp_path / "machine.json").write_text(json.dumps({"rows": [{**gpu, "gpu": "Radeon"}]}))
    with pytest.raises(ValueError, match="Radeon is not in"):
        recorded.compare(tmp_path)
