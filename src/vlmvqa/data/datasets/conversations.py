"""Conversations in the formats of LLaVA, The Cauldron and FineVision, from JSON, JSON lines or parquet.

    LLaVA        {"image": "1.jpg", "conversations": [{"from": "human", "value": "<image> What?"}, {"from": "gpt"...
    Cauldron     {"images": ["1.jpg"], "texts": [{"user": "What is it?", "assistant": "A cat.", "source": "vqav2"}]}
    FineVision   the same, with a list of ratings for each turn: {"relevance_ratings": [5, 2], ...}

A file per split in `data.root`: `train.json`, `train.jsonl`, or `train.parquet` (or `train-00000-of-00004.parquet`...).
Paths of images are relative to the file, or to `data.options.images`; parquet holds the images themselves. The images
come first, wherever a turn has `<image>`; a record without any is text only.

A conversation is one `Question`: its last turn, with the others as history. Training supervises every answer;
evaluation scores the last one, given the reference answers of the turns before it.

Sources: LLaVA's docs/Finetune_Custom_Data.md; the cards of HuggingFaceM4/the_cauldron and HuggingFaceM4/FineVision.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmvqa.data import records
from vlmvqa.data.datasets import jsonl
from vlmvqa.data.example import Example, ImageSource, NoImage, Question
from vlmvqa.data.splits import parse_split
from vlmvqa.errors import BadRecords, InputError

IMAGE = "<image>"
write_submission = jsonl.write_submission
Turn = tuple[str, str]  # of the user and of the assistant


def read(
    root: Path,
    split: str,
    *,
    prompt: str = "{question}\n",
    max_samples: int | None = None,
    bad_records: BadRecords | None = None,
    images: str | None = None,
    min_ratings: Mapping[str, int] | None = None,
) -> list[Example]:
    """Read the conversations of a split, in file order; their ids are the numbers of the records, from 0.

    Args:
        images: the folder of the images; None: that of the file.
        min_ratings: the least rating of a turn, by the name of its list (`relevance_ratings`); other turns, also those
            without a rating, are dropped.

    Other arguments and errors: see `datasets/__init__.py`.
    """
    template, bad_records, least = records.PromptTemplate(prompt), bad_records or BadRecords(), dict(min_ratings or {})
    folder = root if images is None else Path(images).expanduser()
    examples = []
    for number, where, record in _records(root, split, max_samples, bad_records):
        try:
            turns = [turn for n, turn in enumerate(_turns(record)) if _is_rated(record, n, least)]
            pictures = _pictures(record, folder)
        except ValueError as error:
            bad_records.add(where, str(error))
            continue
        except (KeyError, TypeError, AttributeError) as error:
            bad_records.add(where, f"it is in none of the known formats ({type(error).__name__}: {error})")
            continue
        if turns:  # all may be rated too low
            examples.append(_example(number, turns, pictures, template))
    return records.refuse_empty(examples, root, split)


def _example(
    number: int, turns: Sequence[Turn], pictures: Sequence[ImageSource], template: records.PromptTemplate
) -> Example:
    made = [Question(number, user, template(user), assistant, (assistant,)) for user, assistant in turns]
    question = Question(
        number, made[-1].text, made[-1].prompt, made[-1].target, made[-1].answers, history=tuple(made[:-1])
    )
    first, *others = pictures or [NoImage()]
    return Example(first, number, (question,), tuple(others))


# --- records ------------------------------------------------------------------------------------------


def _turns(record: Any) -> list[Turn]:
    """Return the turns of a record; raise a ValueError with what is wrong with it."""
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object was expected, not {json.dumps(record)[:40]}")
    if "conversations" in record:
        said = [(one["from"], one["value"]) for one in record["conversations"] or () if one.get("from") != "system"]
        if not said or [speaker for speaker, _ in said] != ["human", "gpt"] * (len(said) // 2):
            raise ValueError("its 'conversations' are not turns from human and gpt, one after the other")
        turns = [(said[n][1], said[n + 1][1]) for n in range(0, len(said), 2)]
    elif "texts" in record:
        turns = [(turn.get("user"), turn.get("assistant")) for turn in record["texts"] or ()]
    else:
        raise ValueError("it has neither 'conversations' (LLaVA) nor 'texts' (The Cauldron, FineVision)")
    if not turns or not all(
        isinstance(text, str) and text.replace(IMAGE, "").strip() for turn in turns for text in turn
    ):
        raise ValueError("a turn of the user or of the assistant is empty or no text")
    marks, given = sum(user.count(IMAGE) for user, _ in turns), len(_listed(record))
    if marks not in (0, given):
        raise ValueError(f"it has {given} images and {marks} times {IMAGE}")
    return [(user.replace(IMAGE, "").strip(), assistant.strip()) for user, assistant in turns]


def _is_rated(record: Mapping[str, Any], turn: int, least: Mapping[str, int]) -> bool:
    """Return whether each of a turn's ratings is at least the one in `least`."""
    for name, lowest in least.items():
        ratings = record.get(name) or ()
        if turn >= len(ratings) or ratings[turn] is None or ratings[turn] < lowest:
            return False
    return True


