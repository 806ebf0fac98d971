"""What a user can get wrong, from the command line: one sentence that names it, exit status 1, nothing lost.

`launch` runs a script as a user does; most cases `call` its job in this process, which saves seconds of imports.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import eval as eval_script
import numpy as np
import predict as predict_script
import pytest
import show as show_script
import torch
import train as train_script
from PIL import Image
from safetensors.torch import load_file

import command_line
from tests.conftest import ROOT
from vlmvqa.data import shapes
from vlmvqa.training.checkpoints import whole_checkpoints
from vlmvqa.training.log import read_log

JOBS: dict[str, Callable[[], None]] = {
    "train": lambda: command_line.run(train_script.main, "train"),
    "eval": lambda: command_line.run(eval_script.main, "eval"),
    "predict": lambda: command_line.run(predict_script.main, "predict", repeatable=("image", "question")),
    "show": lambda: command_line.run(show_script.main, "show"),
}
MODEL = (
    "model.vision.overrides.depth=1",
    "model.vision.overrides.embed_dim=32",
    "model.vision.overrides.num_heads=2",
    "model.language.overrides.num_hidden_layers=1",
    "model.language.overrides.hidden_size=32",
    "model.language.overrides.intermediate_size=32",
)
SMALL = (
    *MODEL,
    "trainer.max_steps=2",
    "trainer.per_device_train_batch_size=4",
    "trainer.logging_steps=1",
    "trainer.report_to=none",
    "trainer.use_cpu=true",
    "trainer.eval_strategy=no",
)
TRAIN_QUESTIONS = "v2_OpenEnded_mscoco_train2014_questions.json"
TRAIN_ANNOTATIONS = "v2_mscoco_train2014_annotations.json"
VAL_QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
TRAIN_IMAGE = "train2014/COCO_train2014_000000000003.jpg"  # question 3000 is about it
VAL_IMAGE = "val2014/COCO_val2014_000001000002.jpg"


@dataclass(frozen=True)
class Ended:
    """How a script ended: exit status and what it printed."""

    status: int
    out: str
    err: str


def launch(script: str, *arguments: str, before: tuple[str, ...] = ()) -> Ended:
    """The script as a user starts it."""
    command = [*before, sys.executable, str(ROOT / "launch" / f"{script}.py"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return Ended(done.returncode, done.stdout, done.stderr)


def call(script: str, *arguments: str) -> Ended:
    """The script's job in this process; a SystemExit ends as it ends a script."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [f"{script}.py", *arguments])
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        try:
            JOBS[script]()
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
            print(stop.code, file=sys.stderr)
    return Ended(status, out.getvalue(), err.getvalue())


def sentence(ended: Ended) -> str:
    """The one sentence that a refused run ends with."""
    assert ended.status == 1, ended.err[-2000:]
    assert "Traceback" not in ended.err + ended.out, ended.err[-3000:]
    lines = ended.err.splitlines()  # also at each \r of a progress bar: the sentence must not stick to one
    assert [line for line in lines if "error: " in line] == lines[-1:], ended.err[-2000:]
    assert lines[-1].startswith("error: "), lines[-1]
    return lines[-1]


def done(ended: Ended) -> Ended:
    assert ended.status == 0, ended.err[-3000:]
    return ended


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a folder: when it was changed, and its bytes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def change(path: Path, edit: Callable[[Any], Any]) -> None:
    """Edit a JSON file's content in place."""
    parsed = json.loads(path.read_text(encoding="utf-8"))
    edit(parsed)
    path.write_text(json.dumps(parsed, ensure_ascii=False), encoding="utf-8")


def truncate(path: Path, share: float = 0.6) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])


