"""Synthetic VQAv2 data: answerable from the images, not from the questions alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmvqa.data.datasets import vqav2
from vlmvqa.data.example import Example, Question, count_questions
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.extras.synthetic import scene as scenes
from vlmvqa.extras.synthetic import vqav2 as synthetic_vqav2
from vlmvqa.metrics.vqa import vqa_accuracy


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    return synthetic_vqav2.write(folder, train_images=800, val_images=400)


@pytest.fixture(scope="module")
def train(root: Path) -> list[Example]:
    return vqav2.read(root, "train")


@pytest.fixture(scope="module")
def val(root: Path) -> list[Example]:
    return vqav2.read(root, "val")


def questions(examples: list[Example]) -> list[Question]:
    return [question for example in examples for question in example.questions]


def best_constant(examples: list[Example], key: Callable[[Question], Hashable]) -> float:
    """Return the share of questions answered correctly by the most frequent answer of each group."""
    groups: defaultdict[Hashable, Counter[str | None]] = defaultdict(Counter)
    for question in questions(examples):
        groups[key(question)][question.target] += 1
    return sum(max(group.values()) for group in groups.values()) / len(questions(examples))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_vqav2_reader_reads_every_image_and_about_six_questions_each(
    train: list[Example], val: list[Example]
) -> None:
    assert (len(train), len(val)) == (800, 400)
    counts = {len(example.questions) for example in train}
    assert min(counts) >= 4 and len(counts) >= 3
    assert 5.5 < len(questions(train)) / 800 < 6.5
    assert {question.answer_type for question in questions(val)} == {"yes/no", "number", "other"}
    assert all(q.text.lower().startswith(q.question_type or "?") for q in questions(val))


def test_answering_from_the_question_type_alone_scores_under_40_percent(val: list[Example]) -> None:
    assert best_constant(val, lambda question: question.question_type) < 0.40


def test_answering_from_the_question_text_alone_scores_under_45_percent(
    train: list[Example], val: list[Example]
) -> None:
    assert best_constant(val, lambda question: question.text) < 0.45
    frequent: defaultdict[str, Counter[str | None]] = defaultdict(Counter)
    for question in questions(train):
        frequent[question.text][question.target] += 1
    learned = [frequent[q.text].most_common(1)[0][0] == q.target for q in questions(val) if q.text in frequent]
    assert len(learned) > 0.99 * len(questions(val))
    assert sum(learned) / len(learned) < 0.45


def test_yes_is_as_frequent_as_no_and_each_count_as_any_other(train: list[Example]) -> None:
    yes_no = Counter(q.target for q in questions(train) if q.answer_type == "yes/no")
    assert 0.47 < yes_no["yes"] / yes_no.total() < 0.53
    counts = Counter(q.target for q in questions(train) if q.answer_type == "number")
    assert set(counts) == {"0", "1", "2", "3", "4"}
    assert all(0.14 < count / counts.total() < 0.26 for count in counts.values())


def test_the_majority_is_right_and_a_perfect_model_scores_100(val: list[Example]) -> None:
    asked = questions(val)
    predictions = {question.id: question.target or "" for question in asked}
    assert vqa_accuracy(predictions, {question.id: question.answers for question in asked}).overall == 100.0
    agreement = Counter(question.answers.count(question.target or "") for question in asked)
    assert set(agreement) == {7, 8, 9, 10}
    assert 0.25 < 1 - agreement[10] / agreement.total() < 0.35


def test_answers_about_presence_and_number_agree_with_the_scene() -> None:
    scene = [
        scenes.Shape("circle", "red", "large", 0.3, 0.2, 0.2),
        scenes.Shape("square", "blue", "small", 0.2, 0.8, 0.25),
        scenes.Shape("circle", "green", "small", 0.2, 0.7, 0.8),
    ]
    answers = {question.text: question.answer for question in scenes.scene_questions(scene)}
    expected = {
        "Is there a red circle?": "yes",
        "Is there a blue circle?": "no",
        "Are there more circles than squares?": "yes",
        "Are there more squares than circles?": "no",
        "Are there more triangles than squares?": "no",
        "What color is the square?": "blue",
        "What color is the large circle?": "red",
        "What shape is the blue object?": "square",
        "What size is the red object?": "large",
        "What size is the square?": "small",
        "What shape is the large object?": "circle",
        "How many circles are there?": "2",
        "How many yellow shapes are there?": "0",
        "Is there a green shape?": "yes",
        "Is there a star?": "no",
        "Where is the red shape?": "top left",
        "Where is the green shape?": "bottom right",
        "Is the red shape left of the blue shape?": "yes",
        "Is the blue shape left of the red shape?": "no",
        "Is the red shape above the green shape?": "yes",
        "What color is the leftmost shape?": "red",
        "What color is the lowest shape?": "green",
    }
    assert {text: answers.get(text) for text in expected} == expected
    # Two circles; blue and red at nearly the same height, blue and green at nearly the same x: ambiguous.
    ambiguous = ("What color is the circle?", "Where is the circle?", "What color is the highest shape?")
    for text in (*ambiguous, "Is the red shape above the blue shape?", "Is there a purple star?"):
        assert text not in answers


def test_a_scene_of_one_shape_has_questions_too() -> None:
    answers = {
        q.text: q.answer for q in scenes.scene_questions([scenes.Shape("star", "black", "small", 0.2, 0.7, 0.3)])
    }
    assert answers["Where is the star?"] == "top right" and answers["How many stars are there?"] == "1"
    assert "What color is the leftmost shape?" not in answers


def test_images_agree_with_the_answers(val: list[Example]) -> None:
    """Count the pixels of each colour and compare their position, independently of the generator's own record."""
    checked: Counter[str] = Counter()
    for example in val[:150]:
        assert isinstance(example.image, Path)
        with Image.open(example.image) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (48, 48))
            pixels = np.asarray(image).astype(int)
        near = {name: np.abs(pixels - color).max(axis=-1) < 40 for name, color in scenes.COLORS.items()}
        for question in example.questions:
            if question.question_type == "what color is the":
                assert near[question.target or ""].sum() > 15, question
                checked["color"] += 1
            for name, mask in near.items():
                if question.text == f"How many {name} shapes are there?":
                    assert (mask.sum() > 15) == (question.target != "0"), question
                    checked["count"] += 1
                if question.text == f"Where is the {name} shape?":
                    y, x = (indices.mean() for indices in np.nonzero(mask))
                    assert question.target == f"{'top' if y < 24 else 'bottom'} {'left' if x < 24 else 'right'}"
                    checked["where"] += 1
    assert min(checked["color"], checked["count"], checked["where"]) > 20


