"""Reader of GQA's official files: examples, errors, synthetic files."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.unit.test_vqav2 import change, ids, save
from vlmvqa.config.schema import DataSettings
from vlmvqa.data.datasets import gqa
from vlmvqa.data.example import Question
from vlmvqa.data.tasks import read_examples
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.extras.synthetic import gqa as synthetic_gqa

VAL = "val_balanced_questions.json"
TRAIN_ALL = "train_all_questions"

# id, image, question, answer: images take turns
ASKED = [
    ("05515938", "2405722", "What is this bird called?", "parrot"),
    ("05515939", "n123", "Is it {red}?", "no"),
    ("15736264", "2405722", "Who is this?", "girl"),
]


def record(image: str, question: str, answer: str) -> dict[str, Any]:
    return {
        "semantic": [
            {"operation": "select", "argument": "bird (329774)", "dependencies": []},
            {"operation": "query", "argument": "name", "dependencies": [0]},
        ],
        "entailed": ["05515940"],
        "equivalent": ["05515938"],
        "question": question,
        "imageId": image,
        "isBalanced": True,
        "groups": {"global": "bird", "local": "06-bird_name"},
        "answer": answer,
        "semanticStr": "select: bird (329774)->query: name [0]",
        "annotations": {"answer": {"0": "329774"}, "question": {"3": "329774"}, "fullAnswer": {"4": "329774"}},
        "types": {"detailed": "categoryThis", "semantic": "cat", "structural": "query"},
        "fullAnswer": f"This is a {answer}.",
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    questions = {key: record(*rest) for key, *rest in ASKED}
    save(tmp_path / VAL, questions)
    save(tmp_path / "train_balanced_questions.json", questions)
    save(tmp_path / "testdev_all_questions.json", questions)
    (tmp_path / TRAIN_ALL).mkdir()
    for number in range(10):
        one = {f"{number}{key}": value for key, value in questions.items()}
        save(tmp_path / TRAIN_ALL / f"{TRAIN_ALL}_{number}.json", one)
    (tmp_path / "images").mkdir()
    for image in ("2405722", "n123"):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{image}.jpg")
    return tmp_path


# --- what is read -------------------------------------------------------------------------------------


def test_questions_are_grouped_by_image_with_the_record_that_the_metric_needs(root: Path) -> None:
    first, second = gqa.read(root, "val")
    assert (first.image, first.image_id) == (root / "images" / "2405722.jpg", "2405722")
    assert ids([first, second]) == ["05515938", "15736264", "05515939"]
    official = record(*ASKED[0][1:])
    unused = ("equivalent", "semanticStr", "annotations", "fullAnswer")
    assert first.questions[0] == Question(
        id="05515938",
        text="What is this bird called?",
        prompt="answer en What is this bird called?\n",
        target="parrot",
        answers=("parrot",),
        question_type="query",
        answer_type="cat",
        details={key: value for key, value in official.items() if key not in unused},
    )
    assert hash(first.questions[0])


def test_training_questions_have_no_details(root: Path) -> None:
    for split in ("train", "train_all"):
        assert all(question.details is None for one in gqa.read(root, split) for question in one.questions)
    assert gqa.read(root, "train")[0].questions[0].question_type == "query"


def test_training_questions_need_only_what_is_trained_on(root: Path) -> None:
    def strip(content: Any) -> None:
        for one in content.values():
            for key in ("semantic", "entailed", "groups", "isBalanced"):
                del one[key]

    change(root / "train_balanced_questions.json", strip)
    assert len(ids(gqa.read(root, "train"))) == 3


def test_train_all_is_ten_files_after_one_another(root: Path) -> None:
    asked = ids(gqa.read(root, "train_all[3:6]"))
    assert sorted(map(str, asked)) == sorted(f"1{key}" for key, *_ in ASKED)
    assert len(ids(gqa.read(root, "train_all"))) == 30
    assert len(gqa.files(root, "train_all")) == 11


def test_slices_count_questions_in_file_order(root: Path) -> None:
    assert ids(gqa.read(root, "val[:67%]")) == ["05515938", "05515939"]
    assert ids(gqa.read(root, "testdev_all", max_samples=1)) == ["05515938"]


# --- what cannot be read --------------------------------------------------------------------------------


def test_missing_files_are_named(root: Path) -> None:
    with pytest.raises(InputError, match=r"has no testdev_balanced_questions.json; GQA expects testdev_balanced_q"):
        gqa.read(root, "testdev")
    with pytest.raises(InputError, match=r"GQA has no split 'testdef', only .*; did you mean 'testdev'"):
        gqa.read(root, "testdef")
    (root / TRAIN_ALL / f"{TRAIN_ALL}_7.json").unlink()
    with pytest.raises(InputError, match=f"has no {TRAIN_ALL}/{TRAIN_ALL}_7.json; GQA expects"):
        gqa.read(root, "train_all")
    (root / TRAIN_ALL).rename(root / "other")
    with pytest.raises(InputError, match=f"has no {TRAIN_ALL}; GQA expects {TRAIN_ALL} and the folder images/"):
        gqa.read(root, "train_all")


def test_broken_json_is_located_by_line_and_column(root: Path) -> None:
    (root / VAL).write_text('{"1":\n {"imageId": "2",}}')
    with pytest.raises(InputError, match=f"{VAL}, line 2, column \\d+: broken JSON"):
        gqa.read(root, "val")


@pytest.mark.parametrize("content", [[], {}, "questions"])
def test_json_of_another_structure_is_refused(root: Path, content: Any) -> None:
    save(root / VAL, content)
    with pytest.raises(InputError, match=f"{VAL} holds no object of questions by id; is it GQA's"):
        gqa.read(root, "val")


def edit(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """Change the second record; a value of `...` removes the key."""

    def apply(content: dict[str, Any]) -> None:
        for key, value in changes.items():
            if value is ...:
                del content["05515939"][key]
            else:
                content["05515939"][key] = value

    return apply


BAD_RECORDS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no object": (lambda content: content.__setitem__("05515939", "why"), 'a JSON object was expected, not "why"'),
    "no image": (edit(imageId=...), "it has no 'imageId'"),
    "image of wrong type": (edit(imageId=123), "its 'imageId' should be text, not 123"),
    "missing image": (edit(imageId="77"), "images/77.jpg is missing (1 of the 2 images are)"),
    "empty question": (edit(question=""), "the question is empty"),
    "empty answer": (edit(answer=" "), "its answer is empty"),
    "answer of wrong type": (edit(answer=3), "its 'answer' should be text, not 3"),
    "no types": (edit(types=None), "its 'types' should be an object, not null"),
    "isBalanced of wrong type": (edit(isBalanced=1), "its 'isBalanced' should be true or false, not 1"),
    "no entailed": (edit(entailed=...), "it has no 'entailed'"),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_bad_record_stops_the_run_or_is_left_out(root: Path, case: str) -> None:
    spoil, problem = BAD_RECORDS[case]
    change(root / VAL, spoil)
    with pytest.raises(InputError) as caught:
        gqa.read(root, "val")
    sentence = str(caught.value)
    assert sentence.startswith(f"{root / VAL}, question 05515939: ") and problem in sentence and "\n" not in sentence
    assert "data.on_bad_record=skip" in sentence
    bad_records = BadRecords("skip")
    assert ids(gqa.read(root, "val", bad_records=bad_records)) == ["05515938", "15736264"]
    assert len(bad_records.seen) == 1


def test_an_id_used_twice_is_an_error_or_its_first_record_counts(root: Path) -> None:
    again = json.dumps(record("n123", "Again?", "no"))
    twice = (root / VAL).read_text().rstrip("}") + f'}}, "05515938": {again}}}'
    (root / VAL).write_text(twice)
    with pytest.raises(InputError, match=f"{VAL}, question 05515938: its id is used twice; keep one of them"):
        gqa.read(root, "val")
    examples = gqa.read(root, "val", bad_records=BadRecords("skip"))
    assert len(ids(examples)) == 3 and examples[0].questions[0].target == "parrot"


def test_an_id_used_in_two_of_the_ten_files_is_noticed(root: Path) -> None:
    path = root / TRAIN_ALL / f"{TRAIN_ALL}_4.json"
    change(path, lambda content: content.update({"205515938": record("n123", "Again?", "no")}))
    with pytest.raises(InputError, match=f"{TRAIN_ALL}_4.json, question 205515938: its id is used twice"):
        gqa.read(root, "train_all")


# --- the results file -----------------------------------------------------------------------------------


def test_the_results_file_has_ids_as_text_and_raw_answers(tmp_path: Path) -> None:
    gqa.write_submission(tmp_path / "submission.json", {"05515938": "Parrot.", 7: ""})
    assert json.loads((tmp_path / "submission.json").read_text()) == [
        {"questionId": "05515938", "prediction": "Parrot."},
        {"questionId": "7", "prediction": ""},
    ]


# --- drawn scenes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_gqa.write(tmp_path_factory.mktemp("data") / "gqa", train_images=300, val_images=60)


def test_drawn_questions_are_read_by_the_official_reader(drawn: Path) -> None:
    for split, images in (("train", 300), ("val", 60), ("testdev", 60)):
        examples = gqa.read(drawn, split)
        assert len(examples) == images
        assert 5.5 < len(ids(examples)) / images < 6.5
    questions = [question for example in gqa.read(drawn, "val") for question in example.questions]
    assert {question.question_type for question in questions} == {"query", "verify", "choose", "logical", "compare"}
    assert {question.answer_type for question in questions} == {"obj", "attr", "rel"}
    assert all(question.details and question.details["isBalanced"] for question in questions)


def test_all_questions_are_the_balanced_ones_and_what_they_entail(drawn: Path) -> None:
    everything = {question.id: question for one in gqa.read(drawn, "val_all") for question in one.questions}
    balanced = ids(gqa.read(drawn, "val"))
    assert set(balanced) == {key for key, question in everything.items() if (question.details or {})["isBalanced"]}
    assert len(everything) > 1.3 * len(balanced)
    for key in balanced:
        question = everything[key]
        for entailed in (question.details or {})["entailed"]:
            assert everything[entailed].details["imageId"] == question.details["imageId"]  # type: ignore[index]
            if question.text.startswith("What color is the"):
                assert everything[entailed].target == "yes"


def test_a_question_alone_does_not_give_its_answer_away(drawn: Path) -> None:
    answers: defaultdict[str, Counter[str | None]] = defaultdict(Counter)
    for example in gqa.read(drawn, "train"):
        for question in example.questions:
            answers[question.text][question.target] += 1
    guessed = sum(max(counts.values()) for counts in answers.values())
    assert guessed / sum(counts.total() for counts in answers.values()) < 0.5


def test_the_config_draws_them_at_first_use(tmp_path: Path) -> None:
    settings = DataSettings("gqa", str(tmp_path / "drawn"), {"train_images": 5, "val_images": 2}, synthetic=True)
    for _ in range(2):
        assert ids(read_examples(settings, "testdev_all", 3, BadRecords()))


def test_read_a_second_time_the_examples_are_the_same(root: Path) -> None:
    settings = DataSettings("gqa", str(root))
    expected = gqa.read(root, "val")
    assert expected[0].questions[0].details
    for _ in range(2):
        assert read_examples(settings, "val", None, BadRecords()) == expected
