"""VQAv2 from its official files, and its official results file.

    root/v2_OpenEnded_mscoco_train2014_questions.json    questions[{image_id, question, question_id}]
    root/v2_mscoco_train2014_annotations.json            annotations[{question_id, answers[...], ...}]
    root/train2014/COCO_train2014_000000000009.jpg       the image with image_id 9

The training split has 443,757 questions with ten answers each, so the reader keeps every repeated
string once and drops each answer record as soon as it is parsed.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from sys import intern
from typing import Any

from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.example import Example, Question
from vlmvqa.errors import InputError, suggest

# split: (name in the file names, folder of the images, has annotations)
SPLITS = {
    "train": ("train2014", "train2014", True),
    "val": ("val2014", "val2014", True),
    "test": ("test2015", "test2015", False),
    "test-dev": ("test-dev2015", "test2015", False),  # test-dev asks about a part of the test images
}
BOUND = r"-?\d+(?:_\d+)*|-?\d+(?:\.\d+)?%"
SPLIT = re.compile(rf"(?P<name>[^\[\]]*)(?:\[(?P<start>{BOUND})?:(?P<stop>{BOUND})?\])?")


def read(
    root: Path,
    split: str,
    *,
    prompt: str = "answer en {question}\n",
    max_samples: int | None = None,
    bad_records: BadRecords | None = None,
) -> list[Example]:
    """The questions of a split, grouped by image in order of first appearance.

    Args:
        split: `train`, `val`, `test` or `test-dev`, with an optional slice over the questions in file
            order: `train[:10%]`, `val[100:200]`, `train[10%:20%]`.
        prompt: what the model reads; `{question}` stands for the question.
        max_samples: take only the first so many questions of the slice.
        bad_records: what to do with a record that cannot be used; stop, unless it says otherwise.

    Raises:
        InputError: files are missing or cannot be read, or a record cannot be used.
    """
    name, selected = _parse_split(split)
    subset, folder, annotated = SPLITS[name]
    if "{question}" not in prompt:
        raise InputError(f"the prompt {prompt!r} has no {{question}}; put it where the question belongs.")
    if max_samples is not None and max_samples < 1:
        raise InputError(f"max_samples={max_samples} selects nothing; use 1 or more, or null for all questions.")
    bad_records = bad_records or BadRecords()
    files = _find(root, subset, folder, annotated)

    annotations = _annotations(files["annotations"], bad_records) if annotated else {}
    records = _load(files["questions"], "questions")
    chosen = range(len(records))[_bounds(selected, len(records), split, files["questions"])][:max_samples]
    ids = _check_ids(records, annotations, files, bad_records)
    questions = _questions(records, chosen, ids, annotations, files, prompt, bad_records)
    examples = _group(questions, files, folder, bad_records)
    if not examples:
        raise InputError(f"{files['questions']}: no usable question is left in {split}; see the bad records' listing.")
    return examples


def files(root: Path, split: str) -> list[Path]:
    """The files and the folder that a split is read from: while they stay, so does what `read` returns.

    Raises:
        InputError: one is missing.
    """
    name, _ = _parse_split(split)
    return list(_find(root, *SPLITS[name]).values())


def write_submission(path: Path, answers: Mapping[int | str, str]) -> None:
    """Write the official results file, `[{"question_id": 1, "answer": "yes"}, ...]`.

    The answers stay as the model gave them: the official evaluation normalises them itself. Ids that
    became text on their way (keys of a JSON object) become the numbers that it expects again.
    """
    results = [
        {"question_id": int(key) if isinstance(key, str) and key.isdecimal() else key, "answer": answer}
        for key, answer in answers.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        unfinished.write_text(json.dumps(results))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


# --- which questions ----------------------------------------------------------------------------------


def _parse_split(split: str) -> tuple[str, tuple[str | None, str | None]]:
    """`train[:10%]` as the split's name and the slice's two bounds."""
    match = SPLIT.fullmatch(split)
    name = split.partition("[")[0]
    if name not in SPLITS:
        raise InputError(f"VQAv2 has no split '{name}', only {', '.join(SPLITS)}{suggest(name, SPLITS) or '.'}")
    if match is None:
        raise InputError(f"the slice in '{split}' is malformed; write it like {name}[:10%] or {name}[100:200].")
    return name, (match["start"], match["stop"])


def _bounds(selected: tuple[str | None, str | None], total: int, split: str, path: Path) -> slice:
    """The slice in numbers of questions; percentages are rounded to the nearest, as `datasets` does."""
    numbers: list[int | None] = []
    for bound in selected:
        if bound is None:
            numbers.append(None)
            continue
        number = float(bound[:-1]) * total / 100 if bound.endswith("%") else int(bound)
        if abs(number) > total:
            raise InputError(f"{path}: '{split}' reaches beyond its {total} questions; choose a smaller slice.")
        numbers.append(round(number))
    found = slice(*numbers)
    if not range(total)[found]:
        raise InputError(f"{path}: '{split}' selects none of its {total} questions; choose a larger slice.")
    return found


# --- the files ----------------------------------------------------------------------------------------


def _find(root: Path, subset: str, folder: str, annotated: bool) -> dict[str, Path]:
    """Paths of a split's questions, annotations and images; all of them exist."""
    files = {"questions": root / f"v2_OpenEnded_mscoco_{subset}_questions.json"}
    if annotated:
        files["annotations"] = root / f"v2_mscoco_{subset}_annotations.json"
    files["images"] = root / folder
    missing = [path.name for path in files.values() if not path.exists()]
    if not root.is_dir():
        raise InputError(f"the VQAv2 folder {root} does not exist; put {_listed(files)} there, or set data.root.")
    if missing:
        raise InputError(
            f"{root} has no {' and no '.join(missing)}; VQAv2 expects {_listed(files)} in that folder "
            "(download and unpack them there, or set data.root)."
        )
    return files


