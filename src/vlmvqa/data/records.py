"""What the readers of official files share: JSON, what is wrong with a record, images with their questions."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.example import Example, Question
from vlmvqa.errors import InputError

Id = TypeVar("Id", int, str)
Kinds = Mapping[str, type | tuple[type, ...]]

WORDS = {int: "a whole number", str: "text", list: "a list", dict: "an object", bool: "true or false"}


# --- files --------------------------------------------------------------------------------------------


def refuse_missing(root: Path, files: Sequence[Path], images: Path, benchmark: str) -> None:
    """Stop unless all of a split's files and the folder of its images are there.

    Raises:
        InputError: it names what is missing, and what belongs there.
    """
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
    """The content of an official JSON file.

    Args:
        hooks: `object_hook` or `object_pairs_hook`, as `json.load` takes them: records in thousands are made small
            while they are parsed.

    Raises:
        InputError: it is no JSON (with line and column), no UTF-8, or cannot be read.
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
    """The sentence for a file that the system does not give."""
    return InputError(f"{path} cannot be read ({error.strerror}); fix the file or its permissions.")


def list_under(content: Any, key: str, path: Path, description: str) -> list[Any]:
    """The list under `key` of a file's content.

    Args:
        description: what the file should be, "VQAv2's official questions file".

    Raises:
        InputError: there is none, or it is empty.
    """
    records = content.get(key) if isinstance(content, dict) else None
    if not isinstance(records, list):
        raise InputError(f"{path} holds no list '{key}'; is it {description}?")
    if not records:
        raise InputError(f"{path}: its list '{key}' is empty; download the file again.")
    return records


# --- records ------------------------------------------------------------------------------------------


def find_problem(record: Any, kinds: Kinds) -> str | None:
    """What is wrong with the structure of a record out of JSON: a key it lacks, a value of another type."""
    if not isinstance(record, dict):
        return f"a JSON object was expected, not {json.dumps(record)[:40]}"
    for key, kind in kinds.items():
        if key not in record:
            return f"it has no '{key}'"
        wanted = kind if isinstance(kind, tuple) else (kind,)
        if type(record[key]) not in wanted:  # not isinstance: true is a whole number to it, and true is no id
            words = " or ".join(WORDS[one] for one in wanted)
            return f"its '{key}' should be {words}, not {json.dumps(record[key])[:40]}"
    return None


def find_question_problem(record: Any, kinds: Kinds) -> str | None:
    """The same for a record with a 'question', which must not be empty."""
    problem = find_problem(record, {**kinds, "question": str})
    return problem or (None if record["question"].strip() else "the question is empty")


def find_answers_problem(record: Mapping[str, Any], key: str = "answers") -> str | None:
    """The same for a list of texts, the most frequent of which is trained on."""
    problem = find_problem(record, {key: list})
    if problem:
        return problem
    if not record[key]:
        return f"its list of {key} is empty"
    if not all(isinstance(answer, str) for answer in record[key]):
        return f"one of its {key} is no text"
    return None if most_common(record[key]).strip() else "its answer is empty"


def most_common(answers: Sequence[str]) -> str:
    """The most frequent answer; of equally frequent ones the first."""
    return Counter(answers).most_common(1)[0][0]


class Prompts:
    """Questions in the task's template; equal ones are one string.

    Raises:
        InputError: the template has no place for the question.
    """

    def __init__(self, template: str) -> None:
        if "{question}" not in template:
            raise InputError(f"the prompt {template!r} has no {{question}}; put it where the question belongs.")
        self.before, self.after = template.split("{question}", 1)
        self.made: dict[str, str] = {}

    def __call__(self, text: str) -> str:
        return self.made.setdefault(text, self.before + text + self.after)


# --- images -------------------------------------------------------------------------------------------


def group_by_image(
    questions: Iterable[tuple[Id, Question]],
    path_of: Callable[[Id], Path],
    where: Path,
    split: str,
    bad_records: BadRecords,
    place_of: Callable[[int | str], str] = "question {}".format,
) -> list[Example]:
    """Examples in order of each image's first question.

    Args:
        questions: each with the id of its image.
        path_of: where the image with this id is.
        where: the file of the questions, for errors; `split` too.
        place_of: where in the file the question with this id is, for errors.

    Raises:
        InputError: an image is missing (as `bad_records` has it), or nothing is left.
    """
    by_image: dict[Id, list[Question]] = {}
    for image_id, question in questions:
        by_image.setdefault(image_id, []).append(question)
    paths = {image_id: path_of(image_id) for image_id in by_image}
    # One listing of a folder: on a network disk, asking for 82,783 files one by one takes minutes.
    present = {folder: _names(folder) for folder in {path.parent for path in paths.values()}}
    missing = {image_id for image_id, path in paths.items() if path.name not in present[path.parent]}
    examples = []
    for image_id, asked in by_image.items():
        if image_id not in missing:
            examples.append(Example(paths[image_id], image_id, tuple(asked)))
        else:
            bad_records.add(
                f"{where}, {place_of(asked[0].id)}",
                f"its image {paths[image_id]} is missing ({len(missing)} of the {len(by_image)} images are)",
                "download it",
            )
    return refuse_empty(examples, where, split)


def refuse_empty(examples: list[Example], where: Path | str, split: str) -> list[Example]:
    """The examples, unless there are none."""
    if not examples:
        raise InputError(f"{where}: no usable question is left in {split}; see the bad records' listing.")
    return examples


def _names(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in os.scandir(folder)}
    except (FileNotFoundError, NotADirectoryError):
        return set()
