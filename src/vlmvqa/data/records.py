"""Helpers of the dataset readers: load JSON, validate records, group questions by image, write results files."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from sys import intern
from typing import Any, TypeVar

from vlmvqa.data.example import Example, Question
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.paths import replace_file

Id = TypeVar("Id", int, str)
Kinds = Mapping[str, type | tuple[type, ...]]

WORDS = {int: "a whole number", str: "text", list: "a list", dict: "an object", bool: "true or false"}


# --- files --------------------------------------------------------------------------------------------


def refuse_missing(root: Path, files: Sequence[Path], images: Path, benchmark: str) -> None:
    """Raise an InputError that names the missing files of a split, and those that the folder should hold."""
    paths = [*files, images]
    names = [path.relative_to(root).as_posix() for path in paths]
    listed = ", ".join(names[:-1]) + f" and the folder {names[-1]}/"
    if not root.is_dir():
        raise InputError(f"the {benchmark} folder {root} does not exist; put {listed} there, or set data.root.")
    missing = [name for name, path in zip(names, paths, strict=True) if not path.exists()]
    if missing:
        raise InputError(
            f"{root} has no {' and no '.join(missing)}; {benchmark} expects {listed} in that folder "
            "(download and unpack them there, or set data.root)."
        )


def load_json(path: Path, **hooks: Any) -> Any:
    """Load an official JSON file; `hooks` of `json.load` can shrink large records while they are parsed.

    Raises:
        InputError: it is not JSON (with line and column), not UTF-8, or cannot be read.
    """
    try:
        with path.open(encoding="utf-8") as file:
            return json.load(file, **hooks)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {error.lineno}, column {error.colno}: broken JSON ({error.msg}); download the file again."
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8 text; download the file again.") from None
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> InputError:
    """Return the InputError for a file that the system cannot read."""
    return InputError(f"{path} cannot be read ({error.strerror}); fix the file or its permissions.")


def list_under(content: Any, key: str, path: Path, description: str) -> list[Any]:
    """Return the list under `key` of a file's content; raise an InputError if there is none, or it is empty.

    Args:
        path, description: the file and its kind, such as "VQAv2's official questions file", for errors.
    """
    records = content.get(key) if isinstance(content, dict) else None
    if not isinstance(records, list):
        raise InputError(f"{path} holds no list '{key}'; is it {description}?")
    if not records:
        raise InputError(f"{path}: its list '{key}' is empty; download the file again.")
    return records


# --- records ------------------------------------------------------------------------------------------


def usable_records(
    records: Iterable[Any],
    key: str,
    path: Path,
    bad_records: BadRecords,
    find: Callable[[dict[str, Any]], str | None] = lambda record: None,
    *,
    indices: Iterable[int] | None = None,
    kind: str = "question",
) -> Iterator[dict[str, Any]]:
    """Yield the records with a distinct integer id in which `find` finds no problem; report the others.

    Ids are compared in the full file, whatever the slice: duplicate ids are errors of the file.

    Args:
        records: the records in file order.
        key: the key of the id.
        path: the file, for errors.
        bad_records: where the others are reported.
        find: returns what is wrong with a record, or None.
        indices: the slice to yield from (None: all records).
        kind: the kind of record, for errors.
    """
    seen = set()
    chosen = None if indices is None else set(indices)
    for number, record in enumerate(records):
        problem = find_problem(record, {key: int})
        if problem:
            bad_records.add(f"{path}, {kind} number {number}", problem)
        elif record[key] in seen:
            bad_records.add(f"{path}, {kind} {record[key]}", f"its {key} is used twice", "keep one of them")
        else:
            seen.add(record[key])
            if chosen is not None and number not in chosen:
                continue
            if problem := find(record):
                bad_records.add(f"{path}, {kind} {record[key]}", problem)
            else:
                yield record


def ids_of(records: Iterable[Any], key: str) -> set[int]:
    """Return the integer ids of the records, also of those that are bad otherwise."""
    return {record[key] for record in records if not find_problem(record, {key: int})}


def find_problem(record: Any, kinds: Kinds) -> str | None:
    """Return what is wrong with a parsed JSON record, such as a missing key or a value of another type; or None."""
    if not isinstance(record, dict):
        return f"a JSON object was expected, not {json.dumps(record)[:40]}"
    for key, kind in kinds.items():
        if key not in record:
            return f"it has no '{key}'"
        wanted = kind if isinstance(kind, tuple) else (kind,)
        if type(record[key]) not in wanted:  # isinstance would accept true as an integer
            words = " or ".join(WORDS[one] for one in wanted)
            return f"its '{key}' should be {words}, not {json.dumps(record[key])[:40]}"
    return None


def find_question_problem(record: Any, kinds: Kinds) -> str | None:
    """Return what is wrong with a record that also needs a non-empty 'question'; or None."""
    problem = find_problem(record, {**kinds, "question": str})
    return problem or (None if record["question"].strip() else "the question is empty")


def find_answers_problem(record: Mapping[str, Any], key: str = "answers") -> str | None:
    """Return what is wrong with a record's list of answers, the most frequent of which is the target; or None."""
    problem = find_problem(record, {key: list})
    if problem:
        return problem
    if not record[key]:
        return f"its list of {key} is empty"
    if not all(isinstance(answer, str) for answer in record[key]):
        return f"one of its {key} is not text"
    return None if most_common(record[key]).strip() else "its answer is empty"


