"""Bad, unusual and unanswered data: one sentence that names the record and exit status 1, or success."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.end_to_end.scripts import (
    MODEL,
    SMALL,
    TRAIN_ANNOTATIONS,
    TRAIN_IMAGE,
    TRAIN_QUESTIONS,
    VAL_IMAGE,
    VAL_QUESTIONS,
    call,
    change,
    content,
    done,
    launch,
    metrics,
    predictions,
    sentence,
    truncate,
)
from vlmvqa.extras.synthetic import vqav2 as synthetic_vqav2

# --- VQAv2's files ------------------------------------------------------------------------------------


def edit_question(**changes: Any) -> Callable[[Path], None]:
    """Change the first question of image 3."""

    def edit(parsed: Any) -> None:
        next(record for record in parsed["questions"] if record["question_id"] == 3000).update(changes)

    return lambda root: change(root / TRAIN_QUESTIONS, edit)


def edit_annotation(**changes: Any) -> Callable[[Path], None]:
    def edit(parsed: Any) -> None:
        next(record for record in parsed["annotations"] if record["question_id"] == 3000).update(changes)

    return lambda root: change(root / TRAIN_ANNOTATIONS, edit)


def drop(name: str, key: str) -> Callable[[Path], None]:
    def edit(parsed: Any) -> None:
        parsed[key] = [record for record in parsed[key] if record["question_id"] != 3000]

    return lambda root: change(root / name, edit)


# what is wrong: (damage to the files, parts of the sentence)
DAMAGE: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "missing image": (
        lambda root: (root / TRAIN_IMAGE).unlink(),
        (f"{TRAIN_QUESTIONS}, question 3000", f"{TRAIN_IMAGE} is missing (1 of the 6 images are)"),
    ),
    "not an image": (
        lambda root: (root / TRAIN_IMAGE).write_text("<html>404 Not Found</html>"),
        (f"{TRAIN_IMAGE} is not an image",),
    ),
    "empty image": (lambda root: (root / TRAIN_IMAGE).write_bytes(b""), (f"{TRAIN_IMAGE} is empty",)),
    "no annotations file": (
        lambda root: (root / TRAIN_ANNOTATIONS).unlink(),
        (f"has no {TRAIN_ANNOTATIONS}; VQAv2 expects {TRAIN_QUESTIONS}",),
    ),
    "question without annotation": (
        drop(TRAIN_ANNOTATIONS, "annotations"),
        (f"{TRAIN_QUESTIONS}, question 3000: {TRAIN_ANNOTATIONS} has no annotation for it",),
    ),
    "annotation without question": (
        drop(TRAIN_QUESTIONS, "questions"),
        (f"{TRAIN_ANNOTATIONS}, question 3000: {TRAIN_QUESTIONS} has no such question",),
    ),
    "no answers": (edit_annotation(answers=[]), (f"{TRAIN_ANNOTATIONS}, question 3000: its list of answers is empty",)),
    "empty answer": (
        edit_annotation(multiple_choice_answer=""),
        (f"{TRAIN_ANNOTATIONS}, question 3000: its multiple_choice_answer is empty",),
    ),
    "empty question": (edit_question(question=" "), (f"{TRAIN_QUESTIONS}, question 3000: the question is empty",)),
    "id used twice": (
        lambda root: change(
            root / TRAIN_QUESTIONS, lambda parsed: parsed["questions"].append({**parsed["questions"][0]})
        ),
        (TRAIN_QUESTIONS, "question 1000: its question_id is used twice"),
    ),
    "broken JSON": (lambda root: truncate(root / TRAIN_QUESTIONS), (TRAIN_QUESTIONS, "line 1, column", "broken JSON")),
    "no folder": (lambda root: root.rename(root.with_name("moved")), ("/vqav2 does not exist", "data.root")),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_data_stops_training_with_one_sentence(tmp_path: Path, root: Path, case: str) -> None:
    damage, named = DAMAGE[case]
    damage(root)
    ended = call("train", "data=vqav2", f"data.root={root}", f"run.dir={tmp_path / 'run'}", *SMALL)
    assert all(part in sentence(ended) for part in named), sentence(ended)
    assert str(root) in sentence(ended)
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_truncated_jpeg_met_in_the_dataloader_is_named(tmp_path: Path, root: Path, split: str, workers: int) -> None:
    image = root / (TRAIN_IMAGE if split == "train" else VAL_IMAGE)
    truncate(image)
    changed = (*SMALL, f"trainer.dataloader_num_workers={workers}")
    # One case in a process of its own, with the progress bar, as for a user.
    start = launch if (split, workers) == ("train", 1) else call
    ended = start("train", "data=vqav2", f"data.root={root}", f"run.dir={tmp_path / 'run'}", *changed)
    assert sentence(ended).startswith(f"error: {image} cannot be read (")
    assert "data.on_bad_record=skip" in sentence(ended)


def test_evaluation_names_the_truncated_jpeg(tmp_path: Path, root: Path, trained: Path) -> None:
    truncate(root / VAL_IMAGE)
    for workers in (0, 1):
        asked = ("data=vqav2", f"data.root={root}", f"workers={workers}", f"run.dir={tmp_path / 'eval'}")
        ended = call("eval", f"checkpoint={trained}", *asked)
        assert sentence(ended).startswith(f"error: {root / VAL_IMAGE} cannot be read (")
    assert not (tmp_path / "eval" / "metrics.json").exists()


def test_show_and_predict_name_the_image(tmp_path: Path, root: Path, trained: Path) -> None:
    (root / TRAIN_IMAGE).unlink()
    folder = f"run.dir={tmp_path / 'out'}"
    ended = call("show", "data=vqav2", f"data.root={root}", folder, *MODEL)
    assert f"{TRAIN_IMAGE} is missing" in sentence(ended) and "question 3000" in sentence(ended)
    page = tmp_path / "page.jpg"
    page.write_text("<html>404 Not Found</html>")
    ended = launch("predict", f"checkpoint={trained}", f"image={page}", "question=What is it?", folder)
    assert sentence(ended).startswith(f"error: {page} is not an image") and str(page) not in ended.out
    for image, problem in ((tmp_path / "none.jpg", "does not exist"), (tmp_path / "vqav2", "holds no image files")):
        ended = call("predict", f"checkpoint={trained}", f"image={image}", "question=What is it?", folder)
        assert f"{image} {problem}" in sentence(ended)


def test_a_failed_predict_keeps_the_previous_answers(tmp_path: Path, trained: Path, root: Path) -> None:
    asked = ("question=What is it?", f"run.dir={tmp_path / 'out'}", f"checkpoint={trained}")
    done(call("predict", f"image={root / TRAIN_IMAGE}", *asked))
    before = content(tmp_path / "out")
    assert list(before) == ["predictions.jsonl"]
    sentence(call("predict", f"image={root / TRAIN_IMAGE}", f"image={tmp_path / 'none.jpg'}", *asked))
    assert content(tmp_path / "out")["predictions.jsonl"] == before["predictions.jsonl"]


def test_a_data_root_must_be_given(tmp_path: Path, trained: Path) -> None:
    for script, asked in (("train", SMALL), ("show", MODEL), ("eval", (f"checkpoint={trained}",))):
        ended = call(script, "data=vqav2", f"run.dir={tmp_path / 'run'}", *asked)
        assert sentence(ended) == "error: data.root must be given; add data.root=... to the command"
    assert not (tmp_path / "run").exists()


def test_data_must_be_chosen_to_evaluate(tmp_path: Path, trained: Path) -> None:
    ended = call("eval", f"checkpoint={trained}", f"run.dir={tmp_path / 'run'}")
    assert "data" in sentence(ended) and "shapes" in sentence(ended) and "vqav2" in sentence(ended)


# --- unusual, but valid ---------------------------------------------------------------------------------


def odd_images() -> dict[str, bytes]:
    """Unusual image files that occur in collections of photographs, all named .jpg."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    wide = Image.new("RGB", (20_000, 30), "red")
    return {
        "grayscale": _encoded(noise.convert("L"), "JPEG"),
        "palette": _encoded(noise.convert("P"), "PNG"),
        "CMYK": _encoded(noise.convert("CMYK"), "JPEG"),
        "RGBA": _encoded(noise.convert("RGBA"), "PNG"),
        "EXIF": _encoded(noise, "JPEG", exif=turned),
        "1x1": _encoded(noise.crop((0, 0, 1, 1)), "JPEG"),
        "wide": _encoded(wide, "JPEG"),
    }


