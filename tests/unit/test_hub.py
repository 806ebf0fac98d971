"""Datasets in parquet format, from a folder and through `datasets`; neither needs a network."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from tests.configs import data as train_data
from tests.unit.test_vqav2 import ids
from vlmvqa.config.compose import build_settings
from vlmvqa.config.schema import DataSettings
from vlmvqa.data.datasets import vqav2
from vlmvqa.data.example import Question
from vlmvqa.data.images import decode
from vlmvqa.data.tasks import read_examples
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.extras.hub import parquet
from vlmvqa.extras.hub.dataset import Columns, read_hub

# The columns of lmms-lab/VQAv2, as conf/data/vqav2.yaml has them.
VQAV2 = build_settings(Columns, train_data("data=vqav2", "data.root=x").columns, "data.columns")
TEMPLATE = "answer en {question}\n"


def image(color: str) -> dict[str, Any]:
    """Return an image as `datasets` stores it."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


ROWS: list[dict[str, Any]] = [
    {
        "question_id": 10 * number,
        "image_id": image_id,
        "image": image(color),
        "question": f"Question {number}?",
        "multiple_choice_answer": "yes",
        "answers": [{"answer": "yes", "answer_id": 1}, {"answer": "no", "answer_id": 2}],
        "question_type": "is it",
        "answer_type": "yes/no",
    }
    for number, (image_id, color) in enumerate([(7, "red"), (9, "blue"), (7, "red"), (7, "red"), (8, "green")])
]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a parquet file without the metadata that `datasets` adds."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)


def read(
    hub: Path | str,
    split: str = "validation",
    columns: Columns = VQAV2,
    max_samples: int | None = None,
    bad_records: BadRecords | None = None,
    **given: Any,
) -> Any:
    settings = DataSettings("vqav2", None, hub=str(hub), columns=vars(columns), **{"prompt": TEMPLATE, **given})
    return read_hub(settings, vqav2, split, max_samples, bad_records or BadRecords())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "data" / "validation-00000-of-00002.parquet", ROWS[:3])
    write(tmp_path / "data" / "validation-00001-of-00002.parquet", ROWS[3:])
    unanswered = [{**row, "answers": None, "multiple_choice_answer": None} for row in ROWS]
    write(tmp_path / "data" / "test-00000-of-00001.parquet", unanswered)
    return tmp_path


def change(folder: Path, number: int, **changes: Any) -> None:
    rows = [{**row, **changes} if place == number else row for place, row in enumerate(ROWS)]
    write(folder / "data" / "validation-00000-of-00002.parquet", rows[:3])
    write(folder / "data" / "validation-00001-of-00002.parquet", rows[3:])


# --- a folder of parquet files --------------------------------------------------------------------------


def test_rows_are_grouped_by_image_and_image_bytes_are_kept_once(folder: Path) -> None:
    examples = read(folder)
    assert [example.image_id for example in examples] == [7, 9, 8]
    assert ids(examples) == [0, 20, 30, 10, 40]
    assert examples[0].image == ROWS[0]["image"]["bytes"]
    assert decode(examples[1].image, "x").getpixel((0, 0)) == (0, 0, 255)
    assert examples[0].questions[0] == Question(
        0, "Question 0?", "answer en Question 0?\n", "yes", ("yes", "no"), "is it", "yes/no"
    )


def test_null_answers_are_those_of_a_test_split(folder: Path) -> None:
    questions = [question for one in read(folder, "test") for question in one.questions]
    assert {(question.target, question.answers) for question in questions} == {(None, ())}


@pytest.mark.parametrize(
    ("split", "expected"),
    [("validation[2:4]", [20, 30]), ("validation[:40%]", [0, 10]), ("validation[-1:]", [40]), ("validation[1:]", None)],
)
def test_slices_count_rows_over_the_files(folder: Path, split: str, expected: list[int] | None) -> None:
    assert sorted(ids(read(folder, split))) == (expected or [10, 20, 30, 40])


def test_max_samples_takes_the_first_rows(folder: Path) -> None:
    assert ids(read(folder, "validation[1:]", max_samples=2)) == [10, 20]


