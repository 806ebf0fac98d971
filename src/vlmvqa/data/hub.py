"""A data set in parquet form, from the hub or from a folder: any source's, through the names of its columns.

    hub id -------datasets--> rows --Columns--> questions --> Examples whose image is the bytes of a file
    folder of parquet --pyarrow--^

The pictures of what was selected are held in memory, each once: select with `max_samples` or a slice. With
`streaming` no more is fetched than that.
"""

from __future__ import annotations

import importlib
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.example import Example, Question
from vlmvqa.data.records import Prompts, most_common, refuse_empty
from vlmvqa.data.splits import Slice, parse_split
from vlmvqa.errors import InputError, suggest
from vlmvqa.hub import when_offline
from vlmvqa.progress import bar

# Loading scripts, which `datasets` no longer runs, and where the same data are in parquet.
PARQUET_FORM = {"HuggingFaceM4/VQAv2": "lmms-lab/VQAv2", "HuggingFaceM4/COCO": "lmms-lab/COCO-Caption"}
SHARD = re.compile(r"(?P<split>.+)-\d+-of-\d+")
ROWS_AT_A_TIME = 64
FAILURES = (OSError, RuntimeError, ValueError)  # of `datasets`, beside its own DatasetsError


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


class Table(Protocol):
    """The rows of a split."""

    where: str  # for errors
    total: int | None  # rows; None: not known before they are read
    columns: Sequence[str] | None  # None: not known before the first row is read

    def rows(self, chosen: range, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The chosen rows with these of their columns."""


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
    table, selected = _open(hub, config, split, streaming, max_samples)
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
        joined, _ = _open(hub, images, selected.name, streaming, None)
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
    chosen = _chosen(selected, table)
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
        raise InputError(f"{where}: its {columns.id} should be a whole number or text, not {str(key)[:40]!r}; mend it")
    text = _text(row, columns.question, where)
    if columns.question and not (text or "").strip():
        raise InputError(f"{where}: its {columns.question} is empty; mend it")
    answers = _answers(row, columns.answers, where)
    target = _text(row, columns.target, where) if columns.target else (most_common(answers) if answers else None)
    if answers and not (target or "").strip():
        raise InputError(f"{where}: its answer is empty; mend it")
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
    raise InputError(f"{where}: its {name} should be text, not {str(value)[:40]!r}; mend it or data.columns")


def _answers(row: Mapping[str, Any], name: str | None, where: str) -> tuple[str, ...]:
    value = None if name is None else _at(row, name)
    listed = [value] if isinstance(value, str) else value or []
    if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
        raise InputError(f"{where}: its {name} should be texts, not {str(value)[:40]!r}; mend it or data.columns")
    return tuple(listed)


def _image_id(row: Mapping[str, Any], columns: Columns, picture: bytes | None, where: str) -> int | str:
    if columns.image_id is None:
        return blake2b(picture or b"", digest_size=10).hexdigest()
    value = _at(row, columns.image_id)
    if not isinstance(value, int | str):
        raise InputError(f"{where}: its {columns.image_id} should be a whole number or text; mend it or data.columns")
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
    raise InputError(f"{where}: it holds no picture; mend it, or data.columns.image")


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


def _refuse_unknown(columns: Sequence[str], known: Sequence[str], where: str) -> None:
    for name in columns:
        if name not in known:
            near = suggest(name, known)
            raise InputError(f"{where} has no column '{name}', only {', '.join(known)}; set data.columns{near}")


# --- which rows -----------------------------------------------------------------------------------------


def _open(hub: str, config: str | None, split: str, streaming: bool, max_samples: int | None) -> tuple[Table, Slice]:
    """The table of a split, and what is selected of it."""
    name = split.partition("[")[0]
    # Where each split is a configuration, that has one split, called what it may.
    own = config is not None and "{split}" in config
    config = config and config.replace("{split}", name)
    folder = _folder(hub)
    known = _local_splits(folder, config) if folder else _hub_splits(hub, config)
    own = own and len(known) == 1
    selected = parse_split(split, [name] if own else known, hub, max_samples)
    inner = next(iter(known)) if own else name
    if folder:
        return ParquetTable(known[inner], f"{hub} {name}"), selected
    return HubTable(hub, config, inner, streaming), selected


def _folder(hub: str) -> Path | None:
    """The folder, unless it is an id of the hub."""
    path = Path(hub).expanduser()
    if not path.is_dir() and (hub.startswith((".", "/", "~")) or hub.count("/") > 1):
        raise InputError(f"data.hub={hub}: there is no such folder; correct the path, or give an id of the hub")
    return path if path.is_dir() else None


def _chosen(selected: Slice, table: Table) -> range:
    if selected.drawn is not None:
        raise InputError(f"{table.where}: '{selected.text}' cannot be drawn from rows; give a slice, or use data.root")
    if table.total is not None:
        found = selected.chosen(table.total, table.where, "rows")
        assert isinstance(found, range)
        return found
    bounds = (selected.start, selected.stop)
    if any(bound is not None and (bound.endswith("%") or bound.startswith("-")) for bound in bounds):
        raise InputError(
            f"{table.where}: how many rows it has is not known while they are streamed, as '{selected.text}' needs; "
            "give numbers of rows, or set data.streaming=false"
        )
    start, stop = int(selected.start or 0), int(selected.stop) if selected.stop else 2**62
    return range(start, max(start, stop))[: selected.max_samples]


# --- a folder of parquet files --------------------------------------------------------------------------


class ParquetTable:
    """Rows of a split's files, one after the other."""

    def __init__(self, files: Sequence[Path], where: str) -> None:
        parquet = _import("pyarrow.parquet", "pyarrow")
        self.where = where
        try:
            self.files = [parquet.ParquetFile(path) for path in files]
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            raise InputError(f"{where}: its parquet files cannot be read ({_line(error)}); fetch them again") from error
        self.total: int | None = sum(file.metadata.num_rows for file in self.files)
        self.columns: Sequence[str] | None = self.files[0].schema_arrow.names

    def rows(self, chosen: range, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        assert self.columns is not None
        _refuse_unknown(columns, self.columns, self.where)
        first = 0  # number of the file's or batch's first row
        for file in self.files:
            if first + file.metadata.num_rows <= chosen.start or first >= chosen.stop:
                first += file.metadata.num_rows
                continue
            for batch in file.iter_batches(ROWS_AT_A_TIME, columns=list(columns)):
                mine = range(max(chosen.start, first), min(chosen.stop, first + len(batch)))
                if mine:
                    yield from batch.slice(mine.start - first, len(mine)).to_pylist()
                first += len(batch)
                if first >= chosen.stop:
                    return


def _local_splits(folder: Path, config: str | None) -> dict[str, list[Path]]:
    """The files of each split: `validation-00000-of-00068.parquet`, `validation.parquet`, `validation/0000.parquet`."""
    inside = folder / config if config else folder
    if not inside.is_dir():
        known = sorted(path.name for path in folder.iterdir() if path.is_dir())
        near = suggest(config or "", known)
        there = ", ".join(known) or "files"
        raise InputError(f"{folder} has no folder {config}, only {there}; set data.hub_config{near}")
    splits: defaultdict[str, list[Path]] = defaultdict(list)
    for path in sorted(inside.rglob("*.parquet")):
        shard = SHARD.fullmatch(path.stem)
        splits[shard["split"] if shard else path.parent.name if path.stem.isdecimal() else path.stem].append(path)
    if not splits:
        raise InputError(f"{inside} holds no .parquet file; set data.hub to a folder with them, or to a hub id.")
    for name, paths in splits.items():
        folders = sorted({path.parent.relative_to(folder).as_posix() for path in paths})
        if len(folders) > 1:
            raise InputError(
                f"{folder} has files of {name} in {' and '.join(folders)}; set data.hub_config to one of them"
            )
    return dict(splits)


# --- the hub --------------------------------------------------------------------------------------------


class HubTable:
    """Rows of a split of the hub's, pictures as the bytes of their files."""

    def __init__(self, hub: str, config: str | None, split: str, streaming: bool) -> None:
        self.datasets = _datasets()
        self.hub, self.where = hub, f"{hub} {split}"
        self.failures = (*FAILURES, self.datasets.exceptions.DatasetsError)
        try:
            self.data = self.datasets.load_dataset(hub, config, split=split, streaming=streaming)
        except self.failures as error:
            raise _unavailable(hub, error) from error
        self.streaming = streaming
        self.columns: Sequence[str] | None = self.data.column_names
        known = (self.data.info.splits or {}).get(split)
        self.total: int | None = (known.num_examples or None) if streaming and known else None
        if not streaming:
            self.total = len(self.data)

    def rows(self, chosen: range, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        if self.columns is not None:
            _refuse_unknown(columns, self.columns, self.where)
        data = self.data.select_columns(list(columns))
        for name, feature in (data.features or {}).items():
            if isinstance(feature, self.datasets.Image):
                data = data.cast_column(name, self.datasets.Image(decode=False))
        try:
            if self.streaming:
                yield from itertools.islice(data.skip(chosen.start), len(chosen))
            else:
                yield from data.select(chosen)
        except self.failures as error:
            raise _unavailable(self.hub, error) from error


def _hub_splits(hub: str, config: str | None) -> dict[str, list[Path]]:
    """The names of a data set's splits (their files are `datasets`' business)."""
    datasets = _datasets()
    try:
        return {name: [] for name in datasets.get_dataset_split_names(hub, config)}
    except FAILURES as error:
        raise _unavailable(hub, error) from error


def _datasets() -> ModuleType:
    """The library, which runs no loading script: its version 3 would ask at the terminal whether to."""
    datasets = _import("datasets", "datasets")
    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False
    return datasets


def _unavailable(hub: str, error: Exception) -> InputError:
    """The sentence for a data set that `datasets` does not load."""
    said = _line(error)
    if any(words in said for words in ("scripts are no longer supported", "custom code", "dataset script")):
        other = PARQUET_FORM.get(hub)
        form = f"data.hub={other}" if other else "data.hub to the data set's parquet form"
        return InputError(f"{hub} is a loading script, which is not run; set {form}")
    return InputError(
        f"the data set {hub} cannot be read from the hub{when_offline()} ({said}); check data.hub, data.hub_config "
        "and the network, and for a gated data set accept its terms and set HF_TOKEN"
    )


def _import(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"data.hub needs the package {package}; install it: pip install 'vlmvqa[hub]'") from None


def _line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200]