def _encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_odd_images_long_questions_and_other_scripts_are_trained_and_scored(tmp_path: Path) -> None:
    root = synthetic_vqav2.write(tmp_path / "vqav2", train_images=8, val_images=7, questions_per_image=2)
    texts = ["word " * 5000 + "?", "Какого цвета 猫? 🐈"]
    for split in ("train2014", "val2014"):
        for path, image in zip(sorted((root / split).iterdir()), odd_images().values(), strict=False):
            path.write_bytes(image)

        def ask(parsed: Any) -> None:
            for record, text in zip(parsed["questions"], texts, strict=False):
                record["question"] = text

        change(root / f"v2_OpenEnded_mscoco_{split}_questions.json", ask)
        answered = {"multiple_choice_answer": "zażółć", "answers": [{"answer": "zażółć"}] * 10}
        change(
            root / f"v2_mscoco_{split}_annotations.json",
            lambda parsed, answered=answered: parsed["annotations"][1].update(answered),
        )
    data = ("data=vqav2", f"data.root={root}")
    done(call("train", *data, f"run.dir={tmp_path / 'run'}", *SMALL))
    done(call("eval", *data, f"run.dir={tmp_path / 'eval'}", f"checkpoint={tmp_path / 'run'}"))
    asked = json.loads((root / VAL_QUESTIONS).read_text(encoding="utf-8"))["questions"]
    for folder in (tmp_path / "run", tmp_path / "eval"):
        assert metrics(folder)["n"] == len(asked) and metrics(folder)["skipped"] == []
        assert metrics(folder)["metrics"]["vqa_accuracy"]["overall"] is not None
        assert [record["question"] for record in predictions(folder)][:2] == texts
        assert predictions(folder)[1]["target"] == "zażółć"