def test_without_columns_for_ids_rows_are_numbered_and_equal_images_are_one(folder: Path) -> None:
    columns = Columns(answers="multiple_choice_answer")
    examples = read(folder, "validation[1:]", columns)
    assert ids(examples) == [1, 2, 3, 4] and len(examples) == 3
    assert examples[0].questions[0].answers == ("yes",)


def test_images_may_be_bytes_or_files_next_to_the_parquet(folder: Path) -> None:
    Image.new("RGB", (8, 8)).save(folder / "7.png")
    rows = [{**row, "image": "7.png"} for row in ROWS if row["image_id"] == 7]
    write(folder / "paths.parquet", rows)
    write(folder / "raw.parquet", [{**row, "image": row["image"]["bytes"]} for row in ROWS])
    assert read(folder, "paths")[0].image == (folder / "7.png").read_bytes()
    assert read(folder, "raw")[0].image == ROWS[0]["image"]["bytes"]


def test_a_source_reads_it_through_its_config(folder: Path) -> None:
    settings = train_data("data=vqav2", f"data.hub={folder}", "data.eval_split=validation")
    examples = read_examples(settings, settings.eval_split, 3, BadRecords())
    assert ids(examples) == [0, 20, 10]
    with pytest.raises(InputError, match=r"data.root must be given; add data.root=\.\.\. to the command"):
        train_data("data=vqav2")
    with pytest.raises(InputError, match=r"data.options has no key 'foo'"):
        read_examples(replace(settings, options={"foo": 1}), "validation", 3, BadRecords())


def test_gqas_images_are_joined_from_their_own_configuration(tmp_path: Path) -> None:
    types = {"detailed": "relS", "semantic": "rel", "structural": "query"}
    semantic = [{"operation": "select", "dependencies": [], "argument": "dress (12)"}]
    rows = [
        {
            "id": f"20{number}",
            "imageId": f"n{number // 2}",
            "question": "Who?",
            "answer": "girl",
            "isBalanced": True,
            "groups": {"global": None, "local": "x"},
            "entailed": "['201', '202']",
            "types": types,
            "semantic": semantic,
        }
        for number in range(5)
    ]
    for split, inner in (("testdev_balanced", "testdev"), ("train_balanced", "train")):
        write(tmp_path / f"{split}_instructions" / f"{inner}-00000-of-00001.parquet", rows)
        images = [{"id": f"n{number}", "image": image("red")} for number in (3, 1, 0)]
        write(tmp_path / f"{split}_images" / f"{inner}-00000-of-00001.parquet", images)
    settings = train_data("data=gqa", f"data.hub={tmp_path}")
    first, second = read_examples(settings, "testdev_balanced", 3, BadRecords())
    assert ids([first, second]) == ["200", "201", "202"] and isinstance(second.image, bytes)
    question = first.questions[0]
    assert (question.question_type, question.answer_type, question.target) == ("query", "rel", "girl")
    assert question.details == {
        "question": "Who?",
        "answer": "girl",
        "imageId": "n0",
        "isBalanced": True,
        "types": types,
        "groups": {"global": None, "local": "x"},
        "entailed": ["201", "202"],
        "semantic": semantic,
    }
    assert read_examples(settings, "train_balanced", 3, BadRecords())[0].questions[0].details is None
    with pytest.raises(InputError, match=r"there is no image n2 in \{split\}_images"):
        read_examples(settings, "testdev_balanced", None, BadRecords())
    assert len(read_examples(settings, "testdev_balanced", None, BadRecords("skip"))) == 2
    with pytest.raises(InputError, match=r"has no folder testdev_instructions, only .*; did you mean"):
        read_examples(settings, "testdev", 3, BadRecords())


def test_captions_take_the_form_of_their_split(tmp_path: Path) -> None:
    name = "COCO_val2014_000000000042.jpg"
    rows = [{"question_id": name, "image": image("red"), "question": "Describe it.", "answer": ["A  cat", "Cat"]}]
    for split in ("train", "val"):
        write(tmp_path / f"{split}.parquet", rows)
    settings = train_data("data=coco_captions", f"data.hub={tmp_path}")
    (one,) = read_examples(settings, "val", None, BadRecords())[0].questions
    assert one == Question(name, "", "caption en\n", "A  cat", ("A  cat", "Cat"))
    each = read_examples(settings, "train", None, BadRecords())[0].questions
    assert [question.target for question in each] == ["A cat", "Cat"]


