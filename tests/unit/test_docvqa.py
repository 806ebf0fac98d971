"""Reader of DocVQA's official files: examples, errors, synthetic files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.unit.test_vqav2 import change, ids, save
from vlmvqa.config.schema import DataSettings
from vlmvqa.data.datasets import docvqa
from vlmvqa.data.example import Question, count_questions
from vlmvqa.data.images import ImageSettings, decode
from vlmvqa.data.tasks import read_examples
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.extras.synthetic import docvqa as synthetic_docvqa
from vlmvqa.extras.vision.tiles import cut

VAL = "val_v1.0_withQT.json"

# page, question id, question, answers: two pages take turns
ASKED = [
    ("aaaa0001_1", 337, "what is the date mentioned?", ["1/8/93", "1/8/93"]),
    ("bbbb0002_3", 338, "What is the {total}?", ["0.28", "$ 0.28", "$ 0.28"]),
    ("aaaa0001_1", 339, "Who signed?", ["Ä. Öz", "A. Oz"]),
]


def record(page: str, key: int, question: str, answers: list[str]) -> dict[str, Any]:
    return {
        "questionId": key,
        "question": question,
        "question_types": ["handwritten", "form"],
        "image": f"documents/{page}.png",
        "docId": 279,
        "ucsf_document_id": page[:8],
        "ucsf_document_page_no": page[-1],
        "answers": answers,
        "data_split": "val",
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    records = [record(*asked) for asked in ASKED]
    save(tmp_path / VAL, {"dataset_name": "SP-DocVQA", "dataset_split": "val", "data": records})
    unanswered = [{k: v for k, v in one.items() if k not in ("answers", "question_types")} for one in records]
    save(tmp_path / "test_v1.0.json", {"dataset_split": "test", "data": unanswered})
    (tmp_path / "documents").mkdir()
    for page in ("aaaa0001_1", "bbbb0002_3"):
        Image.new("L", (8, 12)).save(tmp_path / "documents" / f"{page}.png")
    return tmp_path


# --- what is read -------------------------------------------------------------------------------------


def test_questions_are_grouped_by_page_in_order_of_first_appearance(root: Path) -> None:
    first, second = docvqa.read(root, "val")
    assert (first.image, first.image_id) == (root / "documents" / "aaaa0001_1.png", "documents/aaaa0001_1.png")
    assert ids([first, second]) == [337, 339, 338]
    assert first.questions[0] == Question(
        id=337,
        text="what is the date mentioned?",
        prompt="what is the date mentioned?\n",
        target="1/8/93",
        answers=("1/8/93", "1/8/93"),
        question_type="handwritten",
    )


def test_the_target_is_the_most_frequent_answer_and_of_equals_the_first(root: Path) -> None:
    targets = {question.id: question.target for one in docvqa.read(root, "val") for question in one.questions}
    assert targets == {337: "1/8/93", 338: "$ 0.28", 339: "Ä. Öz"}


def test_a_test_split_has_no_answers(root: Path) -> None:
    questions = [question for one in docvqa.read(root, "test") for question in one.questions]
    assert {(q.target, q.answers, q.question_type) for q in questions} == {(None, (), None)}


def test_slices_count_questions_in_file_order(root: Path) -> None:
    assert ids(docvqa.read(root, "val[1:]")) == [338, 339]
    assert ids(docvqa.read(root, "val[:67%]")) == [337, 338]
    assert ids(docvqa.read(root, "val", max_samples=1)) == [337]


def test_the_prompt_is_a_template(root: Path) -> None:
    assert docvqa.read(root, "val", prompt="Q: {question}")[1].questions[0].prompt == "Q: What is the {total}?"
    with pytest.raises(InputError, match=r"has no \{question\}"):
        docvqa.read(root, "val", prompt="answer")


def test_its_files_are_what_it_is_read_from(root: Path) -> None:
    assert docvqa.files(root, "val[:1]") == [root / VAL, root / "documents"]


# --- what cannot be read --------------------------------------------------------------------------------


def test_missing_files_are_named(root: Path) -> None:
    with pytest.raises(InputError, match=r"has no train_v1.0_withQT.json; DocVQA expects train_v1.0_withQT.json and"):
        docvqa.read(root, "train")
    with pytest.raises(InputError, match=r"the DocVQA folder .*nowhere does not exist; put val_v1"):
        docvqa.read(root / "nowhere", "val")
    (root / "documents").rename(root / "pages")
    with pytest.raises(InputError, match="has no documents; DocVQA expects"):
        docvqa.read(root, "val")


def test_broken_json_is_located_by_line_and_column(root: Path) -> None:
    (root / VAL).write_text('{"data": [\n{"questionId": 1,}]}')
    with pytest.raises(InputError, match=f"{VAL}, line 2, column \\d+: broken JSON"):
        docvqa.read(root, "val")


@pytest.mark.parametrize(("content", "said"), [([], "holds no list 'data'"), ({"data": []}, "list 'data' is empty")])
def test_json_of_another_structure_is_refused(root: Path, content: Any, said: str) -> None:
    save(root / VAL, content)
    with pytest.raises(InputError, match=said):
        docvqa.read(root, "val")


def edit(**changes: Any) -> Callable[[list[Any]], None]:
    """Change the second record; a value of `...` removes the key."""

    def apply(records: list[Any]) -> None:
        for key, value in changes.items():
            if value is ...:
                del records[1][key]
            else:
                records[1][key] = value

    return apply


WHERE = f"{VAL}, question 338"
BAD_RECORDS: dict[str, tuple[Callable[[list[Any]], None], str, str]] = {
    "no id": (edit(questionId=...), f"{VAL}, question number 1", "it has no 'questionId'"),
    "id of wrong type": (edit(questionId="338"), f"{VAL}, question number 1", 'should be a whole number, not "338"'),
    "id used twice": (edit(questionId=337), f"{VAL}, question 337", "its questionId is used twice; keep one of them"),
    "no object": (lambda records: records.__setitem__(1, 3), f"{VAL}, question number 1", "a JSON object was expected"),
    "empty question": (edit(question=" "), WHERE, "the question is empty"),
    "no image": (edit(image=None), WHERE, "its 'image' should be text, not null"),
    "missing image": (edit(image="documents/x.png"), WHERE, "documents/x.png is missing (1 of the 2 images are)"),
    "no answers": (edit(answers=...), WHERE, "it has no 'answers'"),
    "empty list of answers": (edit(answers=[]), WHERE, "its list of answers is empty"),
    "empty answer": (edit(answers=["", " "]), WHERE, "its answer is empty"),
    "answer of wrong type": (edit(answers=["a", 3]), WHERE, "one of its answers is not text"),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_bad_record_stops_the_run_or_is_left_out(root: Path, case: str) -> None:
    spoil, where, problem = BAD_RECORDS[case]
    change(root / VAL, lambda content: spoil(content["data"]))
    with pytest.raises(InputError) as caught:
        docvqa.read(root, "val")
    sentence = str(caught.value)
    assert sentence.startswith(str(root / where)) and problem in sentence and "\n" not in sentence
    assert "data.on_bad_record=skip" in sentence
    bad_records = BadRecords("skip")
    assert ids(docvqa.read(root, "val", bad_records=bad_records)) == [337, 339]
    assert len(bad_records.seen) == 1


# --- the results file -----------------------------------------------------------------------------------


def test_the_results_file_reads_as_the_official_one(tmp_path: Path) -> None:
    docvqa.write_submission(tmp_path / "out" / "submission.json", {337: " 1/8/93", "338": ""})
    assert json.loads((tmp_path / "out" / "submission.json").read_text()) == [
        {"questionId": 337, "answer": " 1/8/93"},
        {"questionId": 338, "answer": ""},
    ]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["submission.json"]


# --- drawn pages ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_docvqa.write(tmp_path_factory.mktemp("data") / "forms", train_images=60, val_images=20)


def test_drawn_pages_are_read_by_the_official_reader(drawn: Path) -> None:
    train, val, test = (docvqa.read(drawn, split) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (60, 20, 20)
    assert {len(example.questions) for example in train} == {2, 3, 4}
    assert not {example.image_id for example in train} & {example.image_id for example in val}
    assert all(question.target is None for example in test for question in example.questions)
    for example in val:
        *fields, layout = example.questions
        assert layout.question_type == "layout" and {field.question_type for field in fields} == {"form"}
        assert f"what is the {(layout.target or '').lower()}?" in [field.text for field in fields]
        assert all(field.target in synthetic_docvqa.FIELDS[field.text[12:-1].upper()] for field in fields)


def test_the_letters_are_printed_on_their_lines_inside_the_page(drawn: Path) -> None:
    for example in docvqa.read(drawn, "train"):
        assert isinstance(example.image, Path)
        with Image.open(example.image) as image:
            assert image.size == (48, 48)
            dark = np.asarray(image.convert("L")) < 128
        printed = [line for line in range(synthetic_docvqa.LINES) if dark[16 * line : 16 * line + 16].any()]
        *fields, layout = example.questions
        assert len(printed) == len(fields)
        assert any(f"what is printed {synthetic_docvqa.PLACES[line]}?" == layout.text for line in printed)
        for line in printed:
            assert dark[16 * line : 16 * line + 16, :32].sum() > 40 and dark[16 * line : 16 * line + 16, 32:].sum() > 8
        assert not dark[:, -1].any() and not dark[[0, -1]].any()


def test_small_print_is_the_form_many_times_on_a_wider_page(drawn: Path, tmp_path: Path) -> None:
    """The questions are the same; two by two tiles show the forms at twice the size that the thumbnail does."""
    folder = synthetic_docvqa.write(tmp_path / "small", train_images=1, val_images=20, image_size=96, small_print=True)
    assert (folder / VAL).read_bytes() == (drawn / VAL).read_bytes()
    settings = ImageSettings(48, (0.5,) * 3, (0.5,) * 3, tiles={"max": 4})
    for example, large in zip(docvqa.read(folder, "val"), docvqa.read(drawn, "val"), strict=True):
        page, form = (decode(*one.named_images[0]) for one in (example, large))
        *tiles, thumbnail = cut(page, settings)
        assert page.size == (120, 96) == thumbnail.size and len(tiles) == 4
        for tile in tiles:
            shown = np.asarray(tile.crop((0, 0, 24, 24)), dtype=float)
            assert np.abs(shown - np.asarray(form.resize((24, 24)), dtype=float)).mean() < 20


def test_equal_settings_draw_equal_files_and_others_are_refused(drawn: Path, tmp_path: Path) -> None:
    again = synthetic_docvqa.write(tmp_path / "again", train_images=3, val_images=20)
    assert (again / VAL).read_bytes() == (drawn / VAL).read_bytes()
    with pytest.raises(InputError, match=r"other settings \(train_images 3, now 4\)"):
        synthetic_docvqa.write(again, train_images=4, val_images=20)
    with pytest.raises(InputError, match="forms dataset needs image_size of at least 48, not 32"):
        synthetic_docvqa.write(tmp_path / "small", image_size=32)


def test_the_config_draws_them_at_first_use(tmp_path: Path) -> None:
    options = {"train_images": 5, "val_images": 2}
    settings = DataSettings("docvqa", str(tmp_path / "drawn"), options, synthetic=True, prompt="{question}\n")
    for _ in range(2):
        assert count_questions(read_examples(settings, "train", 3, BadRecords())) == 3
    with pytest.raises(InputError, match=r"data.options has no key 'train_images'"):
        read_examples(DataSettings("docvqa", str(tmp_path / "drawn"), options), "train", 3, BadRecords())