def most_common(answers: Sequence[str]) -> str:
    """Return the most frequent answer, the first one of equally frequent ones."""
    return Counter(answers).most_common(1)[0][0]


class PromptTemplate:
    """The task's template, called with a question's text; equal prompts are one string object.

    Raises:
        InputError: the template has no `{question}`.
    """

    def __init__(self, template: str) -> None:
        if "{question}" not in template:
            raise InputError(f"the prompt {template!r} has no {{question}}; put it where the question belongs.")
        self.template = template

    def __call__(self, text: str) -> str:
        """Return the prompt of a question."""
        return intern(self.template.replace("{question}", text, 1))


# --- images -------------------------------------------------------------------------------------------


def group_by_image(
    questions: Iterable[tuple[Id, Question]],
    paths_of: Callable[[Id], Sequence[Path]],
    where: Path,
    split: str,
    bad_records: BadRecords,
    place_of: Callable[[int | str], str] = "question {}".format,
) -> list[Example]:
    """Group questions into examples, in order of each image's first question.

    Args:
        questions: pairs of image id and question.
        paths_of: returns the image file of an image id, or the files of images that are asked about together.
        where, split: the file of the questions and its split, for errors.
        bad_records: where questions whose image is missing are reported.
        place_of: returns the place in the file of a question id, for errors.

    Raises:
        InputError: an image is missing (under the policy "error"), or no question is left.
    """
    by_image: dict[Id, list[Question]] = {}
    for image_id, question in questions:
        by_image.setdefault(image_id, []).append(question)
    paths = {image_id: paths_of(image_id) for image_id in by_image}
    # One directory listing instead of 82,783 calls of `exists`, which take minutes on a network disk.
    present = {folder: _names(folder) for folder in {path.parent for together in paths.values() for path in together}}
    missing = {
        image_id: path for image_id in paths for path in paths[image_id] if path.name not in present[path.parent]
    }
    examples = []
    for image_id, grouped in by_image.items():
        if image_id not in missing:
            first, *others = paths[image_id]
            examples.append(Example(first, image_id, tuple(grouped), tuple(others)))
        else:
            bad_records.add(
                f"{where}, {place_of(grouped[0].id)}",
                f"its image {missing[image_id]} is missing ({len(missing)} of the {len(by_image)} images are)",
                "download it",
            )
    return refuse_empty(examples, where, split)


def refuse_empty(examples: list[Example], where: Path | str, split: str) -> list[Example]:
    """Return the examples; raise an InputError if there are none."""
    if not examples:
        raise InputError(f"{where}: no usable question is left in {split}; see the listing of bad records.")
    return examples


def _names(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in os.scandir(folder)}
    except (FileNotFoundError, NotADirectoryError):
        return set()


# --- results files -------------------------------------------------------------------------------------


def write_json(path: Path, results: list[dict[str, Any]]) -> None:
    """Write the results file of a benchmark's server or script, atomically: a list of results as JSON."""
    replace_file(path, json.dumps(results))


def numeric_id(key: int | str) -> int | str:
    """Convert an id that became a string (as a key of a JSON object) back to a number; return others unchanged."""
    return int(key) if isinstance(key, str) and key.isdecimal() else key
