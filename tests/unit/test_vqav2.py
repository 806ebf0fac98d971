"""Reader of VQAv2's official files: parsed examples, errors and skipped records."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmvqa.data.datasets import vqav2
from vlmvqa.data.example import Example, Question, count_questions
from vlmvqa.errors import BadRecords, InputError

QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"

# image, question id, question, answer: images 7 and 9 take turns, as in the official files
ASKED = [
    (9, 9000, "What color is the café?", "rouge"),
    (7, 7000, "Is it 日本?", "yes"),
    (9, 9001, "How many cats are there?", "2"),
    (7, 7001, "Is it 日本?", "no"),
    (8, 8000, "Where is the dog?", "left"),
]


def annotation(image_id: int, question_id: int, answer: str) -> dict[str, Any]:
    answers = [{"answer": answer, "answer_confidence": "yes", "answer_id": number} for number in range(1, 10)]
    answers.append({"answer": "n/a", "answer_confidence": "no", "answer_id": 10})
    return {
        "question_id": question_id,
        "image_id": image_id,
        "question_type": "what",
        "answer_type": "other",
        "multiple_choice_answer": answer,
        "answers": answers,
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    questions = [{"image_id": image, "question_id": key, "question": text} for image, key, text, _ in ASKED]
    annotations = [annotation(image, key, answer) for image, key, _, answer in reversed(ASKED)]
    save(tmp_path / QUESTIONS, {"info": {}, "questions": questions})
    save(tmp_path / ANNOTATIONS, {"info": {}, "annotations": annotations})
    for folder in ("val2014", "test2015"):
        (tmp_path / folder).mkdir()
        for image_id in (7, 8, 9):
            Image.new("RGB", (8, 8), "red").save(tmp_path / folder / f"COCO_{folder}_{image_id:012d}.jpg")
    for subset, kept in (("test2015", questions), ("test-dev2015", questions[:3])):
        save(tmp_path / f"v2_OpenEnded_mscoco_{subset}_questions.json", {"questions": kept})
    return tmp_path


def save(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def change(path: Path, edit: Callable[[Any], Any]) -> None:
    """Edit a JSON file's content in place."""
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    save(path, content)


def ids(examples: list[Example]) -> list[int | str]:
    return [question.id for example in examples for question in example.questions]


# --- what is read -------------------------------------------------------------------------------------


def test_questions_are_grouped_by_image_in_order_of_first_appearance(root: Path) -> None:
    examples = vqav2.read(root, "val")
    assert [example.image_id for example in examples] == [9, 7, 8]
    assert ids(examples) == [9000, 9001, 7000, 7001, 8000]
    assert examples[0].image == root / "val2014" / "COCO_val2014_000000000009.jpg"
    assert examples[0].questions[0] == Question(
        id=9000,
        text="What color is the café?",
        prompt="answer en What color is the café?\n",
        target="rouge",
        answers=("rouge",) * 9 + ("n/a",),
        question_type="what",
        answer_type="other",
    )


def test_the_prompt_is_a_template_and_braces_in_questions_are_text(root: Path) -> None:
    change(root / QUESTIONS, lambda content: content["questions"][0].update(question="What is {question}?"))
    examples = vqav2.read(root, "val", prompt="Q: {question} A:")
    assert examples[0].questions[0].prompt == "Q: What is {question}? A:"


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("val[:2]", [9000, 7000]),
        ("val[1:3]", [7000, 9001]),
        ("val[-1:]", [8000]),
        ("val[:]", [9000, 9001, 7000, 7001, 8000]),
        ("val[:40%]", [9000, 7000]),
        ("val[40%:80%]", [9001, 7001]),
        ("val[:30%]", [9000, 7000]),  # 1.5 of 5 questions, rounded
        ("val[-20%:]", [8000]),
    ],
)
def test_a_slice_counts_questions_in_file_order(root: Path, split: str, expected: list[int]) -> None:
    assert ids(vqav2.read(root, split)) == expected


def test_slices_that_meet_share_no_question_and_miss_none(root: Path) -> None:
    parts = [ids(vqav2.read(root, f"val[{start}%:{start + 20}%]")) for start in range(0, 100, 20)]
    assert sorted(str(key) for part in parts for key in part) == sorted(str(key) for _, key, _, _ in ASKED)