def test_no_two_images_are_alike_so_validation_images_are_new(root: Path) -> None:
    images = [path.read_bytes() for path in root.rglob("*.jpg")]
    assert len(images) == len(set(images)) == 1200
    folders = [{path.name[-16:] for path in (root / split).iterdir()} for split in ("train2014", "val2014")]
    assert not folders[0] & folders[1]


@pytest.mark.slow
def test_a_seed_gives_the_same_bytes_in_another_process_and_another_seed_does_not(tmp_path: Path) -> None:
    synthetic_vqav2.write(tmp_path / "a", train_images=20, val_images=10, seed=3)
    synthetic_vqav2.write(tmp_path / "c", train_images=20, val_images=10, seed=4)
    code = (
        "import sys; from pathlib import Path; from vlmvqa.extras.synthetic import vqav2; "
        "vqav2.write(Path(sys.argv[1]), train_images=20, val_images=10, seed=3)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "b")], check=True, env=environment)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a") != files(tmp_path / "c")


def test_validation_does_not_depend_on_the_number_of_training_images(tmp_path: Path) -> None:
    few = synthetic_vqav2.write(tmp_path / "few", train_images=5, val_images=10)
    more = synthetic_vqav2.write(tmp_path / "more", train_images=9, val_images=10)
    assert files(few / "val2014") == files(more / "val2014")


def test_a_finished_dataset_is_reused_and_nothing_else_is_left(tmp_path: Path) -> None:
    folder = synthetic_vqav2.write(tmp_path / "shapes", train_images=4, val_images=3, image_size=48)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert synthetic_vqav2.write(folder, train_images=4, val_images=3, image_size=48) == folder
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]


