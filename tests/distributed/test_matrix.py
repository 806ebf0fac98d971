"""Every strategy with every kind of training: it saves, resumes and loads elsewhere, or is refused with its sentence.

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
from vlmvqa.sequence.masks import MODES
from vlmvqa.training.parallel import STRATEGIES

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


def named(row: tuple[str, bool]) -> str:
    return row[0] + ("_offload" if row[1] else "")


def cases() -> list[Case]:
    found = []
    for row, trained, (kind, turned) in product(ROWS, TRAINED, KINDS.items()):
        name = f"{named(row)}, {trained}, {kind}"
        common: dict[str, Any] = {"trained": trained, **turned}
        found.append(Case(name, row[0], row[1], **common))
        common |= {"resume": (name, 2), "saves": False}
        found.append(Case(f"{name}, resumed", row[0], row[1], **common))
        other = ELSEWHERE[row]
        found.append(Case(f"{name}, elsewhere", other[0], other[1], **common))
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return work(tmp_path_factory.mktemp("matrix"), cases(), 2)


def cell(results: dict[str, Any], name: str) -> str:
    """What holds of a combination; asserts that it does."""
    saved, resumed, elsewhere = (results[name + more] for more in ("", ", resumed", ", elsewhere"))
    if "refused" in saved:
        return f"refused: {saved['refused']}"
    rest = {step: loss for step, loss in saved["losses"].items() if step > 2}
    assert len(rest) == 2 and saved["whole_model_is_the_checkpoint"], name
    assert resumed["losses"] == pytest.approx(rest, abs=1e-5), name
    # Another strategy rounds elsewhere; and cuts 8-bit moments into other blocks.
    assert elsewhere["losses"] == pytest.approx(rest, abs=1e-2 if "bf16" in name else 1e-3), name
    assert not model("blockwise_prefix").load_state_dict(load_file(saved["weights"])).missing_keys
    return "save, resume, elsewhere"


def table(results: dict[str, Any]) -> str:
    lines = [f"| strategy | trained | {' | '.join(KINDS)} |", "|---" * (2 + len(KINDS)) + "|"]
    for row, (trained, words) in product(ROWS, TRAINED.items()):
        cells = [cell(results, f"{named(row)}, {trained}, {kind}") for kind in KINDS]
        lines.append(f"| {named(row)} | {words} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_matrix_is_the_documented_one(results: dict[str, Any]) -> None:
    page = DOCS.read_text()
    before, _, rest = page.partition(BEGIN)
    written, _, after = rest.partition(END)
    found = table(results)
    if os.environ.get("VLMVQA_WRITE_DOCS"):
        Path(DOCS).write_text(f"{before}{BEGIN}{found}{END}{after}")
    else:
        assert written == found, "docs/scaling.md: write the table anew with VLMVQA_WRITE_DOCS=1"


@pytest.mark.slow
def test_every_attention_mode_under_every_strategy(tmp_path: Path) -> None:
    """prefix_lm with one question an image, the others with several."""
    named_cases = [
        Case(f"{mode}-{named(row)}", row[0], row[1], mode=mode, steps=2, saves=False)
        for mode, row in product(MODES, ROWS)
    ]
    found = work(tmp_path / "two", named_cases, 2)
    for mode in MODES:
        expected = found[f"{mode}-ddp"]["losses"]
        assert len(expected) == 2
        for row in ROWS:
            assert found[f"{mode}-{named(row)}"]["losses"] == pytest.approx(expected, abs=1e-4)
            assert f"attention     {mode}, dense (softcap)" in found[f"{mode}-{named(row)}"]["table"]
    assert len({found[f"{mode}-ddp"]["losses"][2] for mode in MODES}) == len(MODES)  # they are not the same thing