# --- errors ---------------------------------------------------------------------------------------------


def test_unknown_splits_folders_and_columns_are_named(folder: Path) -> None:
    with pytest.raises(InputError, match=r"has no split 'val', only test, validation\."):
        read(folder, "val")
    with pytest.raises(InputError, match=r"has no column 'pic', only question_id, .*; set data.columns"):
        read(folder, columns=replace(VQAV2, image="pic"))
    with pytest.raises(InputError, match=r"has no folder dta, only data; set data.hub_config; did you mean 'data'"):
        read(folder, hub_config="dta")
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty has no .parquet file"):
        read(folder / "empty")
    with pytest.raises(InputError, match=r"has no \{question\}"):
        read(folder, prompt="answer")
    with pytest.raises(InputError, match=r"data.hub_images needs data.columns.image_id"):
        read(folder, columns=Columns(), hub_images="images")


def test_a_missing_folder_is_not_searched_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such folder; correct the path"):
        read(tmp_path / "nothing")


def test_a_split_in_two_folders_is_not_guessed(folder: Path) -> None:
    write(folder / "other" / "validation-00000-of-00001.parquet", ROWS)
    with pytest.raises(InputError, match=r"has files of validation in data and other; set data.hub_config to one"):
        read(folder)
    assert len(ids(read(folder, hub_config="other"))) == 5