def test_read_generates_the_dataset_on_first_use(tmp_path: Path) -> None:
    settings = {"train_images": 4, "val_images": 3}
    first, second = (
        synthetic_vqav2.read(
            tmp_path / "new", "val", prompt="{question}", max_samples=4, bad_records=BadRecords(), **settings
        )
        for _ in range(2)
    )
    assert first == second and count_questions(first) == 4
    assert first[0].questions[0].prompt == first[0].questions[0].text


def test_other_settings_are_refused_and_the_data_kept(tmp_path: Path) -> None:
    folder = synthetic_vqav2.write(tmp_path / "shapes", train_images=4, val_images=3)
    with pytest.raises(InputError, match=r"other settings \(train_images 4, now 5\); delete it, or choose another"):
        synthetic_vqav2.write(folder, train_images=5, val_images=3)
    assert len(vqav2.read(folder, "train")) == 4


def test_a_folder_with_other_files_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="is not a shapes dataset"):
        synthetic_vqav2.write(tmp_path, train_images=4, val_images=3)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_an_interrupted_run_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes, "save_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        synthetic_vqav2.write(tmp_path / "shapes", train_images=4, val_images=3)
    assert list(tmp_path.iterdir()) == []


# Generates the dataset, then waits for a line on stdin before it renames the folder.
GENERATE_AND_WAIT = """
import os, sys
from pathlib import Path
from vlmvqa.extras.synthetic import vqav2

def rename(*paths, now=os.rename):
    print("generated", flush=True)
    sys.stdin.readline()
    now(*paths)

os.rename = rename
vqav2.write(Path(sys.argv[1]), train_images=20, val_images=5, seed=int(sys.argv[2]))
"""


def write_at_once(folder: Path, *seeds: int) -> list[str]:
    """Return the last stderr line of processes that all generate the dataset before the first one renames it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", GENERATE_AND_WAIT, str(folder)]
    pipe = subprocess.PIPE
    started = [
        subprocess.Popen([*command, str(seed)], stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)
        for seed in seeds
    ]
    assert [process.stdout.readline() for process in started if process.stdout] == ["generated\n"] * len(seeds)
    return [process.communicate("continue\n")[1].strip().rpartition("\n")[2] for process in started]


@pytest.mark.slow
@pytest.mark.parametrize("empty_folder", [False, True])
def test_two_processes_that_generate_at_once_leave_one_dataset(tmp_path: Path, empty_folder: bool) -> None:
    folder = tmp_path / "shapes"
    if empty_folder:
        folder.mkdir()
    assert write_at_once(folder, 0, 0) == ["", ""]
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]
    alone = synthetic_vqav2.write(tmp_path / "alone", train_images=20, val_images=5)
    assert files(folder) == files(alone)


@pytest.mark.slow
def test_of_two_settings_generated_at_once_the_later_is_refused(tmp_path: Path) -> None:
    first, second = write_at_once(tmp_path / "shapes", 0, 1)
    assert first == "" and "was generated with other settings (seed 0, now 1)" in second
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]


@pytest.mark.parametrize(
    "setting", [{"train_images": 0}, {"val_images": 0}, {"image_size": 8}, {"questions_per_image": 0}]
)
def test_settings_below_their_minimum_are_named(tmp_path: Path, setting: dict[str, int]) -> None:
    (name, value), *_ = setting.items()
    with pytest.raises(InputError, match=f"{name} of at least .* not {value}"):
        synthetic_vqav2.write(tmp_path / "shapes", **{"train_images": 4, "val_images": 3, **setting})


def test_the_files_have_the_keys_of_vqav2s(root: Path) -> None:
    annotations = json.loads((root / "v2_mscoco_val2014_annotations.json").read_text())["annotations"]
    assert set(annotations[0]) == {
        "question_id",
        "image_id",
        "question_type",
        "answer_type",
        "multiple_choice_answer",
        "answers",
    }
    assert [answer["answer_id"] for answer in annotations[0]["answers"]] == list(range(1, 11))
    assert {answer["answer_confidence"] for record in annotations for answer in record["answers"]} == {"yes", "maybe"}