def test_max_samples_takes_the_first_questions_of_the_slice(root: Path) -> None:
    assert ids(vqav2.read(root, "val[1:]", max_samples=2)) == [7000, 9001]
    assert count_questions(vqav2.read(root, "val", max_samples=100)) == 5


@pytest.mark.parametrize(("split", "number"), [("test", 5), ("test-dev", 3)])
def test_test_splits_have_questions_without_answers_on_the_test_images(root: Path, split: str, number: int) -> None:
    examples = vqav2.read(root, split)
    assert count_questions(examples) == number
    assert examples[0].image == root / "test2015" / "COCO_test2015_000000000009.jpg"
    question = examples[0].questions[0]
    assert (question.target, question.answers, question.question_type) == (None, (), None)


def test_equal_answers_are_kept_once(root: Path) -> None:
    change(root / ANNOTATIONS, lambda content: content["annotations"][0].update(multiple_choice_answer="no"))
    change(root / ANNOTATIONS, lambda content: content["annotations"][0].update(annotation(8, 8000, "no")))
    examples = vqav2.read(root, "val")
    assert examples[1].questions[1].answers is examples[2].questions[0].answers


# --- what stops the run, whatever the policy ----------------------------------------------------------


def test_a_missing_folder_is_named_with_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere does not exist; put v2_OpenEnded.*, v2_mscoco_val2014.*val2014/"):
        vqav2.read(tmp_path / "nowhere", "val")


def test_a_missing_questions_file_is_named(root: Path) -> None:
    (root / QUESTIONS).unlink()
    with pytest.raises(InputError, match=f"{root} has no {QUESTIONS}; VQAv2 expects"):
        vqav2.read(root, "val")


def test_questions_without_their_annotations_file_are_refused(root: Path) -> None:
    (root / ANNOTATIONS).unlink()
    with pytest.raises(InputError, match=f"has no {ANNOTATIONS}; VQAv2 expects"):
        vqav2.read(root, "val", bad_records=BadRecords("skip"))


def test_a_missing_image_folder_is_named(root: Path) -> None:
    (root / "val2014").rename(root / "val")
    with pytest.raises(InputError, match=f"has no val2014; VQAv2 expects {QUESTIONS}, {ANNOTATIONS} and the folder"):
        vqav2.read(root, "val")


def test_broken_json_is_located_by_line_and_column(root: Path) -> None:
    (root / QUESTIONS).write_text('{"questions": [\n{"question_id": 1,}]}')
    with pytest.raises(InputError, match=f"{QUESTIONS}, line 2, column \\d+: broken JSON"):
        vqav2.read(root, "val")