def metrics(folder: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return parsed


def predictions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set in VQAv2's files; nothing is wrong with it."""
    root = tmp_path_factory.mktemp("whole") / "vqav2"
    return shapes.write(root, train_images=6, val_images=4, questions_per_image=2)


@pytest.fixture
def root(tmp_path: Path, whole: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "vqav2"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, whole: Path) -> Path:
    """The folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    done(call("train", "data=vqav2", f"data.root={whole}", f"run.dir={folder}", *SMALL))
    return folder


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


# what is wrong: (how it comes about, what the sentence must name)
DAMAGE: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "missing image": (
        lambda root: (root / TRAIN_IMAGE).unlink(),
        (f"{TRAIN_QUESTIONS}, question 3000", f"{TRAIN_IMAGE} is missing (1 of the 6 images are)"),
    ),
    "not an image": (
        lambda root: (root / TRAIN_IMAGE).write_text("<html>404 Not Found</html>"),
        (f"{TRAIN_IMAGE} is not a picture",),
    ),
    "empty image": (lambda root: (root / TRAIN_IMAGE).write_bytes(b""), (f"{TRAIN_IMAGE} is empty",)),
    "no annotations file": (
        lambda root: (root / TRAIN_ANNOTATIONS).unlink(),
        (f"has no {TRAIN_ANNOTATIONS}; VQAv2 expects {TRAIN_QUESTIONS}",),
    ),
    "question without annotation": (
        drop(TRAIN_ANNOTATIONS, "annotations"),
        (f"{TRAIN_QUESTIONS}, question 3000: {TRAIN_ANNOTATIONS} does not answer it",),
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
    picture = root / (TRAIN_IMAGE if split == "train" else VAL_IMAGE)
    truncate(picture)
    changed = (*SMALL, f"trainer.dataloader_num_workers={workers}")
    # In one of the cases as a user meets it, with the progress bar.
    start = launch if (split, workers) == ("train", 1) else call
    ended = start("train", "data=vqav2", f"data.root={root}", f"run.dir={tmp_path / 'run'}", *changed)
    assert sentence(ended).startswith(f"error: {picture} cannot be read (")
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
    assert sentence(ended).startswith(f"error: {page} is not a picture")
    for image, problem in ((tmp_path / "none.jpg", "does not exist"), (tmp_path / "vqav2", "holds no image files")):
        ended = call("predict", f"checkpoint={trained}", f"image={image}", "question=What is it?", folder)
        assert f"{image} {problem}" in sentence(ended)


def test_predict_keeps_the_answers_of_before_when_it_is_refused(tmp_path: Path, trained: Path, root: Path) -> None:
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


# --- odd, but good ------------------------------------------------------------------------------------


def odd_pictures() -> dict[str, bytes]:
    """Bytes of pictures as they are met among photographs; the data set names them all .jpg."""
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


def test_odd_pictures_long_questions_and_other_scripts_are_trained_and_scored(tmp_path: Path) -> None:
    root = shapes.write(tmp_path / "vqav2", train_images=8, val_images=7, questions_per_image=2)
    texts = ["word " * 5000 + "?", "Какого цвета 猫? 🐈"]
    for split in ("train2014", "val2014"):
        for path, picture in zip(sorted((root / split).iterdir()), odd_pictures().values(), strict=False):
            path.write_bytes(picture)

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
    for picture in (TRAIN_IMAGE, VAL_IMAGE):
        truncate(root / picture)
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


def test_mended_data_are_no_longer_said_to_be_left_out(tmp_path: Path, root: Path, whole: Path, trained: Path) -> None:
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
    """The data set with a test split: the questions of val, which nobody answered."""
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


# --- checkpoints and run folders ----------------------------------------------------------------------


def test_a_wrong_checkpoint_is_named(tmp_path: Path, whole: Path, trained: Path) -> None:
    (tmp_path / "empty").mkdir()
    cut, broken = tmp_path / "cut", tmp_path / "broken"
    for copied in (cut, broken):
        shutil.copytree(trained / "model", copied)
    truncate(cut / "model.safetensors")
    truncate(broken / "config.json")
    wrong = {
        str(tmp_path / "nowhere"): "no such folder",
        str(tmp_path / "empty"): "is not a saved model",
        "runs/nowhere": "neither a folder here nor readable from the hub",
        "runs/my first run": "my first run",
        str(cut): str(cut / "model.safetensors"),
        str(broken): str(broken / "config.json"),
    }
    evaluated = ("data=vqav2", f"data.root={whole}", f"run.dir={tmp_path / 'run'}")
    asked = (f"image={whole / TRAIN_IMAGE}", "question=What is it?", f"run.dir={tmp_path / 'run'}")
    for checkpoint, problem in wrong.items():
        for script, rest in (("eval", evaluated), ("predict", asked)):
            said = sentence(call(script, f"checkpoint={checkpoint}", *rest))
            assert said.startswith(f"error: {checkpoint}") and problem in said
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_not_touched(tmp_path: Path, whole: Path, trained: Path) -> None:
    before = content(trained)
    data = ("data=vqav2", f"data.root={whole}", f"run.dir={trained}")
    for script, rest in (("train", SMALL), ("eval", (f"checkpoint={trained}",))):
        said = sentence(call(script, *data, *rest))
        assert str(trained) in said and "already holds" in said and "run.overwrite=true" in said
    assert content(trained) == before


@pytest.mark.parametrize("how", ["run.overwrite=true", "resume=auto"])
@pytest.mark.parametrize(
    "wrong",
    [
        "data.root=/nowhere",
        "data.prompt=what",
        "model.mode=prefixlm",
        "model.vision.name=vit_bas_patch14_dinov2",
        "trainable.vision=7",
        "trainer.optim=adam",
        "data.on_bad_record=skipp",
    ],
)
def test_a_run_outlives_a_mistake_in_the_command_that_was_to_replace_it(
    tmp_path: Path, whole: Path, trained: Path, how: str, wrong: str
) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    before = content(folder)
    sentence(call("train", "data=vqav2", f"data.root={whole}", f"run.dir={folder}", *SMALL, how, wrong))
    assert content(folder) == before


# --- the command line ---------------------------------------------------------------------------------


PROMPT_RULE = "must hold {question} once, and no other braces"
# what is given: what the sentence must say
MISSPELT: dict[str, tuple[str, ...]] = {
    "trainer.learning_rte=1": ("no key 'trainer.learning_rte'; did you mean 'trainer.learning_rate'?",),
    "trainer.adam_beta=0.9": ("no key 'trainer.adam_beta'; did you mean 'trainer.adam_beta",),
    "data.rooot=x": ("no key 'data.rooot'; did you mean 'data.root'?",),
    "model=tinny": ("model=tinny: there is no conf/model/tinny.yaml; did you mean 'tiny'?",),
    "data=vqav": ("data=vqav: there is no conf/data/vqav.yaml; did you mean 'vqav2'?",),
    "modle=tiny": ("no key 'modle'; did you mean 'model'?",),
    "+foo=1": ("no key 'foo'",),
    "+trainer.foo=1": ("no key 'trainer.foo'",),
    "model.mode=prefixlm": ("model.mode=prefixlm is unknown", "did you mean 'prefix_lm'?"),
    "model.vision.overrides.depht=3": ("model.vision.overrides", "'depht'", "did you mean 'depth'?"),
    "model.language.overrides.hiden_size=3": (
        "model.language.overrides",
        "'hiden_size'",
        "did you mean 'hidden_size'?",
    ),
    "trainer.optim=adamw_tork": ("trainer", "adamw_tork"),
    "trainer.max_steps=many": ("max_steps", "many"),
    "data.on_bad_record=skipp": ("data.on_bad_record=skipp is unknown; use one of error, skip",),
    "data.train_split=trian": ("'trian'", "did you mean 'train'?"),
    "trainable.vision=most": ("trainable.vision=most is unknown",),
    "resume=yes": ("resume=", "is unknown; use resume=auto"),
    "data.prompt={question} in {language}": ("data.prompt='{question} in {language}'", PROMPT_RULE),
    "data.prompt={question} {question}": ("data.prompt='{question} {question}'", PROMPT_RULE),
}


@pytest.mark.parametrize("wrong", MISSPELT)
def test_a_misspelt_key_or_choice_is_refused_with_the_nearest_right_one(
    tmp_path: Path, whole: Path, wrong: str
) -> None:
    folder = tmp_path / "run"
    ended = call("train", "data=vqav2", f"data.root={whole}", f"run.dir={folder}", *SMALL, wrong)
    assert all(part in sentence(ended) for part in MISSPELT[wrong]), sentence(ended)
    assert not (folder / "log.jsonl").exists()  # so the right command may follow in the same folder


def test_a_misspelt_key_costs_one_line_and_nothing_else(tmp_path: Path) -> None:
    ended = call("train", "trainer.learning_rte=1", f"run.dir={tmp_path / 'run'}")
    assert ended.err == "error: there is no key 'trainer.learning_rte'; did you mean 'trainer.learning_rate'?\n"
    assert ended.out == "" and not (tmp_path / "run").exists()


def test_how_activations_are_recomputed_is_not_to_be_set(tmp_path: Path, whole: Path) -> None:
    asked = ("trainer.activation_checkpointing=true", "trainer.activation_checkpointing_kwargs={use_reentrant: true}")
    ended = call("train", "data=vqav2", f"data.root={whole}", f"run.dir={tmp_path / 'run'}", *SMALL, *asked)
    assert sentence(ended) == (
        "error: trainer.activation_checkpointing_kwargs cannot be set: leave it out, they are recomputed one way"
    )
    assert not (tmp_path / "run" / "log.jsonl").exists()


# --- during training ----------------------------------------------------------------------------------


def test_a_loss_that_is_not_a_number_stops_training_at_the_last_good_checkpoint(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "run"
    changed = ("trainer.max_steps=8", "trainer.save_steps=1", "trainer.save_total_limit=8")
    data = ("data=vqav2", f"data.root={whole}", f"run.dir={folder}")
    ended = call("train", *data, *SMALL, *changed, "trainer.learning_rate=1e30")
    kept = whole_checkpoints(folder)
    said = sentence(ended)
    assert kept and f"the last good checkpoint is {kept[-1]};" in said
    assert "nan" in said or "inf" in said
    weights = load_file(kept[-1] / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    step = int(kept[-1].name.removeprefix("checkpoint-"))
    assert f"at step {step + 1}," in said
    assert [record["step"] for record in read_log(folder / "log.jsonl") if "loss" in record] == list(range(1, step + 1))


@pytest.mark.parametrize("full_at", ["model.safetensors", "optimizer.pt"])
def test_a_full_disk_costs_one_sentence_and_no_good_checkpoint(tmp_path: Path, whole: Path, full_at: str) -> None:
    """On a small tmpfs in a mount namespace of its own, which has room for one checkpoint and a part of the next."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    inside = f"mount -t tmpfs -o size=$SIZE none {disk} || exit 99"
    namespace = ("env", "SIZE=1m", "unshare", "-rm", "sh", "-c")
    try:
        probe = subprocess.run([*namespace, inside], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if probe.returncode:
        pytest.skip(f"unshare or its mount is refused here: {probe.stderr.strip()}")

    # So large that what a removed part of a checkpoint frees looks like a disk with room.
    changed = ("model.language.overrides.intermediate_size=8192", "trainer.save_steps=1", "trainer.max_steps=3")
    data = ("data=vqav2", f"data.root={whole}", *SMALL, *changed)
    done(call("train", *data, "trainer.max_steps=1", f"run.dir={tmp_path / 'measured'}"))
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "measured" / "checkpoint-1").iterdir()}
    room = sum(sizes.values()) + sizes["model.safetensors"] // 2
    if full_at == "optimizer.pt":
        room += sizes["model.safetensors"]

    script = f'{inside}; "$@"; status=$?; cp -r {disk}/run {kept}; exit $status'
    before = (*namespace[:1], f"SIZE={room}", *namespace[2:], script, "sh")
    said = sentence(launch("train", *data, f"run.dir={disk / 'run'}", before=before))
    assert "full" in said and f"{disk / 'run' / 'checkpoint-1'} is whole" in said and "resume=auto" in said
    assert [path.name for path in kept.glob("*checkpoint*")] == ["checkpoint-1"]
    assert [path.name for path in whole_checkpoints(kept)] == ["checkpoint-1"]
    assert sorted(path.name for path in (kept / "checkpoint-1").iterdir()) == sorted(sizes)