def _listed(record: Mapping[str, Any]) -> list[Any]:
    found = record.get("images") or record.get("image") or []
    return found if isinstance(found, list) else [found]


def _pictures(record: Mapping[str, Any], folder: Path) -> list[ImageSource]:
    """Return the images of a record, as paths or as the bytes of files."""
    found: list[ImageSource] = []
    for one in _listed(record):
        content = one.get("bytes") if isinstance(one, dict) else None
        if content is not None:
            found.append(content)
            continue
        path = one.get("path") if isinstance(one, dict) else one
        if not isinstance(path, str) or not (folder / path).is_file():
            raise ValueError(f"its image {folder / path if isinstance(path, str) else path} is missing")
        found.append(folder / path)
    return found


# --- files --------------------------------------------------------------------------------------------


def _records(
    root: Path, split: str, max_samples: int | None, bad_records: BadRecords
) -> Iterator[tuple[int, str, Any]]:
    """Yield number, place (for errors) and content of the records of a split."""
    if not root.is_dir():
        raise InputError(
            f"{root} is no folder; set data.root to a folder with train.json, train.jsonl or train.parquet"
        )
    name = split.partition("[")[0]
    if any(root.glob(f"{name}*.parquet")) or (root / name).is_dir():
        from vlmvqa.extras.hub.parquet import open_split

        table, numbers = open_split(str(root), None, split, False, max_samples)
        rows = table.rows(numbers, list(table.columns or ()))
        yield from ((n, f"{table.where}, row {n}", row) for n, row in zip(numbers, rows, strict=False))
        return
    paths: dict[str, Path] = {}
    for path in [*sorted(root.glob("*.json")), *sorted(root.glob("*.jsonl"))]:
        if paths.setdefault(path.stem, path) != path:
            raise InputError(f"{root} holds {paths[path.stem].name} and {path.name}, two files of one split; move one")
    if not paths:
        raise InputError(f"{root} holds no .json, .jsonl or .parquet file; put train.json there, or set data.root")
    selected = parse_split(split, list(paths), str(root), max_samples)
    path = paths[selected.name]
    if path.suffix == ".jsonl":
        content = list(_lines(path, bad_records))
    else:
        listed = records.load_json(path)
        if not isinstance(listed, list):
            raise InputError(f"{path} is no JSON list of conversations; write one, or a file of JSON lines")
        content = [(f"conversation {number}", record) for number, record in enumerate(listed)]
    for number in selected.indices(len(content), path, "conversations"):
        place, record = content[number]
        yield number, f"{path}, {place}", record


def _lines(path: Path, bad_records: BadRecords) -> Iterator[tuple[str, Any]]:
    """Yield place and content of the records of a file of JSON lines."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                if line.strip():
                    yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                bad_records.add(f"{path}, line {number}, column {error.colno}", f"broken JSON ({error.msg})")
