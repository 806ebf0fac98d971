"""A data set in parquet form, from the hub or from a folder: any source's, through the names of its columns.

    hub id -------datasets--> rows --Columns--> questions --> Examples whose image is the bytes of a file
    folder of parquet --pyarrow--^

The pictures of what was selected are held in memory, each once: select with `max_samples` or a slice. With
`streaming` no more is fetched than that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.example import Example, Question
from vlmvqa.data.records import Prompts, most_common, refuse_empty
from vlmvqa.data.splits import Slice
from vlmvqa.errors import InputError
from vlmvqa.extras.hub.parquet import Table, chosen_rows, open_split
from vlmvqa.progress import bar


@dataclass(frozen=True)
class Columns:
    """What the columns are called; a dot leads into one: `types.structural`, `answers.answer`.

    Attributes:
        image: a picture's bytes, as `datasets` writes pictures, or a path relative to the folder.
        question: None where nothing is asked (captions).
        answers: a text or a list of texts; null in a split without answers.
        target: the answer to train on (None: the most frequent of the answers).
        id: of the question (None: the row's number).
        image_id: of the picture (None: its content).
        joined_id: in `images`, the column that `image_id` is found in.
        question_type, answer_type: the benchmark's categories; of a list the first.
        details: what the metric needs besides, kept outside of training splits.
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
    """The questions of a split, grouped by image in order of first appearance.

    Args:
        hub: a data set's id on the hub, or a folder that holds its parquet files.
        split: by the name it has there, with an optional slice over the rows: `validation[:10%]`.
        prompt: what the model reads; `{question}` stands for the question.
        config: which of the data set's configurations; `{split}` stands for the split where each has its own, as in
            GQA's "{split}_instructions".
        images: another configuration, that holds the pictures ("{split}_images").
        streaming: fetch rows as they are read, instead of the whole split first.
        max_samples: take only the first so many rows of the slice.
        bad_records: what to do with a row that cannot be used; stop, unless it says otherwise.

    Raises:
        InputError: a package or the data set is missing, it is a loading script, or a row cannot be used.
    """
    if images and not columns.image_id:
        raise InputError("data.hub_images needs data.columns.image_id, by which its pictures are found; name it")
    bad_records = bad_records or BadRecords()
    to_prompt: Callable[[str], str] = Prompts(prompt) if columns.question else lambda _: prompt
    table, selected = open_split(hub, config, split, streaming, max_samples)
    if selected.name.startswith("train"):
        columns = replace(columns, details=())
    pictures: dict[int | str, bytes] = {}
    asked: dict[int | str, list[Question]] = {}
    places: dict[int | str, str] = {}  # of a picture's first row
    here = replace(columns, image="") if images else columns  # the pictures are in another table
    for where, image_id, picture, question in _read_rows(table, selected, here, to_prompt, hub, bad_records):
        if picture is not None:
            pictures.setdefault(image_id, picture)
        asked.setdefault(image_id, []).append(question)
        places.setdefault(image_id, where)
    if images:
        joined, _ = open_split(hub, images, selected.name, streaming, None)
        pictures = _joined(joined, columns, asked, hub)
    _refuse_unanswered(asked, places, bad_records)
    examples = []
    for image_id, questions in asked.items():
        if image_id in pictures:
            examples.append(Example(pictures[image_id], image_id, tuple(questions)))
        else:
            bad_records.add(places[image_id], f"there is no picture {image_id} in {images}", "leave the row out")
    return refuse_empty(examples, table.where, split)


def _refuse_unanswered(
    asked: dict[int | str, list[Question]], places: Mapping[int | str, str], bad_records: BadRecords
) -> None:
    """Where some questions have answers, those without are bad records: a test split has none at all."""
    if not any(question.answers for questions in asked.values() for question in questions):
        return
    for image_id, questions in list(asked.items()):
        for question in questions:
            if not question.answers:
                bad_records.add(f"{places[image_id]}, question {question.id}", "it has no answers, as others have")
        asked[image_id] = [question for question in questions if question.answers]
        if not asked[image_id]:
            del asked[image_id]


def _read_rows(
    table: Table,
    selected: Slice,
    columns: Columns,
    to_prompt: Callable[[str], str],
    hub: str,
    bad_records: BadRecords,
) -> Iterator[tuple[str, int | str, bytes | None, Question]]:
    """Where it stands, the picture's id, the picture (None: it is elsewhere) and the question, of each usable row."""
    chosen = chosen_rows(selected, table)
    seen: set[int | str] = set()
    rows = table.rows(chosen, _top(columns))
    read = bar(rows, doing=f"reading {table.where}", unit="rows", delay=2.0)
    for row, number in zip(read, chosen, strict=False):
        where = f"{table.where}, row {number}"
        try:
            question = _question(row, number, columns, to_prompt, where)
            if question.id in seen:
                raise InputError(f"{where}: its id {question.id} is used twice; keep one of them")
            picture = _bytes(_at(row, columns.image), hub, where) if columns.image else None
            image_id = _image_id(row, columns, picture, where)
        except InputError as error:
            bad_records.add_error(error)
        else:
            seen.add(question.id)
            yield where, image_id, picture, question


# --- from a row to a question ---------------------------------------------------------------------------


def _question(
    row: Mapping[str, Any], number: int, columns: Columns, to_prompt: Callable[[str], str], where: str
) -> Question:
    key = number if columns.id is None else _at(row, columns.id)
    if not isinstance(key, int | str) or isinstance(key, bool):
        raise InputError(f"{where}: its {columns.id} should be a whole number or text, not {str(key)[:40]!r}; fix it")
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
        {name: _at(row, name) for name in columns.details} or None,
    )


