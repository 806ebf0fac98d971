"""`bench.gpu` on the CPU at tiny sizes: deadlines, failures, imports, and the code path of every section."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from bench import models, shapes
from bench.gpu import check
from bench.gpu import correctness as gpu_correctness
from bench.gpu import distributed as gpu_distributed
from bench.gpu import flex as gpu_flex
from bench.gpu import machine as gpu_machine
from bench.gpu import profile as gpu_profile
from bench.gpu import sizes as gpu_sizes
from bench.gpu.section import DeadlineError, Section, interrupt, timed
from bench.gpu.sizes import TINY
from tests.conftest import ROOT
from tests.forks import ranks
from vlmvqa.models import flex_tiles, language
from vlmvqa.sequence.masks import block_mask

CPU = torch.device("cpu")
BLOCKED = ("hydra", "omegaconf", "deepspeed", "bitsandbytes", "datasets", "pandas", "matplotlib")
# What `import bench.gpu` may load of the project.
IMPORTED = ("vlmvqa.models.", "vlmvqa.sequence.", "vlmvqa.extras.planning.")
PARENTS = {"vlmvqa", "vlmvqa.errors", "vlmvqa.models", "vlmvqa.sequence", "vlmvqa.extras", "vlmvqa.extras.planning"}
PROGRAM = """\
import json, sys
sys.modules.update(dict.fromkeys({blocked!r}))
import bench.gpu.check
print(json.dumps([name for name in sys.modules if name.split(".")[0] == "vlmvqa"]))
{more}
"""


def section(ends: float = float("inf")) -> Section:
    return Section("some", CPU, TINY, ends)


def main(tmp_path: Path, *arguments: str) -> int:
    return check.main(["--device", "cpu", "--size", "tiny", "--output", str(tmp_path), *arguments])


def use(monkeypatch: pytest.MonkeyPatch, **functions: Callable[[Section], None]) -> None:
    monkeypatch.setattr(check, "SECTIONS", [(name, 10, function) for name, function in functions.items()])


def right(section: Section) -> None:
    section.row("a", lambda: {"seconds": 1.5})
    section.compare("equal", 0.0, 0.0)


def wrong(section: Section) -> None:
    section.compare("error of something", 0.5, 0.1)


def broken(section: Section) -> None:
    raise ValueError("a kernel\ndoes not compile")


# --- deadlines and failures ----------------------------------------------------------------------------------------


def test_sections_are_written_and_summed_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, first=right, second=right)
    assert main(tmp_path) == 0
    found = json.loads((tmp_path / "first.json").read_text())
    assert found["section"] == "first" and found["state"] == "passed" and found["size"] == "tiny"
    assert found["rows"] == [{"name": "a", "seconds": 1.5}] and found["comparisons"][0]["passed"]
    last = capsys.readouterr().out.strip().splitlines()[-5:]
    assert last[0].startswith("| section") and last[-1] == f"written to {tmp_path}/"
    assert "| passed |" in last[2] and "1 of 1" in last[2]


@pytest.mark.parametrize("function", [wrong, broken])
def test_wrong_numbers_and_exceptions_fail_the_run_but_not_the_next_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: Callable[[Section], None]
) -> None:
    use(monkeypatch, first=function, second=right)
    assert main(tmp_path) == 1
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("first", "second"))
    assert first["state"] == ("failed" if function is wrong else "error") and second["state"] == "passed"
    assert first["error"] == ("error of something: 0.5 is above 0.1" if function is wrong else "ValueError: a kernel")


def test_sections_are_skipped_after_their_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, first=wrong, second=wrong)
    assert main(tmp_path, "--budget", "0") == 0
    assert json.loads((tmp_path / "second.json").read_text())["state"] == "skipped"


def test_what_a_section_leaves_of_its_time_is_the_next_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[float] = []
    use(monkeypatch, first=lambda one: ends.append(one.ends), second=lambda one: ends.append(one.ends))
    started = time.monotonic()
    assert main(tmp_path, "--budget", "100") == 0
    assert [round(end - started) for end in ends] == [50, 100]


def test_only_some_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, first=wrong, second=right)
    assert main(tmp_path, "--only", "second") == 0
    assert not (tmp_path / "first.json").exists()
    with pytest.raises(SystemExit, match="no such section; use first, second"):
        main(tmp_path, "--only", "third")


def test_rows_after_the_deadline_are_skipped() -> None:
    late = section(ends=time.monotonic() - 1)
    assert late.row("a", lambda: {"seconds": 1.0}) == {"name": "a", "skipped": "deadline"}


def test_too_little_memory_is_a_result_and_another_exception_is_not() -> None:
    one = section()

    def fails(error: Exception) -> dict[str, Any]:
        raise error

    one.row("large", fails, torch.OutOfMemoryError("CUDA out of memory"))
    assert one.rows[-1] == {"name": "large", "skipped": "out of memory"} and one.state == "passed"
    one.row("broken", fails, ValueError("no kernel"))
    assert "no kernel" in one.rows[-1]["error"] and one.state == "error"
    assert one.row("next", dict) == {"name": "next"}


def test_a_row_that_does_not_end_is_interrupted() -> None:
    with pytest.raises(DeadlineError), interrupt(0.01):
        while True:
            pass
    with interrupt(None):
        pass


def test_nan_fails_a_comparison() -> None:
    one = section()
    one.compare("loss", float("nan"), 1.0)
    assert one.state == "failed"


def test_a_time_per_call() -> None:
    calls: list[int] = []
    assert len(timed(CPU, lambda: calls.append(1), repeats=3, warm=2)) == 3 and len(calls) == 5


# --- rows and intervals --------------------------------------------------------------------------------------------


def test_packed_rows_hold_every_image_within_their_length() -> None:
    documents = shapes.random_documents(shapes.SHAPES["vqav2"], 48, 1000)
    rows = gpu_sizes.packed_rows(documents, 257, 4096)
    assert sorted(image for row in rows for document in row for image in document.images) == list(range(48))
    lengths = [sum(shapes.length(document, 257) for document in row) for row in rows]
    assert len(rows) == 4 and max(lengths) <= 4096 and min(lengths) > 3500
    with pytest.raises(ValueError, match="more than 100 tokens"):
        gpu_sizes.packed_rows(documents, 257, 100)


def test_the_window_hides_tokens_of_the_real_correctness_rows() -> None:
    sizes = gpu_sizes.REAL
    window, image = sizes.correct_language["sliding_window"], sizes.correct_shape.num_image_tokens
    for rows, tokens in sizes.correct_rows:
        found = gpu_sizes.full_rows(sizes.correct_shape, rows, tokens, image, 1000)
        lengths = [[shapes.length(document, image) for document in row] for row in found]
        assert len(found) == rows and min(map(min, lengths)) > window
        assert all(tokens - 700 < sum(row) <= tokens for row in lengths)


def test_intervals_that_overlap_are_counted_once() -> None:
    assert gpu_profile.union([(5, 6), (0, 2), (1, 3)]) == [(0, 3), (5, 6)]
    assert gpu_profile.overlap([(0, 4), (2, 6)], [(5, 8), (10, 11)]) == 1


def test_the_share_of_a_rate() -> None:
    known = gpu_machine.utilisation(section(), 1e9, 0.01)
    assert known.keys() == {"of_matrix_rate"}  # a CPU has no data sheet here


def test_the_page_names_every_section_and_its_seconds() -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \| (\d+) \|", page, re.MULTILINE)
    assert listed == [(name, str(seconds)) for name, seconds, _ in check.SECTIONS]
    assert all(f"`{name}`" in page for name, *_ in check.DISTRIBUTED)


# --- what needs a GPU, with stand-ins for it -------------------------------------------------------------------------


class OnGpu(Section):
    """A section that takes the way of a GPU, on the CPU."""

    cuda = True


def on_gpu() -> OnGpu:
    return OnGpu("some", CPU, TINY)


def kernel(name: str, start: float, end: float) -> Any:
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end))


def test_the_share_in_which_the_gpu_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    events = [kernel("matmul", 0, 40), kernel("softmax", 30, 50), kernel("matmul", 90, 100)]
    monkeypatch.setattr(gpu_profile, "trace", lambda *_: (events, 1.0))
    found = gpu_profile.profiled(on_gpu(), lambda: None)
    assert found["gpu_busy"] == 0.6 and found["kernels"] == 3 and found["seconds"] == pytest.approx(1e-4)
    assert list(found["most"]) == ["matmul", "softmax"] and found["most"]["matmul"] == pytest.approx(5e-5)


def test_the_share_of_the_communication_that_is_overlapped(monkeypatch: pytest.MonkeyPatch) -> None:
    events = [kernel("ncclDevKernel_AllGather", 0, 40), kernel("matmul", 30, 50), kernel("matmul", 90, 100)]
    monkeypatch.setattr(gpu_profile, "trace", lambda *_: (events, 1.0))
    assert gpu_distributed.overlap(on_gpu(), lambda: None)["overlapped"] == 0.25


def test_synchronizations_are_counted_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step() -> None:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    found = gpu_profile.synchronizations(on_gpu(), step)
    assert modes == ["warn", "default"] and found["synchronizations"] == 2
    ((line, times),) = found["lines"].items()
    assert line.startswith(f"{__file__}:") and times == 2


def test_every_option_of_the_sweep_suits_the_kernels() -> None:
    chosen = flex_tiles.choose(256, torch.bfloat16, 232_448, 9)
    found = gpu_flex.sweep(chosen)
    assert len(found) == len(flex_tiles.FORWARD) + len(flex_tiles.BACKWARD)
    for options in found.values():
        assert options.keys() == chosen.keys()
        assert options["bwd_BLOCK_N1"] % options["bwd_BLOCK_M1"] == 0
        assert options["bwd_BLOCK_M2"] % options["bwd_BLOCK_N2"] == 0
    assert chosen in found.values()


@pytest.mark.slow
@pytest.mark.parametrize(("size", "state"), [(101_376, "passed"), (101_377, "failed")])
def test_shared_memory_of_an_a10g_is_compared(monkeypatch: pytest.MonkeyPatch, size: int, state: str) -> None:
    """With FlexAttention's reference instead of its kernels, and one kernel for all of inductor's."""
    kernels = iter([[], [SimpleNamespace(fn=SimpleNamespace(__name__="triton_flex_attention"))]])
    monkeypatch.setattr(gpu_flex, "_new", lambda: torch.compile(flex_attention, backend="aot_eager"))
    monkeypatch.setattr(gpu_flex, "kernels", lambda: next(kernels))
    monkeypatch.setattr(gpu_flex, "bytes_for", lambda *_: size)
    monkeypatch.setattr(gpu_flex, "sweep", lambda _: {})
    monkeypatch.setattr(flex_tiles, "kernel_options", lambda *_: {})
    one = on_gpu()
    with gpu_sizes.flex_available(CPU):
        one.run(gpu_flex.flex)
    assert one.state == state, one.error
    rows = {row["name"]: row for row in one.rows}
    assert rows["an A10G's shared memory"]["triton_flex_attention_bytes"] == size
    assert rows["chosen for an A10G"]["options"] and not rows["inductor's default"]["options"]


# --- every section -------------------------------------------------------------------------------------------------


def test_settings_build_the_measured_model() -> None:
    from vlmvqa.models.build import build

    settings = models.model_settings("tiny", shapes.SHAPES["vqav2"], "blockwise_prefix")
    torch.manual_seed(0)
    expected = build(settings)
    found = models.build_model("tiny", shapes.SHAPES["vqav2"], attention_pattern="blockwise_prefix")
    assert found.attention_pattern == expected.attention_pattern
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_section_runs_without_hydra(tmp_path: Path) -> None:
    """In one process, on an environment without the packages that the project needs elsewhere."""
    # With a budget that no slow machine exceeds.
    arguments = ["--device", "cpu", "--size", "tiny", "--budget", "9999", "--output", str(tmp_path)]
    call = f"sys.exit(bench.gpu.check.main({arguments!r}))"
    program = PROGRAM.format(blocked=BLOCKED, more=call)
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    imported = json.loads(next(line for line in ended.stdout.splitlines() if line.startswith('["vlmvqa')))
    assert not [name for name in imported if not name.startswith(IMPORTED) and name not in PARENTS]
    names = [name for name, *_ in check.SECTIONS]
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in names}
    for name, one in found.items():
        assert one["state"] == "passed" and one["rows"] and not any("error" in row for row in one["rows"]), name
        assert not any(row.get("skipped", "needs CUDA") != "needs CUDA" for row in one["rows"]), name
    for name in ("correctness", "ladder", "answers", "flex", "loss"):
        assert found[name]["comparisons"], name
    assert all(row["planned_bytes"] for row in found["steps"]["rows"])
    notes = "\n".join(note for one in found.values() for note in one["notes"])
    for what in ("synchronizations", "kernel options and shared memory", "peak memory", "GPU is busy"):
        assert what in notes and "not measured: needs CUDA" in notes
    assert ended.stdout.strip().splitlines()[-1] == f"written to {tmp_path}/"


@pytest.mark.slow
def test_a_mask_without_its_window_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "block_mask", lambda tokens, window: block_mask(tokens))
    sizes = replace(TINY, correct_rows=((1, 128),))
    one = Section("correctness", CPU, sizes)
    one.run(gpu_correctness.correctness)
    assert one.state == "failed" and "error of" in one.error


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    arguments = ["-m", "bench.gpu", "--device", "cpu", "--size", "tiny", "--budget", "9999", "--output", str(tmp_path)]
    processes = ranks(2, arguments)
    assert processes.wait() == 0, processes.printed()
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name, *_ in check.DISTRIBUTED}
    assert len(found["bandwidth"]["rows"]) == 2 * len(TINY.copies)
    assert all(row["bytes_per_second"] > 0 for row in found["bandwidth"]["rows"])
    for name in ("recipe_step", "fast_step"):
        step, overlap = found[name]["rows"]
        assert step["questions_per_second"] > 0 and overlap["step_seconds"] > 0
        assert "share of communication that is overlapped: not measured: needs CUDA" in found[name]["notes"]
    assert processes.printed().count("| section") == 1  # rank 0 alone prints
