"""Reader of JSONL files: examples, errors and skipped lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.unit.test_vqav2 import ids
from vlmvqa.config.schema import DataSettings
from vlmvqa.data.datasets import jsonl
from vlmvqa.data.example import Question
from vlmvqa.data.tasks import read_examples
from vlmvqa.errors import BadRecords, InputError

LINES: list[dict[str, Any]] = [
    {"image": "images/a.png", "question": "Was ist das?", "answers": ["Bär", "ein Bär", "ein Bär"]},
    {"image": "images/b.jpg", "question": "Is it {red}?", "answers": ["no"], "id": "mine", "note": "ignored"},
    {"image": "images/a.png", "question": "How many?", "answers": ["2", "1"], "id": 77},
]


def write(path: Path, lines: list[Any]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "train.jsonl", LINES)
    write(tmp_path / "test.jsonl", [{k: v for k, v in line.items() if k != "answers"} for line in LINES])
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name)
    return tmp_path


# --- what is read -------------------------------------------------------------------------------------


def test_lines_are_grouped_by_image_and_numbered_where_they_have_no_id(root: Path) -> None:
    first, second = jsonl.read(root, "train")
    assert (first.image, first.image_id) == (root / "images" / "a.png", "images/a.png")
    assert ids([first, second]) == [1, 77, "mine"]
    answers = ("Bär", "ein Bär", "ein Bär")
    assert first.questions[0] == Question(1, "Was ist das?", "answer en Was ist das?\n", "ein Bär", answers)
    assert first.questions[1].target == "2" and second.questions[0].prompt == "answer en Is it {red}?\n"


def test_a_file_without_answers_is_a_test_split(root: Path) -> None:
    questions = [question for one in jsonl.read(root, "test") for question in one.questions]
    assert {(question.target, question.answers) for question in questions} == {(None, ())}


def test_slices_count_lines_that_are_not_empty(root: Path) -> None:
    text = (root / "train.jsonl").read_text(encoding="utf-8")
    (root / "train.jsonl").write_text("\ufeff" + text.replace("\n", "\r\n\r\n"), encoding="utf-8")
    assert ids(jsonl.read(root, "train[1:]")) == ["mine", 77]
    assert ids(jsonl.read(root, "train", max_samples=2)) == [1, "mine"]


def test_images_may_lie_anywhere(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "c.png"
    Image.new("RGB", (8, 8)).save(elsewhere)
    write(root / "train.jsonl", [{**LINES[0], "image": str(elsewhere)}, LINES[1]])
    assert [example.image for example in jsonl.read(root, "train")] == [elsewhere, root / "images" / "b.jpg"]


def test_questions_about_several_images(root: Path) -> None:
    """Equal lists form one example; the order of the images matters."""
    pair = ["images/a.png", "images/b.jpg"]
    lines = [pair, pair[::-1], pair[:1], pair]
    write(root / "train.jsonl", [{"images": images, "question": "Same?", "answers": ["no"]} for images in lines])
    examples = jsonl.read(root, "train")
    assert [[name for _, name in example.named_images] for example in examples] == [
        [str(root / one) for one in images] for images in lines[:3]
    ]
    assert ids(examples) == [1, 4, 2, 3]
    bad: list[Any] = [[], ["images/a.png", 3], ["images/a.png", "images/c.png"]]
    write(root / "train.jsonl", [{"images": one, "question": "Same?", "answers": ["no"]} for one in [pair, *bad]])
    found = BadRecords("skip", root / "skipped.jsonl")
    assert ids(jsonl.read(root, "train", bad_records=found)) == [1]
    skipped = (root / "skipped.jsonl").read_text()
    assert skipped.count("should be a list of paths") == 2 and "c.png is missing" in skipped


def test_a_file_name_may_hold_what_joins_several(root: Path) -> None:
    name = "images/cats + dogs.png"
    Image.new("RGB", (8, 8)).save(root / name)
    write(root / "train.jsonl", [{"image": name, "question": "What?", "answers": ["no"]}])
    assert [example.image for example in jsonl.read(root, "train")] == [root / name]


def test_one_file_is_sliced_and_never_trained_and_evaluated_on_by_mistake(root: Path) -> None:
    path = root / "train.jsonl"
    assert ids(jsonl.read(path, "all[:2]")) == [1, "mine"] and ids(jsonl.read(path, "all[2:]")) == [77]
    for split in ("train", "val"):
        with pytest.raises(InputError, match=r"is one file, whose split is 'all', not '.*'; set data.train_split=all"):
            jsonl.read(path, split)


def test_as_a_launch_script_reads_it(root: Path) -> None:
    for place in (root, root / "train.jsonl"):
        split = "train" if place == root else "all"
        assert len(read_examples(DataSettings("jsonl", str(place)), split, None, BadRecords())) == 2


# --- what cannot be read --------------------------------------------------------------------------------


def test_drawn_lines_are_read_and_know_their_types(tmp_path: Path) -> None:
    settings = DataSettings(
        "jsonl", str(tmp_path / "lines"), {"train_images": 5, "val_images": 3}, synthetic=True, metric="exact_match"
    )
    train, val = (read_examples(settings, split, None, BadRecords()) for split in ("train", "val"))
    assert len(train) == 5 and len(val) == 3
    for example in [*train, *val]:
        assert isinstance(example.image, Path) and example.image.is_file()
        assert all(q.answers == (q.target,) and q.question_type for q in example.questions)
    assert not {q.id for e in train for q in e.questions} & {q.id for e in val for q in e.questions}


def test_one_answer_may_be_a_text(root: Path) -> None:
    line = {"image": "images/a.png", "question": "what?", "answers": "a bear"}
    (root / "single.jsonl").write_text(json.dumps(line) + "\n")
    (example,) = jsonl.read(root, "single")
    assert example.questions[0].answers == ("a bear",) and example.questions[0].target == "a bear"


def test_a_question_type_is_text(root: Path) -> None:
    line = {"image": "a.png", "question": "what?", "answers": ["x"], "question_type": 3}
    (root / "typed.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match="its 'question_type' should be text"):
        jsonl.read(root, "typed")


def test_missing_files_are_named(root: Path) -> None:
    with pytest.raises(InputError, match=f"{root} has no split 'trian', only test, train; did you mean 'train'"):
        jsonl.read(root, "trian")
    with pytest.raises(InputError, match=r"images holds no .jsonl file; put train.jsonl there"):
        jsonl.read(root / "images", "train")
    with pytest.raises(InputError, match=r"nowhere does not exist; set data.root to a folder"):
        jsonl.read(root / "nowhere", "train")
    (root / "empty.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match=r"empty.jsonl holds no usable line; write one JSON object per line"):
        jsonl.read(root, "empty")


BAD_LINES: dict[str, tuple[Any, str]] = {
    "no object": ([1], "line 2: a JSON object was expected, not [1]"),
    "no image": ({"question": "?", "answers": ["a"]}, "line 2: it has no 'image'"),
    "image of wrong type": ({**LINES[1], "image": 3}, "line 2: its 'image' should be text, not 3"),
    "missing image": ({**LINES[1], "image": "images/x.jpg"}, "images/x.jpg is missing (1 of the 2 images are)"),
    "missing folder": ({**LINES[1], "image": "x/x.jpg"}, "x/x.jpg is missing (1 of the 2 images are)"),
    "empty question": ({**LINES[1], "question": ""}, "line 2: the question is empty"),
    "no answers": ({"image": "images/b.jpg", "question": "?"}, "line 2: it has no 'answers'"),
    "empty list": ({**LINES[1], "answers": []}, "line 2: its list of answers is empty"),
    "empty answer": ({**LINES[1], "answers": [""]}, "line 2: its answer is empty"),
    "answers of wrong type": ({**LINES[1], "answers": 3}, "its 'answers' should be a list, not 3"),
    "id of wrong type": ({**LINES[1], "id": 1.5}, "line 2: its 'id' should be a whole number or text, not 1.5"),
    "id used twice": ({**LINES[1], "id": 1}, "line 2: the id 1 is used twice"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_stops_the_run_or_is_left_out(root: Path, case: str) -> None:
    line, problem = BAD_LINES[case]
    write(root / "train.jsonl", [LINES[0], line, LINES[2]])
    with pytest.raises(InputError) as caught:
        jsonl.read(root, "train")
    sentence = str(caught.value)
    assert sentence.startswith(f"{root}/train.jsonl, line 2: ") and problem in sentence and "\n" not in sentence
    assert "data.on_bad_record=skip" in sentence
    bad_records = BadRecords("skip")
    assert ids(jsonl.read(root, "train", bad_records=bad_records)) == [1, 77]
    assert len(bad_records.seen) == 1


def test_lines_are_counted_where_ids_and_empty_lines_are_others(root: Path) -> None:
    lines = [LINES[0], {**LINES[1], "image": "images/x.jpg"}, {**LINES[2], "answers": []}]
    (root / "train.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    bad_records = BadRecords("skip")
    assert ids(jsonl.read(root, "train", bad_records=bad_records)) == [1]
    assert [said.partition(":")[0] for said in bad_records.seen] == [f"{root}/train.jsonl, line {n}" for n in (5, 3)]


LLAVA = {"id": "1", "image": "images/a.png", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}]}


@pytest.mark.parametrize("policy", ["error", "skip"])
@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "indented.json"])
def test_llavas_format_is_recognised(tmp_path: Path, name: str, policy: str) -> None:
    """As lines, as a list, as a list over several lines; named as a file or found in its folder."""
    lines, path = name.endswith("jsonl"), tmp_path / name
    path.write_text(json.dumps(LLAVA if lines else [LLAVA], indent=2 if name == "indented.json" else None))
    place = f"{path}, line 1" if lines else str(path)
    said = (
        f"{place} is in LLaVA's format ('conversations'), which data=conversations reads; write a file of JSON lines, "
    )
    for root, split in ((tmp_path, "train"), (path, "all")):
        with pytest.raises(InputError) as caught:
            jsonl.read(root, split, bad_records=BadRecords(policy))
        assert str(caught.value) == f"{said}a line for each question: {jsonl.LINE}"


def test_the_line_that_errors_show_can_be_read(root: Path) -> None:
    (root / "images" / "1.jpg").touch()
    (root / "train.jsonl").write_text(jsonl.LINE)
    assert ids(jsonl.read(root, "train")) == [1]


def test_a_list_is_not_lines(root: Path) -> None:
    (root / "train.jsonl").write_text(json.dumps(LINES, indent=1))
    with pytest.raises(InputError, match=r"train.jsonl is a JSON list; write a file of JSON lines"):
        jsonl.read(root, "train")


def test_a_broken_line_is_located_by_line_and_column(root: Path) -> None:
    with (root / "train.jsonl").open("ab") as file:
        file.write(b'{"image": "images/a.png",}\n\xff\n')
    with pytest.raises(InputError, match=r"train.jsonl, line 4, column 2\d: broken JSON \(.*\); fix it, or set"):
        jsonl.read(root, "train")
    bad_records = BadRecords("skip")
    assert len(ids(jsonl.read(root, "train", bad_records=bad_records))) == 3
    assert "line 5: byte 0 is not UTF-8 text" in bad_records.seen[1]


# --- the results file -----------------------------------------------------------------------------------


def test_the_results_file_is_lines_too(tmp_path: Path) -> None:
    jsonl.write_submission(tmp_path / "answers.jsonl", {1: "Bär\n", "mine": ""})
    lines = (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"id": 1, "answer": "Bär\n"}, {"id": "mine", "answer": ""}]