def _listed(files: Mapping[str, Path]) -> str:
    names = [path.name for path in files.values()]
    return ", ".join(names[:-1]) + f" and the folder {names[-1]}/"


def _load(path: Path, key: str) -> list[Any]:
    """The list under `key` of one of the two JSON files."""
    try:
        with path.open(encoding="utf-8") as file:
            content = json.load(file, object_hook=_slim)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {error.lineno}, column {error.colno}: broken JSON ({error.msg}); download the file again."
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8 text; download the file again.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); mend the file or its permissions.") from None
    records = content.get(key) if isinstance(content, dict) else None
    if not isinstance(records, list):
        raise InputError(f"{path} holds no list '{key}'; is it VQAv2's official {key} file?")
    if not records:
        raise InputError(f"{path}: its list '{key}' is empty; download the file again.")
    return records


def _slim(record: dict[str, Any]) -> Any:
    """An annotator's record becomes its answer while parsing: kept, 4.4 million of them take 1.4 GB more."""
    answer = record.get("answer")
    return intern(answer) if isinstance(answer, str) else record


# --- the records --------------------------------------------------------------------------------------

WORDS = {int: "a whole number", str: "text", list: "a list"}
Annotation = tuple[str, tuple[str, ...], str, str]  # target, all answers, question type, answer type


def _annotations(path: Path, bad_records: BadRecords) -> dict[int, Annotation | None]:
    """Annotations by question id; None for one that was left out (so that its question goes silently too)."""
    found: dict[int, Annotation | None] = {}
    once: dict[tuple[str, ...], tuple[str, ...]] = {}
    for number, record in enumerate(_load(path, "annotations")):
        problem = _problem(record, {"question_id": int})
        if problem:
            bad_records.add(f"{path}, annotation number {number}", problem)
            continue
        key = record["question_id"]
        where = f"{path}, question {key}"
        if key in found:
            bad_records.add(where, "this question_id is annotated twice", "keep one of them")
            continue
        problem = _annotation_problem(record)
        if problem:
            bad_records.add(where, problem)
            found[key] = None
            continue
        answers = tuple(record["answers"])
        found[key] = (
            intern(record["multiple_choice_answer"]),
            once.setdefault(answers, answers),
            intern(record["question_type"]),
            intern(record["answer_type"]),
        )
    return found


def _annotation_problem(record: dict[str, Any]) -> str | None:
    kinds = {"multiple_choice_answer": str, "answers": list, "question_type": str, "answer_type": str}
    problem = _problem(record, kinds)
    if problem:
        return problem
    if not record["multiple_choice_answer"].strip():
        return "its multiple_choice_answer is empty"
    if not record["answers"]:
        return "its list of answers is empty"
    if not all(isinstance(answer, str) for answer in record["answers"]):
        return "one of its answers has no text in 'answer'"
    return None


