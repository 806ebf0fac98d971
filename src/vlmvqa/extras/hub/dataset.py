"""Read any dataset in parquet format, from the Hub or a folder, given the names of its columns.

    hub id -------datasets--> rows --Columns--> questions --> Examples whose image is the bytes of a file
    folder of parquet --pyarrow--^

Each selected image is kept in memory once; `max_samples` or a slice limits how many. With `streaming`, only the
selected rows are downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from vlmvqa.data.example import Example, Question
from vlmvqa.data.records import PromptTemplate, most_common, refuse_empty
from vlmvqa.data.splits import Slice
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.extras.hub.parquet import MAX_ROWS, Table, open_split, selected_rows
from vlmvqa.ranks import bar

ImageId = int | str


@dataclass(frozen=True)
class Columns:
    """Names of the columns; a dot selects a nested field: `types.structural`, `answers.answer`.

    Attributes:
        image: the image file's bytes, as `datasets` stores images, or a path relative to the folder.
        question: None if there are no questions (captions).
        answers: a text or a list of texts; null in a split without answers.
        target: the answer to train on (None: the most frequent answer).
        id: the question's id (None: the row number).
        image_id: the image's id (None: a hash of its content).
        joined_id: the column of the `images` configuration that matches `image_id`.
        question_type: the benchmark's question category; if it is a list, its first item.
        answer_type: the benchmark's answer category; if it is a list, its first item.
        details: further fields for the metric; not read from training splits.
    """

    image: str = "image"
    question: str | None = "question"
    answers: str | None = "answers"
    target: str | None = None
    id: str | None = None
    image_id: str | None = None
    joined_id: str = "id"
    question_type: str | None = None
    answer_type: str | None = None
    details: tuple[str, ...] = ()


def read(
    hub: str,
    split: str,
    *,
    columns: Columns,
    prompt: str,
    config: str | None = None,
    images: str | None = None,
    streaming: bool = False,
    max_samples: int | None = None,
    bad_records: BadRecords | None = None,
) -> list[Example]:
    """Return the questions of a split, grouped by image in order of first appearance.

    Args:
        hub: the dataset's id on the Hub, or a folder with its parquet files.
        split: the split's name in the dataset, with an optional slice of its rows: `validation[:10%]`.
        columns: the dataset's column names.
        prompt: the model's input text; `{question}` is replaced by the question.
        config: one of the dataset's configurations; `{split}` in it is replaced by the split's name, for datasets with
            a configuration per split (GQA's "{split}_instructions").
        images: the configuration that holds the images, if it is another one ("{split}_images").
        streaming: download rows while reading instead of the complete split first.
        max_samples: read at most this many rows of the slice.
        bad_records: policy for unusable rows (default: raise).

    Raises:
        InputError: a package or the dataset is missing, the dataset is a loading script, or a row is unusable.
    """
    if images and not columns.image_id:
        raise InputError("data.hub_images needs data.columns.image_id to match images with questions; set it")
    bad_records = bad_records or BadRecords()
    to_prompt: Callable[[str], str] = PromptTemplate(prompt) if columns.question else lambda _: prompt
    table, selected = open_split(hub, config, split, streaming, max_samples)
    if selected.name.startswith("train"):
        columns = replace(columns, details=())
    image_bytes: dict[ImageId, bytes] = {}
    by_image: dict[ImageId, list[Question]] = {}
    first_rows: dict[ImageId, str] = {}  # the first row of each image, for error messages
    row_columns = replace(columns, image="") if images else columns  # the images are read from another table
    for where, image_id, content, question in _read_rows(table, selected, row_columns, to_prompt, hub, bad_records):
        if content is not None:
            image_bytes.setdefault(image_id, content)
        by_image.setdefault(image_id, []).append(question)
        first_rows.setdefault(image_id, where)
    if images:
        image_table, _ = open_split(hub, images, selected.name, streaming, None)
        image_bytes = _read_images(image_table, columns, by_image, hub)
    by_image = _without_unanswered(by_image, first_rows, bad_records)
    examples = []
    for image_id, questions in by_image.items():
        if image_id in image_bytes:
            examples.append(Example(image_bytes[image_id], image_id, tuple(questions)))
        else:
            bad_records.add(first_rows[image_id], f"there is no image {image_id} in {images}", "leave the row out")
    return refuse_empty(examples, table.where, split)


def _without_unanswered(
    by_image: Mapping[ImageId, list[Question]], first_rows: Mapping[ImageId, str], bad_records: BadRecords
) -> dict[ImageId, list[Question]]:
    """Remove questions without answers as bad records; keep all if no question has answers, as in a test split."""
    if not any(question.answers for questions in by_image.values() for question in questions):
        return dict(by_image)
    for image_id, questions in by_image.items():
        for question in questions:
            if not question.answers:
                bad_records.add(f"{first_rows[image_id]}, question {question.id}", "it has no answers, but others do")
    answered = {key: [question for question in questions if question.answers] for key, questions in by_image.items()}
    return {image_id: questions for image_id, questions in answered.items() if questions}


def _read_rows(
    table: Table,
    selected: Slice,
    columns: Columns,
    to_prompt: Callable[[str], str],
    hub: str,
    bad_records: BadRecords,
) -> Iterator[tuple[str, ImageId, bytes | None, Question]]:
    """Yield (location, image id, image, question) of each usable row; image is None if `columns.image` is empty."""
    numbers = selected_rows(selected, table)
    seen: set[int | str] = set()
    rows = bar(table.rows(numbers, _top_level(columns)), doing=f"reading {table.where}", unit="rows", delay=2.0)
    for row, number in zip(rows, numbers, strict=False):
        where = f"{table.where}, row {number}"
        try:
            question = _question(row, number, columns, to_prompt, where)
            if question.id in seen:
                raise InputError(f"{where}: its id {question.id} is used twice; keep one of them")
            content = _image_bytes(_value(row, columns.image), hub, where) if columns.image else None
            image_id = _image_id(row, columns, content, where)
        except InputError as error:
            bad_records.add_error(error)
        else:
            seen.add(question.id)
            yield where, image_id, content, question


# --- fields of a row ------------------------------------------------------------------------------------


def _question(
    row: Mapping[str, Any], number: int, columns: Columns, to_prompt: Callable[[str], str], where: str
) -> Question:
    key = number if columns.id is None else _value(row, columns.id)
    if not isinstance(key, int | str) or isinstance(key, bool):
        raise InputError(f"{where}: its {columns.id} should be an integer or text, not {str(key)[:40]!r}; fix it")
    text = _text(row, columns.question, where)
    if columns.question and not (text or "").strip():
        raise InputError(f"{where}: its {columns.question} is empty; fix it")
    answers = _answers(row, columns.answers, where)
    target = _text(row, columns.target, where) if columns.target else (most_common(answers) if answers else None)
    if answers and not (target or "").strip():
        raise InputError(f"{where}: its answer is empty; fix it")
    return Question(
        key,
        text or "",
        to_prompt(text or ""),
        target,
        answers,
        _text(row, columns.question_type, where),
        _text(row, columns.answer_type, where),
        {name: _value(row, name) for name in columns.details} or None,
    )


def _value(row: Mapping[str, Any], name: str) -> Any:
    """Return a column's value or nested field; of a list of structs, the list of the field's values."""
    value: Any = row
    for part in name.split("."):
        if isinstance(value, list):
            value = [item.get(part) if isinstance(item, Mapping) else None for item in value]
        else:
            value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _text(row: Mapping[str, Any], name: str | None, where: str) -> str | None:
    """Return a text, or the first of a list of texts."""
    value = None if name is None else _value(row, name)
    if isinstance(value, list):
        value = value[0] if value else None
    if value is None or isinstance(value, str):
        return value
    raise InputError(f"{where}: its {name} should be text, not {str(value)[:40]!r}; fix it or data.columns")


def _answers(row: Mapping[str, Any], name: str | None, where: str) -> tuple[str, ...]:
    value = None if name is None else _value(row, name)
    listed = [value] if isinstance(value, str) else value or []
    if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
        raise InputError(f"{where}: its {name} should be texts, not {str(value)[:40]!r}; fix it or data.columns")
    return tuple(listed)


def _image_id(row: Mapping[str, Any], columns: Columns, content: bytes | None, where: str) -> ImageId:
    if columns.image_id is None:
        return blake2b(content or b"", digest_size=10).hexdigest()
    value = _value(row, columns.image_id)
    if not isinstance(value, int | str):
        raise InputError(f"{where}: its {columns.image_id} should be an integer or text; fix it or data.columns")
    return value


def _image_bytes(value: Any, hub: str, where: str) -> bytes:
    """Return the bytes of an image file; `datasets` stores the bytes, a path, or both."""
    path = value.get("path") if isinstance(value, Mapping) else value
    content = value.get("bytes") if isinstance(value, Mapping) else value
    if isinstance(content, bytes) and content:
        return content
    if isinstance(path, str):
        if path.startswith(("http://", "https://")):
            raise InputError(f"{where}: its image is only a URL, {path}; use a dataset that contains the images")
        try:
            return (Path(hub) / path).read_bytes()
        except OSError as error:
            raise InputError(f"{where}: its image {path} cannot be read ({error.strerror}); download it") from None
    raise InputError(f"{where}: it has no image; fix it, or data.columns.image")


def _read_images(table: Table, columns: Columns, wanted: Iterable[ImageId], hub: str) -> dict[ImageId, bytes]:
    """Return the wanted images by id, read from a table of images."""
    missing, found = set(wanted), {}
    numbers = range(table.total if table.total is not None else MAX_ROWS)
    names = _top_level(Columns(image=columns.image, question=None, answers=None, id=columns.joined_id))
    for number, row in zip(numbers, table.rows(numbers, names), strict=False):
        image_id = _value(row, columns.joined_id)
        if image_id in missing:
            found[image_id] = _image_bytes(_value(row, columns.image), hub, f"{table.where}, row {number}")
            missing.remove(image_id)
        if not missing:
            break
    return found


def _top_level(columns: Columns) -> list[str]:
    """Return the names of the top-level columns to read."""
    single = (name for field, name in vars(columns).items() if field not in ("joined_id", "details"))
    names = (*single, *columns.details)
    return list(dict.fromkeys(name.split(".")[0] for name in names if name))