def test_a_damaged_file_is_named(folder: Path) -> None:
    (folder / "data" / "test-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="test: its parquet files are unreadable"):
        read(folder, "test")


BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "empty question": ({"question": " "}, "its question is empty"),
    "null question": ({"question": None}, "its question is empty"),
    "no id": ({"question_id": None}, "its question_id should be an integer or text, not 'None'"),
    "id used twice": ({"question_id": 0}, "its id 0 is used twice; keep one of them"),
    "no image": ({"image": {"bytes": None, "path": None}}, "it has no image"),
    "a URL": ({"image": {"bytes": None, "path": "https://x.org/1.jpg"}}, "its image is only a URL"),
    "a missing file": ({"image": {"bytes": None, "path": "x.jpg"}}, "its image x.jpg cannot be read (No such file"),
    "empty answer": ({"multiple_choice_answer": ""}, "its answer is empty"),
    "no image id": ({"image_id": None}, "its image_id should be an integer or text"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_stops_the_run_or_is_left_out(folder: Path, case: str) -> None:
    changes, problem = BAD_ROWS[case]
    change(folder, 1, **changes)
    with pytest.raises(InputError) as caught:
        read(folder)
    assert f"{folder} validation, row 1: {problem}" in str(caught.value)
    assert "data.on_bad_record=skip" in str(caught.value)
    bad_records = BadRecords("skip")
    assert ids(read(folder, bad_records=bad_records)) == [0, 20, 30, 40] and len(bad_records.seen) == 1


def test_a_column_of_another_type_is_named(folder: Path) -> None:
    with pytest.raises(InputError, match=r"row 0: its image_id should be text, not '7'; fix it or data.columns"):
        read(folder, columns=replace(VQAV2, question="image_id"))
    with pytest.raises(InputError, match=r"row 0: its image_id should be texts, not '7'; fix it or data.columns"):
        read(folder, columns=replace(VQAV2, answers="image_id"))


def test_without_the_packages_a_sentence_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "validation.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"needs the package pyarrow; install it with: pip install 'vlmvqa\[hub\]'"):
        read(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs the package datasets; install it with: pip install 'vlmvqa\[hub\]'"):
        read("lmms-lab/VQAv2")


# --- through `datasets` ----------------------------------------------------------------------------------


@pytest.fixture
def loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Read the folder through `datasets`, as if it were a Hub id."""
    datasets = pytest.importorskip("datasets")
    for row, name in ((ROWS[:3], "validation-00000-of-00002"), (ROWS[3:], "validation-00001-of-00002")):
        table = datasets.Dataset.from_list(row).cast_column("image", datasets.Image())
        table.to_parquet(folder / "data" / f"{name}.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder.parent / "cache")
    monkeypatch.setattr(parquet, "_folder", lambda name: None)

    def load(split: str, **options: Any) -> Any:
        return read(folder, split, **options)

    return load


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_gives_the_same_examples(loaded: Callable[..., Any], streaming: bool) -> None:
    examples = loaded("validation", streaming=streaming)
    assert ids(examples) == [0, 20, 30, 10, 40] and examples[0].image == ROWS[0]["image"]["bytes"]
    assert examples[0].questions[0].answers == ("yes", "no")
    assert ids(loaded("validation[1:]", streaming=streaming, max_samples=2)) == [10, 20]
    assert ids(loaded("validation[3:5]", streaming=streaming)) == [30, 40]
    with pytest.raises(InputError, match=r"has no split 'val', only (test, validation|validation, test)\."):
        loaded("val", streaming=streaming)
    with pytest.raises(InputError, match=r"has no column 'pic', only .*; set data.columns"):
        loaded("validation", streaming=streaming, columns=replace(VQAV2, image="pic"))


def test_percentages_need_a_known_number_of_rows(loaded: Callable[..., Any]) -> None:
    with pytest.raises(
        InputError, match=r"'validation\[:40%\]' depends on the number of rows, which is unknown while streaming"
    ):
        loaded("validation[:40%]", streaming=True)
    assert ids(loaded("validation[:40%]")) == [0, 10]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("HuggingFaceM4/VQAv2", "which is not run; set data.hub=lmms-lab/VQAv2"),
        ("some/script", "which is not run; set data.hub to a copy of the dataset in parquet format"),
    ],
)
def test_a_loading_script_is_refused_with_its_parquet_form(
    monkeypatch: pytest.MonkeyPatch, name: str, sentence: str
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found script.py")

    package = SimpleNamespace(get_dataset_split_names=refuse, config=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "datasets", package)
    with pytest.raises(InputError) as caught:
        read(name, "train")
    assert str(caught.value) == f"{name} is a loading script, {sentence}"


def test_datasets_refuses_loading_scripts_in_every_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr(parquet, "_folder", lambda name: None)
    (tmp_path / "mine").mkdir()
    script = "import datasets\n\nclass Mine(datasets.GeneratorBasedBuilder):\n    pass\n"
    (tmp_path / "mine" / "mine.py").write_text(script)
    with pytest.raises(
        InputError, match=r"mine is a loading script, which is not run; set data.hub to a copy of the dataset"
    ):
        read(tmp_path / "mine", "train")


def test_what_is_not_on_the_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"the dataset no/where cannot be read from the Hub \(.*\); check data.hub"):
        read("no/where", "train")


def test_a_row_without_answers_among_others_is_a_bad_record(tmp_path: Path) -> None:
    """A single such row must not make the split look like one without answers, which is not scored."""
    rows = [*ROWS[:4], {**ROWS[4], "answers": None, "multiple_choice_answer": None}]
    write(tmp_path / "validation.parquet", rows)
    with pytest.raises(InputError, match="question 40: it has no answers, but others do"):
        read(tmp_path)
    bad_records = BadRecords("skip")
    found = read(tmp_path, bad_records=bad_records)
    assert [example.image_id for example in found] == [7, 9] and len(bad_records.seen) == 1


def test_no_more_is_read_than_was_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "BATCH_ROWS", 2)
    write(tmp_path / "validation.parquet", [{**ROWS[0], "question_id": number} for number in range(20)])
    table = parquet.ParquetTable([tmp_path / "validation.parquet"], "validation")
    read: list[int] = []
    iter_batches = table.files[0].iter_batches

    class Counted:
        metadata = table.files[0].metadata

        def iter_batches(self, *arguments: Any, **options: Any) -> Any:
            for batch in iter_batches(*arguments, **options):
                read.append(len(batch))
                yield batch

    table.files = [Counted()]
    assert len(list(table.rows(range(3), ["question_id"]))) == 3 and sum(read) == 4
