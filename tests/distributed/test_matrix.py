"""Every strategy with every kind of training saves, resumes and loads under another strategy, or is refused.

The table in docs/scaling.md is written by this test (VLMVQA_WRITE_DOCS=1) and compared with it otherwise.
"""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.distributed.harness import work
from tests.distributed.worker import Case, model
from vlmvqa.config.schema import STRATEGIES
from vlmvqa.sequence.rows import ATTENTION_PATTERNS

DOCS, BEGIN, END = ROOT / "docs" / "scaling.md", "<!-- matrix -->\n", "<!-- end of matrix -->"
ROWS = [*((strategy, False) for strategy in STRATEGIES), ("fsdp", True), ("zero3", True)]
ELSEWHERE = dict(zip(ROWS, [*ROWS[1:], ROWS[0]], strict=True))
TRAINED = {"full": "everything", "projector": "the projector"}
KINDS = {
    "fp32, AdamW": {"bf16": False, "optim": "adamw_torch"},
    "fp32, 8-bit": {"bf16": False, "optim": "adamw_bnb_8bit"},
    "bf16, AdamW": {"bf16": True, "optim": "adamw_torch"},
    "bf16, 8-bit": {"bf16": True, "optim": "adamw_bnb_8bit"},
}


ADAPTERS = {
    f"{trained}, {precision}": {"trained": name, "bf16": precision == "bf16"}
    for (name, trained), precision in product((("lora", "LoRA"), ("qlora", "4-bit LoRA")), ("fp32", "bf16"))
}


def named(row: tuple[str, bool]) -> str:
    return row[0] + ("_offload" if row[1] else "")


def three(row: tuple[str, bool], name: str, elsewhere: tuple[str, bool], **turned: Any) -> list[Case]:
    """Return a training that saves, and two that resume from its second step: unchanged, and under another strategy."""
    more = {**turned, "resume": (name, 2), "saves": False}
    return [
        Case(name, *row, **turned),
        Case(f"{name}, resumed", *row, **more),
        Case(f"{name}, elsewhere", *elsewhere, **more),
    ]


def cases() -> list[Case]:
    found = []
    for row, trained, (kind, turned) in product(ROWS, TRAINED, KINDS.items()):
        found += three(row, f"{named(row)}, {trained}, {kind}", ELSEWHERE[row], trained=trained, **turned)
    return found


def adapter_cases() -> list[Case]:
    found = []
    for row, (kind, turned) in product(ROWS, ADAPTERS.items()):
        # A strategy that supports all kinds: some refuse 4-bit weights.
        elsewhere = ("zero2", False) if row == ("ddp", False) else ("ddp", False)
        trainings = three(row, f"{named(row)}, {kind}", elsewhere, **turned)
        refused = turned["trained"] == "qlora" and row[0] in ("fsdp", "zero3")
        found += trainings[:1] if refused else trainings
    return found


