"""Read any dataset in parquet format, from the Hub or a folder, given the names of its columns.

    hub id -------datasets--> rows --Columns--> questions --> Examples whose image is the bytes of a file
    folder of parquet --pyarrow--^

Each selected image is kept in memory once; `data.max_*_samples` or a slice limits how many. With `data.streaming`, only
the selected rows are downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Any

from vlmvqa.config.compose import build_settings
from vlmvqa.config.schema import DataSettings
from vlmvqa.data.example import Example, Question
from vlmvqa.data.records import PromptTemplate, most_common, refuse_empty
from vlmvqa.data.tasks import refuse_unknown_options
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.extras.hub.parquet import open_split
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


def read_hub(
    settings: DataSettings, source: ModuleType, split: str, max_samples: int | None, bad_records: BadRecords
) -> list[Example]:
    """Return the questions of a split, grouped by image in order of first appearance.

    The source's function `arrange` brings them into the form of its own files.

    Args:
        settings: `hub_config` and `hub_images` may contain `{split}`, for datasets with a configuration per split.
        source: the module that reads the dataset's own files.
        split: the split's name in the dataset, with an optional slice of its rows: `validation[:10%]`.
        max_samples: read at most this many rows of the slice.
        bad_records: policy for unusable rows.

    Raises:
        InputError: a package or the dataset is missing, the dataset is a loading script, or a row is unusable.
    """
    hub, columns = str(settings.hub), build_settings(Columns, settings.columns, "data.columns")
    if settings.hub_images and not columns.image_id:
        raise InputError("data.hub_images needs data.columns.image_id to match images with questions; set it")
    name = split.partition("[")[0]
    if name.startswith("train"):
        columns = replace(columns, details=())
    prompt = settings.prompt
    to_prompt: Callable[[str], str] = PromptTemplate(prompt) if columns.question else lambda _: prompt
    table, numbers = open_split(hub, settings.hub_config, split, settings.streaming, max_samples)
    single = (value for key, value in vars(columns).items() if key not in ("image", "joined_id", "details"))
    read_columns = _top_level(None if settings.hub_images else columns.image, *single, *columns.details)
    rows = bar(table.rows(numbers, read_columns), doing=f"reading {table.where}", unit="rows", delay=2.0)
    images, by_image = _group_by_image(settings, rows, numbers, columns, to_prompt, table.where, bad_records)
    joined = _read_images(settings, columns, name, by_image) if settings.hub_images else {}
    examples = _with_images(by_image, images, joined, settings, bad_records)
    arrange = vars(source).get("arrange", lambda examples, split: examples)
    refuse_unknown_options(settings.options, arrange)
    return list(arrange(refuse_empty(examples, table.where, split), split, **settings.options))


def _group_by_image(
    settings: DataSettings,
    rows: Iterable[Mapping[str, Any]],
    numbers: range,
    columns: Columns,
    to_prompt: Callable[[str], str],
    table: str,
    bad_records: BadRecords,
) -> tuple[dict[ImageId, tuple[str, bytes | None]], dict[ImageId, list[Question]]]:
    """Return the first row of each image, for errors, with its content; and the questions of each image."""
    seen: set[int | str] = set()
    images: dict[ImageId, tuple[str, bytes | None]] = {}
    by_image: dict[ImageId, list[Question]] = {}
    for row, number in zip(rows, numbers, strict=False):
        where = f"{table}, row {number}"
        try:
            question = _question(row, number, columns, to_prompt)
            if question.id in seen:
                raise InputError(f"its id {question.id} is used twice; keep one of them")
            content = None if settings.hub_images else _image_bytes(_value(row, columns.image), str(settings.hub))
            image_id = _image_id(row, columns, content)
        except InputError as error:
            bad_records.add_error(InputError(f"{where}: {error}"))
            continue
        seen.add(question.id)
        images.setdefault(image_id, (where, content))
        by_image.setdefault(image_id, []).append(question)
    return images, by_image


def _with_images(
    by_image: Mapping[ImageId, Sequence[Question]],
    images: Mapping[ImageId, tuple[str, bytes | None]],
    joined: Mapping[ImageId, bytes],
    settings: DataSettings,
    bad_records: BadRecords,
) -> list[Example]:
    """Return the images with their usable questions; `joined` are the images of another configuration."""
    answered = any(question.answers for questions in by_image.values() for question in questions)
    examples = []
    for image_id, questions in by_image.items():
        where, content = images[image_id]
        content = content or joined.get(image_id)
        if content is None:
            bad_records.add(where, f"there is no image {image_id} in {settings.hub_images}", "leave the row out")
            continue
        usable = []
        for question in questions:
            if question.answers or not answered:
                usable.append(question)
            else:
                bad_records.add(f"{where}, question {question.id}", "it has no answers, but others do")
        if usable:
            examples.append(Example(content, image_id, tuple(usable)))
    return examples


def _read_images(
    settings: DataSettings, columns: Columns, split: str, wanted: Collection[ImageId]
) -> dict[ImageId, bytes]:
    """Return the wanted images by id, from the configuration that `data.hub_images` names."""
    hub, found = str(settings.hub), dict[ImageId, bytes]()
    table, numbers = open_split(hub, settings.hub_images, split, settings.streaming, None)
    for row in table.rows(numbers, _top_level(columns.image, columns.joined_id)):
        image_id = _value(row, columns.joined_id)
        if image_id in wanted:
            try:
                found[image_id] = _image_bytes(_value(row, columns.image), hub)
            except InputError as error:
                raise InputError(f"{table.where}, image {image_id}: {error}") from error
        if len(found) == len(wanted):
            break
    return found


def _top_level(*names: str | None) -> list[str]:
    """Return the names of the top-level columns to read."""
    return list(dict.fromkeys(name.split(".")[0] for name in names if name))


# --- fields of a row ------------------------------------------------------------------------------------


def _question(row: Mapping[str, Any], number: int, columns: Columns, to_prompt: Callable[[str], str]) -> Question:
    key = number if columns.id is None else _value(row, columns.id)
    if not isinstance(key, int | str) or isinstance(key, bool):
        raise InputError(f"its {columns.id} should be an integer or text, not {str(key)[:40]!r}; fix it")
    text = _text(row, columns.question)
    if columns.question and not (text or "").strip():
        raise InputError(f"its {columns.question} is empty; fix it")
    listed = None if columns.answers is None else _value(row, columns.answers)
    answers = (listed,) if isinstance(listed, str) else listed or ()
    if not isinstance(answers, list | tuple) or not all(isinstance(answer, str) for answer in answers):
        raise InputError(f"its {columns.answers} should be texts, not {str(listed)[:40]!r}; fix it or data.columns")
    target = _text(row, columns.target) if columns.target else (most_common(answers) if answers else None)
    if answers and not (target or "").strip():
        raise InputError("its answer is empty; fix it")
    return Question(
        key,
        text or "",
        to_prompt(text or ""),
        target,
        tuple(answers),
        _text(row, columns.question_type),
        _text(row, columns.answer_type),
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


def _text(row: Mapping[str, Any], name: str | None) -> str | None:
    """Return a text, or the first of a list of texts."""
    value = None if name is None else _value(row, name)
    if isinstance(value, list):
        value = value[0] if value else None
    if value is None or isinstance(value, str):
        return value
    raise InputError(f"its {name} should be text, not {str(value)[:40]!r}; fix it or data.columns")


def _image_id(row: Mapping[str, Any], columns: Columns, content: bytes | None) -> ImageId:
    if columns.image_id is None:
        return blake2b(content or b"", digest_size=10).hexdigest()
    value = _value(row, columns.image_id)
    if not isinstance(value, int | str):
        raise InputError(f"its {columns.image_id} should be an integer or text; fix it or data.columns")
    return value


def _image_bytes(value: Any, hub: str) -> bytes:
    """Return the bytes of an image file; `datasets` stores the bytes, a path, or both."""
    path = value.get("path") if isinstance(value, Mapping) else value
    content = value.get("bytes") if isinstance(value, Mapping) else value
    if isinstance(content, bytes) and content:
        return content
    if isinstance(path, str):
        if path.startswith(("http://", "https://")):
            raise InputError(f"its image is only a URL, {path}; use a dataset that contains the images")
        try:
            return (Path(hub) / path).read_bytes()
        except OSError as error:
            raise InputError(f"its image {path} cannot be read ({error.strerror}); download it") from None
    raise InputError("it has no image; fix it, or data.columns.image")