def test_a_file_cut_off_in_the_middle_is_broken_json(root: Path) -> None:
    text = (root / ANNOTATIONS).read_text(encoding="utf-8")
    (root / ANNOTATIONS).write_text(text[: len(text) // 2], encoding="utf-8")
    with pytest.raises(InputError, match=f"{ANNOTATIONS}, line 1, column .*: broken JSON .*download"):
        vqav2.read(root, "val")


def test_a_file_that_is_not_utf8_is_named(root: Path) -> None:
    (root / QUESTIONS).write_bytes((root / QUESTIONS).read_text(encoding="utf-8").encode("utf-16"))
    with pytest.raises(InputError, match=f"{QUESTIONS}: byte 0 is not UTF-8"):
        vqav2.read(root, "val")


@pytest.mark.parametrize("content", [[], {}, {"questions": {}}, {"annotations": []}, "questions", 3])
def test_json_of_another_structure_is_refused(root: Path, content: Any) -> None:
    save(root / QUESTIONS, content)
    with pytest.raises(InputError, match=f"{QUESTIONS} holds no list 'questions'"):
        vqav2.read(root, "val")


def test_an_empty_list_of_questions_is_refused(root: Path) -> None:
    save(root / QUESTIONS, {"questions": []})
    with pytest.raises(InputError, match="its list 'questions' is empty"):
        vqav2.read(root, "val")


@pytest.mark.parametrize(
    ("split", "sentence"),
    [
        ("vals", r"no split 'vals', only train, val, test, test-dev; did you mean 'val'\?"),
        ("2014", r"no split '2014', only train, val, test, test-dev\."),
        ("", r"no split ''"),
        (
            "val[:10",
            r"'val\[:10' is malformed; write it like val\[:10%\], val\[100:200\] or val\[random:1000\]",
        ),
        ("val[10]", "is malformed"),
        ("val[a:b]", "is malformed"),
        ("val[::2]", "is malformed"),
        ("val[:1.5]", "is malformed"),
        ("val[2:2]", r"'val\[2:2\]' selects none of its 5 questions; choose a larger slice"),
        ("val[:5%]", "selects none"),
        ("val[3:1]", "selects none"),
        ("val[:6]", "reaches beyond its 5 questions; choose a smaller slice"),
        ("val[:101%]", "reaches beyond"),
    ],
)
def test_a_split_that_cannot_be_is_explained(root: Path, split: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        vqav2.read(root, split)


def test_no_samples_and_a_prompt_without_its_question_are_refused(root: Path) -> None:
    with pytest.raises(InputError, match="max_samples=0 selects nothing"):
        vqav2.read(root, "val", max_samples=0)
    with pytest.raises(InputError, match=r"has no \{question\}"):
        vqav2.read(root, "val", prompt="answer en ")


# --- single bad records, under both policies ----------------------------------------------------------


def edit_question(**changes: Any) -> Callable[[Path], None]:
    """Change question 9001, the third of the file; a value of `...` removes the key."""
    return lambda root: change(root / QUESTIONS, lambda content: _edit(content["questions"][2], changes))


def edit_annotation(**changes: Any) -> Callable[[Path], None]:
    """Change the annotation of question 9001, the third of its file."""
    return lambda root: change(root / ANNOTATIONS, lambda content: _edit(content["annotations"][2], changes))


def _edit(record: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if value is ...:
            del record[key]
        else:
            record[key] = value


def drop(name: str, key: str) -> Callable[[Path], None]:
    return lambda root: change(root / name, lambda content: content[key].pop(2))


def replace(name: str, key: str, value: Any) -> Callable[[Path], None]:
    return lambda root: change(root / name, lambda content: content[key].__setitem__(2, value))


THIRD = f"{QUESTIONS}, question 9001"
THIRD_ANNOTATION = f"{ANNOTATIONS}, question 9001"

BAD_RECORDS = {
    "annotation without question": (
        drop(QUESTIONS, "questions"),
        THIRD_ANNOTATION,
        f"{QUESTIONS} has no such question",
    ),
    "question without annotation": (drop(ANNOTATIONS, "annotations"), THIRD, f"{ANNOTATIONS} has no annotation for it"),
    "empty question": (edit_question(question=""), THIRD, "the question is empty"),
    "blank question": (edit_question(question=" \n"), THIRD, "the question is empty"),
    "no question": (edit_question(question=...), THIRD, "it has no 'question'"),
    "question of wrong type": (edit_question(question=5), THIRD, "its 'question' should be text, not 5"),
    "no image id": (edit_question(image_id=...), THIRD, "it has no 'image_id'"),
    "image id of wrong type": (
        edit_question(image_id="9"),
        THIRD,
        "its 'image_id' should be a whole number, not \"9\"",
    ),
    "null image id": (edit_question(image_id=None), THIRD, "its 'image_id' should be a whole number, not null"),
    "missing image": (edit_question(image_id=77), THIRD, "000000000077.jpg is missing (1 of the 4 images are)"),
    "empty answer": (edit_annotation(multiple_choice_answer=""), THIRD_ANNOTATION, "multiple_choice_answer is empty"),
    "blank answer": (edit_annotation(multiple_choice_answer=" "), THIRD_ANNOTATION, "multiple_choice_answer is empty"),
    "null answer": (
        edit_annotation(multiple_choice_answer=None),
        THIRD_ANNOTATION,
        "its 'multiple_choice_answer' should be text, not null",
    ),
    "no answers": (edit_annotation(answers=[]), THIRD_ANNOTATION, "its list of answers is empty"),
    "answers of wrong type": (edit_annotation(answers="2"), THIRD_ANNOTATION, "its 'answers' should be a list"),
    "answer without text": (edit_annotation(answers=[{"answer": 2}]), THIRD_ANNOTATION, "has no text in 'answer'"),
    "no question type": (edit_annotation(question_type=...), THIRD_ANNOTATION, "it has no 'question_type'"),
    "annotation without id": (
        edit_annotation(question_id=...),
        f"{ANNOTATIONS}, annotation number 2",
        "no 'question_id'",
    ),
    "annotation is no object": (
        replace(ANNOTATIONS, "annotations", [1]),
        f"{ANNOTATIONS}, annotation number 2",
        "a JSON object was expected, not [1]",
    ),
    "question is no object": (
        replace(QUESTIONS, "questions", "Why?"),
        f"{QUESTIONS}, question number 2",
        'a JSON object was expected, not "Why?"',
    ),
    "question id of wrong type": (
        edit_question(question_id=True),
        f"{QUESTIONS}, question number 2",
        "its 'question_id' should be a whole number, not true",
    ),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_bad_record_stops_the_run_with_one_sentence_that_names_it(root: Path, case: str) -> None:
    spoil, where, problem = BAD_RECORDS[case]
    spoil(root)
    with pytest.raises(InputError) as caught:
        vqav2.read(root, "val")
    sentence = str(caught.value)
    assert sentence.startswith(str(root / where)) and problem in sentence
    assert "; " in sentence and "data.on_bad_record=skip" in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_bad_record_is_left_out_and_listed_and_the_rest_is_read(root: Path, case: str) -> None:
    spoil, where, problem = BAD_RECORDS[case]
    spoil(root)
    bad_records = BadRecords("skip", listing=root / "left_out.jsonl")
    assert ids(vqav2.read(root, "val", bad_records=bad_records)) == [9000, 7000, 7001, 8000]
    assert any(record.startswith(str(root / where)) and problem in record for record in bad_records.listed())


@pytest.mark.parametrize(("name", "key"), [(QUESTIONS, "questions"), (ANNOTATIONS, "annotations")])
def test_an_id_used_twice_is_an_error_or_its_first_record_counts(root: Path, name: str, key: str) -> None:
    change(root / name, lambda content: content[key].append(content[key][2]))
    with pytest.raises(
        InputError, match=f"{name}, {key[:-1]} 9001: its question_id is used twice; keep one of them, or"
    ):
        vqav2.read(root, "val")
    bad_records = BadRecords("skip")
    assert sorted(map(str, ids(vqav2.read(root, "val", bad_records=bad_records)))) == sorted(str(a[1]) for a in ASKED)
    assert len(bad_records.listed()) == 1


def test_files_that_do_not_belong_together_are_noticed_in_any_slice(root: Path) -> None:
    drop(QUESTIONS, "questions")(root)
    with pytest.raises(InputError, match="use two files of the same split and version"):
        vqav2.read(root, "val[:1]")


def test_several_missing_images_are_counted_in_the_first_sentence(root: Path) -> None:
    for image_id in (7, 8):
        (root / "val2014" / f"COCO_val2014_{image_id:012d}.jpg").unlink()
    with pytest.raises(InputError, match=r"question 7000: its image .*7\.jpg is missing \(2 of the 3 images are\)"):
        vqav2.read(root, "val")
    bad_records = BadRecords("skip")
    assert ids(vqav2.read(root, "val", bad_records=bad_records)) == [9000, 9001]
    assert len(bad_records.listed()) == 2


def test_leaving_everything_out_is_an_error(root: Path) -> None:
    for path in (root / "val2014").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="no usable question is left in val"):
        vqav2.read(root, "val", bad_records=BadRecords("skip"))


# --- the results file ---------------------------------------------------------------------------------


def test_the_results_file_has_whole_number_ids_and_raw_answers(tmp_path: Path) -> None:
    path = tmp_path / "results" / "submission.json"
    vqav2.write_submission(path, {9000: " A Café.\n", "7000": "", "abc": "yes"})
    assert json.loads(path.read_text()) == [
        {"question_id": 9000, "answer": " A Café.\n"},
        {"question_id": 7000, "answer": ""},
        {"question_id": "abc", "answer": "yes"},
    ]
    assert [file.name for file in path.parent.iterdir()] == ["submission.json"]


def test_a_results_file_that_fails_half_way_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "submission.json"
    vqav2.write_submission(path, {1: "yes"})
    with pytest.raises(TypeError):
        vqav2.write_submission(path, {1: "no", 2: b"bytes"})  # type: ignore[dict-item]
    assert json.loads(path.read_text()) == [{"question_id": 1, "answer": "yes"}]
    assert [file.name for file in tmp_path.iterdir()] == ["submission.json"]
