"""The files of launch/prepare.py harness, as the harnesses' own readers see them."""

from __future__ import annotations

import ast
import base64
import io
import json
from pathlib import Path

import pandas
import pytest
import yaml
from PIL import Image

from vlmvqa.config.schema import DataSettings
from vlmvqa.data.example import Example, Question
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.extras.dataset_tools import harness


def png(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 7), color).save(file, "png")
    return file.getvalue()


# What a table may not lose: zeros at the start, words that mean a missing value, tabs and quotes.
EXAMPLES = [
    Example(
        png("red"),
        1,
        (
            Question("007", 'is it "red",\tor not?', "", "none", ("None", "none")),
            Question("008", "how many?", "", None, ("2",)),
        ),
    ),
    Example(png("blue"), 2, (Question("009", "what?", "", "a ball", ("a ball",)),)),
]


def write(folder: Path, format: str, metric: str = "vqa_accuracy", split: str = "val", **more: object) -> str:
    data = DataSettings(source="vqav2", root=None, metric=metric)
    examples = more.get("examples", EXAMPLES)
    return harness.write(format, folder, data, split, examples, BadRecords())  # type: ignore[arg-type]


def test_a_table_is_read_by_pandas_as_it_was_written(tmp_path: Path) -> None:
    name = write(tmp_path, "vlmevalkit")
    table = pandas.read_csv(tmp_path / f"{name}.tsv", sep="\t")  # as VLMEvalKit's `load`
    assert list(table["index"]) == [0, 1, 2]
    assert [json.loads(one) for one in table["question_id"]] == ["007", "008", "009"]
    assert [ast.literal_eval(one) for one in table["answer"]] == [["None", "none"], ["2"], ["a ball"]]
    assert list(table["question"]) == [question.text for one in EXAMPLES for question in one.questions]
    assert table["image"][1] == "0" and base64.b64decode(table["image"][2]) == EXAMPLES[1].image


@pytest.mark.parametrize(
    ("metric", "table", "target"),
    [("vqa_accuracy", "", "target"), ("anls", "_DocVQA", "answers"), ("gqa_accuracy", "_GQA", "target"),
     ("exact_match", "_OCRVQA", "answers")],
)  # fmt: skip
def test_tasks_and_tables_are_scored_as_the_benchmark(tmp_path: Path, metric: str, table: str, target: str) -> None:
    class Loader(yaml.SafeLoader):
        """Reads lmms-eval's tag for functions as text."""

    Loader.add_constructor("!function", lambda loader, node: node.value)
    assert write(tmp_path, "vlmevalkit", metric, "val[:2]") == f"vlmvqa_vqav2_val_2{table}"
    name = write(tmp_path, "lmms_eval", metric, "val[:2]")
    files = (tmp_path / f"{name}{end}.yaml" for end in ("", "_loglikelihood"))
    task, likelihood = (yaml.load(file.read_text(), Loader) for file in files)
    assert task["task"] == name == "vlmvqa_vqav2_val_2" and likelihood["task"] == f"{name}_loglikelihood"
    assert task["doc_to_target"] == target and likelihood["doc_to_target"] == "target"
    assert task["dataset_kwargs"]["data_files"] == {task["test_split"]: f"{name}.parquet"} == {"val": f"{name}.parquet"}
    assert task["lmms_eval_specific_kwargs"]["default"] == {"pre_prompt": "", "post_prompt": ""}
    assert ("process_results" in task) == (metric == "vqa_accuracy")


def test_a_task_holds_questions_and_images(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    path = str(tmp_path / f"{write(tmp_path / '.', 'lmms_eval')}.parquet")
    rows = datasets.load_dataset("parquet", data_files={"val": path}, cache_dir=str(tmp_path / "cache"))["val"]
    assert rows["question_id"] == ["007", "008", "009"]
    assert rows["target"] == ["none", "2", "a ball"]
    assert rows["answers"] == [["None", "none"], ["2"], ["a ball"]]
    assert [row["image"].getpixel((0, 0)) for row in rows] == [(255, 0, 0), (255, 0, 0), (0, 0, 255)]
    compile((tmp_path / "utils.py").read_text(), "utils.py", "exec")


def test_what_a_harness_cannot_score_is_refused(tmp_path: Path) -> None:
    for said, format, metric in (
        ("harness.format=lmms-eval is unknown; did you mean 'lmms_eval'?; use lmms_eval or", "lmms-eval", "anls"),
        ("data.metric=cider has no equivalent in lmms_eval; only vqa_accuracy, anls,", "lmms_eval", "cider"),
    ):
        with pytest.raises(InputError) as error:
            write(tmp_path, format, metric)
        assert said in str(error.value)
    unanswered = [Example(png("red"), 1, (Question(1, "what?", ""),))]
    with pytest.raises(InputError, match="vqav2 test: some questions have no answers to score against"):
        write(tmp_path, "lmms_eval", split="test", examples=unanswered)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written .*; free space, or choose another harness\.dir"):
        write(tmp_path / "file", "vlmevalkit")