def _at(row: Mapping[str, Any], name: str) -> Any:
    """A row's value; `answers.answer` is the answer of each of the answers."""
    value: Any = row
    for part in name.split("."):
        if isinstance(value, list):
            value = [one.get(part) if isinstance(one, Mapping) else None for one in value]
        else:
            value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _text(row: Mapping[str, Any], name: str | None, where: str) -> str | None:
    """A text, or the first of a list of texts."""
    value = None if name is None else _at(row, name)
    if isinstance(value, list):
        value = value[0] if value else None
    if value is None or isinstance(value, str):
        return value
    raise InputError(f"{where}: its {name} should be text, not {str(value)[:40]!r}; fix it or data.columns")


def _answers(row: Mapping[str, Any], name: str | None, where: str) -> tuple[str, ...]:
    value = None if name is None else _at(row, name)
    listed = [value] if isinstance(value, str) else value or []
    if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
        raise InputError(f"{where}: its {name} should be texts, not {str(value)[:40]!r}; fix it or data.columns")
    return tuple(listed)


def _image_id(row: Mapping[str, Any], columns: Columns, picture: bytes | None, where: str) -> int | str:
    if columns.image_id is None:
        return blake2b(picture or b"", digest_size=10).hexdigest()
    value = _at(row, columns.image_id)
    if not isinstance(value, int | str):
        raise InputError(f"{where}: its {columns.image_id} should be a whole number or text; fix it or data.columns")
    return value


def _bytes(value: Any, hub: str, where: str) -> bytes:
    """A picture's file, of which `datasets` keeps the bytes, a path, or both."""
    path = value.get("path") if isinstance(value, Mapping) else value
    content = value.get("bytes") if isinstance(value, Mapping) else value
    if isinstance(content, bytes) and content:
        return content
    if isinstance(path, str):
        if path.startswith(("http://", "https://")):
            raise InputError(f"{where}: its picture is only an address, {path}; use a data set that holds the pictures")
        try:
            return (Path(hub) / path).read_bytes()
        except OSError as error:
            raise InputError(f"{where}: its picture {path} cannot be read ({error.strerror}); fetch it") from None
    raise InputError(f"{where}: it holds no picture; fix it, or data.columns.image")


def _joined(table: Table, columns: Columns, wanted: Iterable[int | str], hub: str) -> dict[int | str, bytes]:
    """The pictures that are asked about, out of a configuration of their own."""
    missing, found = set(wanted), {}
    everything = range(table.total if table.total is not None else 2**62)
    wanted_columns = _top(Columns(image=columns.image, question=None, answers=None, id=columns.joined_id))
    for number, row in zip(everything, table.rows(everything, wanted_columns), strict=False):
        image_id = _at(row, columns.joined_id)
        if image_id in missing:
            found[image_id] = _bytes(_at(row, columns.image), hub, f"{table.where}, row {number}")
            missing.remove(image_id)
        if not missing:
            break
    return found


def _top(columns: Columns) -> list[str]:
    """The columns that are needed, without what lies in them."""
    given = (
        columns.image,
        columns.question,
        columns.answers,
        columns.target,
        columns.id,
        columns.image_id,
        columns.question_type,
        columns.answer_type,
        *columns.details,
    )
    return list(dict.fromkeys(name.split(".")[0] for name in given if name))