def test_bad_records_are_left_out_counted_and_listed(tmp_path: Path, root: Path) -> None:
    for image in (TRAIN_IMAGE, VAL_IMAGE):
        truncate(root / image)
    skip = ("data=vqav2", f"data.root={root}", "data.on_bad_record=skip")
    folder = tmp_path / "run"
    ended = done(call("train", *skip, f"run.dir={folder}", *SMALL, "trainer.dataloader_num_workers=1"))
    assert f"left out 2 bad records, listed in {folder / 'skipped.jsonl'}" in ended.out
    listed = {json.loads(line)["record"] for line in (folder / "skipped.jsonl").read_text().splitlines()}
    assert sorted(record.split(" cannot be read")[0] for record in listed) == [
        str(root / TRAIN_IMAGE),
        str(root / VAL_IMAGE),
    ]
    assert sorted(metrics(folder)["skipped"]) == sorted(listed)
    asked = json.loads((root / VAL_QUESTIONS).read_text())["questions"]
    scored = [record["question_id"] for record in asked if record["image_id"] != 1_000_002]
    assert 0 < metrics(folder)["n"] == len(scored) < len(asked)
    assert [record["question_id"] for record in predictions(folder)] == scored
    assert metrics(folder)["metrics"]["vqa_accuracy"]["overall"] is not None


def test_repaired_data_are_no_longer_listed_as_skipped(tmp_path: Path, root: Path, whole: Path, trained: Path) -> None:
    truncate(root / VAL_IMAGE)
    asked = (
        f"checkpoint={trained}",
        "data=vqav2",
        f"data.root={root}",
        "data.on_bad_record=skip",
        "run.overwrite=true",
    )
    ended = done(call("eval", *asked, f"run.dir={tmp_path / 'eval'}"))
    assert "left out 1 bad records" in ended.out
    shutil.copy(whole / VAL_IMAGE, root / VAL_IMAGE)
    ended = done(call("eval", *asked, f"run.dir={tmp_path / 'eval'}"))
    assert "left out" not in ended.out
    assert metrics(tmp_path / "eval")["skipped"] == []


# --- a split without answers --------------------------------------------------------------------------


@pytest.fixture
def with_test(root: Path) -> Path:
    """The dataset with a test split: the questions of val without answers."""
    (root / "test2015").mkdir()
    for path in (root / "val2014").iterdir():
        shutil.copy(path, root / "test2015" / path.name.replace("val2014", "test2015"))
    shutil.copy(root / VAL_QUESTIONS, root / "v2_OpenEnded_mscoco_test2015_questions.json")
    return root


def test_a_split_without_answers_gives_answers_and_no_score(tmp_path: Path, with_test: Path, trained: Path) -> None:
    folder = tmp_path / "eval"
    asked = ("data=vqav2", f"data.root={with_test}", "split=test", f"run.dir={folder}")
    ended = done(call("eval", f"checkpoint={trained}", *asked))
    ids = [record["question_id"] for record in json.loads((with_test / VAL_QUESTIONS).read_text())["questions"]]
    assert [record["question_id"] for record in predictions(folder)] == ids
    submission = json.loads((folder / "submission.json").read_text())
    assert [record["question_id"] for record in submission] == ids
    assert all(set(record) == {"question_id", "answer"} for record in submission)
    for result in (metrics(folder)["metrics"]["vqa_accuracy"], *metrics(folder)["controls"].values()):
        assert result["overall"] is None and "no answers" in result["reason"]
    assert metrics(folder)["n"] == len(ids)
    assert "no answers" in ended.out and " 0.00" not in ended.out


def test_a_split_without_answers_can_be_evaluated_in_training_but_not_trained_on(
    tmp_path: Path, with_test: Path
) -> None:
    data = ("data=vqav2", f"data.root={with_test}", *SMALL, "trainer.eval_strategy=steps", "trainer.eval_steps=1")
    done(call("train", *data, "data.eval_split=test", f"run.dir={tmp_path / 'run'}"))
    assert metrics(tmp_path / "run")["metrics"]["vqa_accuracy"]["overall"] is None
    ended = call("train", *data, "data.train_split=test", f"run.dir={tmp_path / 'refused'}")
    assert "data.train_split" in sentence(ended) and "no answers" in sentence(ended)
