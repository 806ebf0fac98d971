"""Your own data: a JSONL file with one question per line.

    root/train.jsonl    {"image": "images/1.jpg", "question": "What is it?", "answers": ["a cat", "cat"], "id": 1}

Image paths are relative to the file. A question about several images has a list of them instead, in the order in which
the model reads them: `"images": ["a.jpg", "b.jpg"]`. `id` is optional (default: the line number), and so is
`question_type`, for the tables and the prior control. A file without any `answers` is a test split. `data.root` may
also be one file, whose split is `all`, with slices of it (`data.train_split=all[:90%] data.eval_split=all[90%:]`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from vlmvqa.data import records
from vlmvqa.data.example import Example, Question
from vlmvqa.data.splits import Slice, parse_split
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.paths import replace_file

TOGETHER = " + "  # joins the paths of images that are asked about together to their id
SINGLE = "all"  # the split of a single file
Records = dict[int | str, tuple[int, Any]]  # by the question's id: number and JSON value of the line
LINE = '{"image": "images/1.jpg", "question": "What is it?", "answers": ["a cat"]}'


def read(
    root: Path,
    split: str,
    *,
    prompt: str = "answer en {question}\n",
    max_samples: int | None = None,
    bad_records: BadRecords | None = None,
) -> list[Example]:
    """Read the questions of a file, grouped by image in order of first appearance.

    The training target is the most frequent answer (the first of equally frequent ones). This reader has no `files`, so
    it is not cached: images may be in any folder, and checking them all would take as long as reading.

    `root` is a folder with a file per split, or one file, whose split is `all`; slices are over the lines.
    Arguments and errors: see `datasets/__init__.py`.
    """
    path, selected = _find(root, split, max_samples)
    template = records.PromptTemplate(prompt)
    bad_records = bad_records or BadRecords()
    entries = _load(path, bad_records)
    if not entries:
        raise InputError(
            f"{path} holds no usable line; write one JSON object per line, with image, question and answers"
        )
    keys = list(entries)
    chosen = {keys[index]: entries[keys[index]] for index in selected.indices(len(keys), path, "lines")}
    answered = any(content.get("answers") is not None for _, content in entries.values())
    together: dict[str, list[str]] = {}
    return records.group_by_image(
        _questions(chosen, path, answered, template, bad_records, together),
        lambda images: [path.parent / image for image in together.get(images, [images])],
        path,
        split,
        bad_records,
        lambda key: f"line {entries[key][0]}",
    )


def write_submission(path: Path, answers: Mapping[int | str, str]) -> None:
    """Write one JSON line per answer, `{"id": 1, "answer": "a cat"}`, with unmodified answers."""
    lines = [json.dumps({"id": key, "answer": answer}, ensure_ascii=False) + "\n" for key, answer in answers.items()]
    replace_file(path, "".join(lines))


def _find(root: Path, split: str, max_samples: int | None) -> tuple[Path, Slice]:
    """Return the file of a split, and its slice."""
    if root.is_file():
        _check_not_list(root)
        # `train` and `val` are errors: both would be the full file, with the score of the training questions.
        if split.partition("[")[0] != SINGLE:
            raise InputError(
                f"{root} is one file, whose split is '{SINGLE}', not '{split}'; set data.train_split={SINGLE}[:90%] "
                f"data.eval_split={SINGLE}[90%:], or set data.root to a folder of .jsonl files."
            )
        return root, parse_split(split, [SINGLE], str(root), max_samples)
    if not root.is_dir():
        raise InputError(f"{root} does not exist; set data.root to a folder with train.jsonl, or to a .jsonl file.")
    known = sorted(path.stem for path in root.glob("*.jsonl"))
    if not known:
        for path in sorted(root.glob("*.json")):
            _check_not_list(path)
        raise InputError(f"{root} holds no .jsonl file; put train.jsonl there, or set data.root.")
    selected = parse_split(split, known, str(root), max_samples)
    return root / f"{selected.name}.jsonl", selected


def _check_not_list(path: Path) -> None:
    """Raise an InputError if a file is one JSON list, such as LLaVA's."""
    try:
        with path.open("rb") as file:
            start = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError as error:
        raise records.unreadable(path, error) from None
    if start.startswith(b"["):
        _refuse_format(path, llava=b'"conversations"' in start)


def _refuse_format(where: Path | str, llava: bool) -> NoReturn:
    """Raise the InputError that shows the expected format."""
    format = "in LLaVA's format ('conversations'), which data=conversations reads" if llava else "a JSON list"
    raise InputError(f"{where} is {format}; write a file of JSON lines, a line for each question: {LINE}")


def _load(path: Path, bad_records: BadRecords) -> Records:
    """Parse the lines in file order, each id once; skip empty lines."""
    _check_not_list(path)
    entries: Records = {}
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise records.unreadable(path, error) from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except json.JSONDecodeError as error:
            bad_records.add(f"{path}, line {number}, column {error.colno}", f"broken JSON ({error.msg})")
            continue
        except UnicodeDecodeError as error:
            bad_records.add(f"{path}, line {number}", f"byte {error.start} is not UTF-8 text")
            continue
        if isinstance(record, dict) and "conversations" in record and "question" not in record:
            _refuse_format(f"{path}, line {number}", llava=True)
        problem = records.find_problem(
            record, {"id": (int, str)} if isinstance(record, dict) and "id" in record else {}
        )
        key = number if problem else record.get("id", number)
        if not problem and key in entries:
            problem = f"the id {key} is used twice"
        if problem:
            bad_records.add(f"{path}, line {number}", problem)
        else:
            entries[key] = number, record
    return entries


def _questions(
    entries: Records,
    path: Path,
    answered: bool,
    template: records.PromptTemplate,
    bad_records: BadRecords,
    together: dict[str, list[str]],
) -> Iterator[tuple[str, Question]]:
    """Yield image id and question of each usable record; the id is the path of the image, or of several joined.

    Args:
        together: receives the paths of several images by their id.
    """
    for key, (line, record) in entries.items():
        if isinstance(record.get("answers"), str):
            record = {**record, "answers": [record["answers"]]}
        optional = {"question_type": str} if "question_type" in record else {}
        several = "images" in record
        images = {"images": list} if several else {"image": str}
        problem = records.find_question_problem(record, {**images, **optional})
        if several and not problem and set(map(type, record["images"])) != {str}:
            problem = "its 'images' should be a list of paths"
        if not problem and answered:
            problem = records.find_answers_problem(record)
        if problem:
            bad_records.add(f"{path}, line {line}", problem)
            continue
        text, answers = record["question"], tuple(record.get("answers") or ())
        target = records.most_common(answers) if answers else None
        image = TOGETHER.join(record["images"]) if several else record["image"]
        if several:
            together[image] = record["images"]
        yield image, Question(key, text, template(text), target, answers, record.get("question_type"))
