"""Loggers receive the same metrics and samples, resumed runs continue, and run.json records each start."""

from __future__ import annotations

import csv
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.end_to_end.scripts import LONGER, call, done
from vlmvqa.code_state import code_state
from vlmvqa.extras.loggers.tensorboard_events import TensorBoard
from vlmvqa.extras.loggers.tracking import RunInfo
from vlmvqa.training.log import read_log

wandb = pytest.importorskip("wandb", reason="wandb is an extra: pip install 'vlmvqa[wandb]'")
pytest.importorskip("mlflow", reason="mlflow is an extra: pip install 'vlmvqa[mlflow]'")

STEPS = ("trainer.max_steps=4", "trainer.eval_steps=2", "trainer.save_steps=2")
LOGGERS = "logger=[tensorboard,wandb,mlflow,csv]"
Series = dict[str, dict[int, float]]  # metric name: {step: value}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*LONGER, *STEPS, LOGGERS, f"data.root={tmp_path_factory.mktemp('data') / 'shapes'}"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, arguments: list[str]) -> Iterator[tuple[Path, str]]:
    """The folder of a run with four loggers, and its output."""
    folder = tmp_path_factory.mktemp("runs") / "logged"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield folder, done(call("train", f"run.dir={folder}", *arguments)).out


def in_table(folder: Path) -> Series:
    found: Series = {}
    with (folder / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            for name, value in row.items():
                if value:
                    found.setdefault(name, {})[step] = float(value)
    return found


def in_tensorboard(folder: Path) -> Series:
    events = EventAccumulator(str(folder / "runs"), size_guidance={"scalars": 0})
    events.Reload()
    return {name: {one.step: one.value for one in events.Scalars(name)} for name in events.Tags()["scalars"]}


def in_mlflow(folder: Path) -> Series:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(folder / "mlruns").resolve().as_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'vlmvqa'")
    (one,) = client.search_runs([experiment.experiment_id])
    assert one.info.status == "FINISHED"
    names = one.data.metrics
    return {name: {m.step: m.value for m in client.get_metric_history(one.info.run_id, name)} for name in names}


def in_weights_and_biases(folder: Path) -> Series:
    from wandb.proto import wandb_internal_pb2

    found: Series = {}
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for content in records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            values = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            step = values.pop("train/global_step", None)
            for name, value in values.items():
                if not name.startswith(("_", "samples/")) and isinstance(value, int | float):
                    found.setdefault(name, {})[int(step)] = value
    return found


def records(content: bytes) -> Iterator[bytes]:
    """Yield the records of an offline run's file: LevelDB's log format, 32-KiB blocks after a 7-byte header."""
    place, parts = 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:  # too small for another header
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a complete record, or its last fragment
            yield parts
            parts = b""


def test_four_loggers_hold_the_same_numbers_by_the_same_names(run: tuple[Path, str]) -> None:
    folder, _ = run
    table = in_table(folder)
    for name in ("train/loss", "train/tokens_per_second", "train/peak_memory_gib", "train/peak_rss_gib"):
        assert list(table[name]) == [1, 2, 3, 4], name
    assert list(table["eval/vqa_accuracy"]) == list(table["eval/questions_per_second"]) == [2, 4]
    score = json.loads((folder / "metrics.json").read_text())["metrics"]["vqa_accuracy"]["overall"]
    assert table["final/shapes_vqa_accuracy"] == {4: score}
    logged = {record["step"]: record["loss"] for record in read_log(folder / "log.jsonl") if "loss" in record}
    assert table["train/loss"] == logged
    for series in (in_tensorboard(folder), in_mlflow(folder), in_weights_and_biases(folder)):
        assert series.keys() == table.keys()
        for name, values in table.items():
            assert series[name] == pytest.approx(values, rel=1e-6), name


def test_samples_show_the_same_questions_with_their_images(run: tuple[Path, str]) -> None:
    folder, _ = run
    records = read_log(folder / "samples.jsonl")
    first, last = ([r["question_id"] for r in records if r["step"] == step] for step in (2, 4))
    assert first == last and len(first) == len(set(first)) == 8
    answered = {r["question_id"]: r for r in map(json.loads, (folder / "predictions.jsonl").open())}
    for record in records:
        if record["step"] == 4:  # the final model
            same = answered[record["question_id"]]
            assert (record["answer"], record["score"]) == (same["answer"], same["vqa_accuracy"])
    events = EventAccumulator(str(folder / "runs"), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    pictures = [one.step for one in events.Images("samples/1")]
    assert pictures == [2, 4] and events.Images("samples/8")[0].width == 48
    assert "expected" in str(events.Tensors("samples/1/text_summary")[-1].tensor_proto.string_val[0])
    assert len(list(folder.glob("mlruns/*/*/artifacts/samples/00000004/*.png"))) == 8
    assert list(folder.glob("wandb/offline-run-*/files/media/table/samples*.json"))
    assert "Answers during training" in (folder / "report.html").read_text()


def test_run_json_records_command_and_code_of_each_start(run: tuple[Path, str]) -> None:
    folder, _ = run
    (start,) = json.loads((folder / "run.json").read_text())["starts"]
    assert start["git"]["commit"] == code_state().commit and start["ranks"] == 1 and start["from_step"] == 0
    assert "trainer.max_steps=4" in start["command"] and start["versions"]["torch"]
    assert json.loads((folder / "metrics.json").read_text())["code"].split(",")[0] == str(code_state()).split(",")[0]


def test_without_a_terminal_steps_are_lines_with_an_estimate(run: tuple[Path, str]) -> None:
    _, printed = run
    lines = [line for line in printed.splitlines() if line.startswith("step ")]
    assert [line.split(",")[0] for line in lines if "loss" in line] == [f"step {n}/4" for n in (1, 2, 3, 4)]
    assert "left: loss " in lines[0] and "train_loss" not in printed and "train_runtime" not in printed


def test_a_resumed_run_continues_in_the_same_places(
    tmp_path: Path, run: tuple[Path, str], arguments: list[str]
) -> None:
    """As if killed after step 3: steps after the checkpoint are logged once by loggers that can drop them."""
    whole, _ = run
    folder = Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))
    shutil.rmtree(folder / "checkpoint-4")
    with (folder / "metrics.csv").open("r+") as file:
        text = file.read()
        file.seek(0)
        file.truncate()
        file.write(text[: text.index("\n4,") + 20])  # truncated in the middle of its last line
    done(call("train", f"run.dir={folder}", *arguments, "resume=auto"))
    before, after = in_table(whole), in_table(folder)
    assert after.keys() == before.keys()
    for name in ("train/loss", "eval/vqa_accuracy", "final/shapes_vqa_accuracy"):
        assert after[name] == before[name]
    tensorboard = in_tensorboard(folder)
    assert {name: list(values) for name, values in tensorboard.items()} == {n: list(v) for n, v in before.items()}
    assert in_mlflow(folder).keys() == before.keys()  # and there is only one run
    assert (folder / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    first, second = json.loads((folder / "run.json").read_text())["starts"]
    assert (first["from_step"], second["from_step"]) == (0, 2)


def test_loggers_and_samples_can_be_switched_off(tmp_path: Path, arguments: list[str]) -> None:
    given = [argument for argument in arguments if argument != LOGGERS]
    done(call("train", f"run.dir={tmp_path / 'run'}", *given, "logger=none", "log_samples=0", "trainer.max_steps=2"))
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert not {"runs", "wandb", "mlruns", "metrics.csv", "samples.jsonl"} & left and "run.json" in left
    assert "Answers during training" not in (tmp_path / "run" / "report.html").read_text()


def test_a_restarted_run_has_one_curve(tmp_path: Path) -> None:
    """A run stopped before its first checkpoint restarts at step 0; its earlier events are dropped."""
    for steps in (5, 3):
        board = TensorBoard(RunInfo(tmp_path, "again", {}, "", "code"))
        for step in range(1, steps + 1):
            board.log_metrics({"train/loss": 1 / step}, step)
        board.close(finished=True)
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    assert [one.step for one in events.Scalars("train/loss")] == [1, 2, 3]