def sampled_cases() -> list[Case]:
    """24 cells of the tables: each strategy with each kind of training, and every pair of two settings."""
    kinds, adapters = list(KINDS.items()), list(ADAPTERS.items())
    found = []
    for (number, row), (column, trained) in product(enumerate(ROWS), enumerate((*TRAINED, "lora", "qlora"))):
        bf16, eight_bits = (number + column) % 2, (number // 2 + column) % 2
        if trained in TRAINED:
            kind, turned = kinds[2 * bf16 + eight_bits]
            found += three(row, f"{named(row)}, {trained}, {kind}", ELSEWHERE[row], trained=trained, **turned)
        elif trained == "lora" or row[0] not in ("fsdp", "zero3"):  # these refuse 4-bit weights
            kind, turned = adapters[2 * (trained == "qlora") + bf16]
            elsewhere = ("zero2", False) if row == ("ddp", False) else ("ddp", False)
            found += three(row, f"{named(row)}, {kind}", elsewhere, **turned)
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return work(tmp_path_factory.mktemp("matrix"), cases(), 2)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return work(tmp_path_factory.mktemp("adapters"), adapter_cases(), 2)


def cell(results: dict[str, Any], name: str) -> str:
    """Return the table's text for a combination, and assert that it is true."""
    saved = results[name]
    if "refused" in saved:
        return f"refused: {saved['refused']}"
    resumed, elsewhere = results[f"{name}, resumed"], results[f"{name}, elsewhere"]
    rest = {step: loss for step, loss in saved["losses"].items() if step > 2}
    assert len(rest) == 2 and saved["whole_model_is_the_checkpoint"], name
    assert resumed["losses"] == pytest.approx(rest, abs=1e-5), name
    # Another strategy rounds differently, and divides 8-bit moments into other blocks.
    assert elsewhere["losses"] == pytest.approx(rest, abs=1e-2 if "bf16" in name else 1e-3), name
    weights = load_file(saved["weights"])
    if "LoRA" in name:
        assert weights and all("lora_" in key for key in weights), name
    else:
        assert not model("blockwise_prefix").load_state_dict(weights).missing_keys
    return "save, resume, elsewhere"


def table(results: dict[str, Any]) -> str:
    lines = [f"| strategy | trained | {' | '.join(KINDS)} |", "|---" * (2 + len(KINDS)) + "|"]
    for row, (trained, words) in product(ROWS, TRAINED.items()):
        cells = [cell(results, f"{named(row)}, {trained}, {kind}") for kind in KINDS]
        lines.append(f"| {named(row)} | {words} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def adapter_table(results: dict[str, Any]) -> str:
    lines = [f"| strategy | {' | '.join(ADAPTERS)} |", "|---" * (1 + len(ADAPTERS)) + "|"]
    for row in ROWS:
        cells = [cell(results, f"{named(row)}, {kind}") for kind in ADAPTERS]
        lines.append(f"| {named(row)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sample_of_the_matrices_saves_resumes_and_loads_elsewhere(tmp_path: Path) -> None:
    sample = sampled_cases()
    results = work(tmp_path, sample, 2)
    cells = [case.name for case in sample if case.resume is None]
    assert len(cells) == 24
    assert {cell(results, name) for name in cells} == {"save, resume, elsewhere"}


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_matrix_is_the_documented_one(results: dict[str, Any]) -> None:
    compare(table(results), BEGIN, END)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_adapters_matrix_is_the_documented_one(adapted: dict[str, Any]) -> None:
    compare(adapter_table(adapted), BEGIN.replace("matrix", "adapters"), END.replace("matrix", "adapters"))


def compare(found: str, begin: str, end: str) -> None:
    page = DOCS.read_text()
    before, _, rest = page.partition(begin)
    written, _, after = rest.partition(end)
    if os.environ.get("VLMVQA_WRITE_DOCS"):
        Path(DOCS).write_text(f"{before}{begin}{found}{end}{after}")
    else:
        assert written == found, "docs/scaling.md: rewrite the table with VLMVQA_WRITE_DOCS=1"


@pytest.mark.long
def test_every_attention_mode_under_every_strategy(tmp_path: Path) -> None:
    """prefix_lm with one question per image, the others with several."""
    named_cases = [
        Case(
            f"{attention_pattern}-{named(row)}",
            row[0],
            row[1],
            attention_pattern=attention_pattern,
            steps=2,
            saves=False,
        )
        for attention_pattern, row in product(ATTENTION_PATTERNS, ROWS)
    ]
    found = work(tmp_path / "two", named_cases, 2)
    for attention_pattern in ATTENTION_PATTERNS:
        expected = found[f"{attention_pattern}-ddp"]["losses"]
        assert len(expected) == 2
        for row in ROWS:
            assert found[f"{attention_pattern}-{named(row)}"]["losses"] == pytest.approx(expected, abs=1e-4)
            assert (
                f"attention     {attention_pattern}, dense (softcap)"
                in found[f"{attention_pattern}-{named(row)}"]["table"]
            )
    assert len({found[f"{attention_pattern}-ddp"]["losses"][2] for attention_pattern in ATTENTION_PATTERNS}) == len(
        ATTENTION_PATTERNS
    )  # the patterns differ