def _problem(record: Any, kinds: Mapping[str, type]) -> str | None:
    """What is wrong with a record's structure."""
    if not isinstance(record, dict):
        return f"a JSON object was expected, not {json.dumps(record)[:40]}"
    for key, kind in kinds.items():
        if key not in record:
            return f"it has no '{key}'"
        # bool is a subclass of int, and true is no id
        if not isinstance(record[key], kind) or isinstance(record[key], bool):
            return f"its '{key}' should be {WORDS[kind]}, not {json.dumps(record[key])[:40]}"
    return None


def _check_ids(
    records: list[Any],
    annotations: Mapping[int, Annotation | None],
    files: Mapping[str, Path],
    bad_records: BadRecords,
) -> list[int | None]:
    """The id of each question, None where there is none or it is a repetition.

    Over the whole file, whatever the slice: two files that do not belong together must not go
    unnoticed because the first questions happen to fit.
    """
    path = files["questions"]
    ids: list[int | None] = []
    seen: set[int] = set()
    for number, record in enumerate(records):
        ids.append(None)
        problem = _problem(record, {"question_id": int})
        if problem:
            bad_records.add(f"{path}, question number {number}", problem)
        elif record["question_id"] in seen:
            where = f"{path}, question {record['question_id']}"
            bad_records.add(where, "its question_id is used twice", "keep one of them")
        else:
            ids[-1] = record["question_id"]
            seen.add(record["question_id"])
    for key in annotations:
        if key not in seen:
            where = f"{files['annotations']}, question {key}"
            bad_records.add(where, f"{path.name} has no such question", "use two files of the same split and version")
    return ids


def _questions(
    records: list[Any],
    chosen: range,
    ids: list[int | None],
    annotations: Mapping[int, Annotation | None],
    files: Mapping[str, Path],
    prompt: str,
    bad_records: BadRecords,
) -> Iterator[tuple[int, Question]]:
    """Image id and question, for each usable one of the chosen records."""
    before, after = prompt.split("{question}", 1)
    prompts: dict[str, str] = {}
    for number in chosen:
        record, key = records[number], ids[number]
        if key is None:
            continue
        where = f"{files['questions']}, question {key}"
        problem = _problem(record, {"image_id": int, "question": str})
        if not problem and not record["question"].strip():
            problem = "the question is empty"
        if problem:
            bad_records.add(where, problem)
            continue
        annotation: Annotation | None = None
        if "annotations" in files:
            if key not in annotations:
                name = files["annotations"].name
                bad_records.add(where, f"{name} does not answer it", "use two files of the same split and version")
                continue
            annotation = annotations[key]
            if annotation is None:
                continue
        text = intern(record["question"])
        read_by_model = prompts.setdefault(text, before + text + after)
        if annotation is None:
            yield record["image_id"], Question(key, text, read_by_model)
        else:
            target, answers, question_type, answer_type = annotation
            yield record["image_id"], Question(key, text, read_by_model, target, answers, question_type, answer_type)


def _group(
    questions: Iterator[tuple[int, Question]], files: Mapping[str, Path], folder: str, bad_records: BadRecords
) -> list[Example]:
    """Examples in order of each image's first question."""
    by_image: dict[int, list[Question]] = {}
    for image_id, question in questions:
        by_image.setdefault(image_id, []).append(question)
    # One listing of the folder: on a network disk, asking for 82,783 files one by one takes minutes.
    present = {entry.name for entry in os.scandir(files["images"])}
    names = {image_id: f"COCO_{folder}_{image_id:012d}.jpg" for image_id in by_image}
    missing = sum(name not in present for name in names.values())
    examples = []
    for image_id, asked in by_image.items():
        path = files["images"] / names[image_id]
        if names[image_id] in present:
            examples.append(Example(path, image_id, tuple(asked)))
        else:
            bad_records.add(
                f"{files['questions']}, question {asked[0].id}",
                f"its image {path} is missing ({missing} of the {len(by_image)} images are)",
                "download it",
            )
    return examples
