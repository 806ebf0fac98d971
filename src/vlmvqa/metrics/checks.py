"""Input checks shared by all metrics: options, ids, and the types of answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from vlmvqa.errors import InputError, suggest

Id = TypeVar("Id", bound=int | str)


def check_option(option: str, name: str, known: Iterable[str]) -> None:
    """Raise an error unless `name` is a known value of the option."""
    if name not in known:
        raise InputError(f"{option}={name!r} is unknown{suggest(name, known)}; use one of {', '.join(known)}.")


def check_answers(predictions: Mapping[Id, str], references: Mapping[Id, Sequence[str]]) -> None:
    """Check that each question has one prediction (a string) and a non-empty list of references (strings).

    Raises:
        InputError: the ids differ, or a value has the wrong type.
    """
    if not references:
        raise InputError("There are no reference answers to score against; use a split that has answers.")
    check_ids("prediction", predictions, references, exactly=True)
    if wrong := [question for question, answers in references.items() if not _is_list_of_text(answers)]:
        raise InputError(
            f"{len(wrong)} of {len(references)} questions have no list of reference answers ({first_ids(wrong)}); "
            "give each a list of at least one string."
        )
    check_text(predictions)


def check_text(predictions: Mapping[Id, str]) -> None:
    """Raise an error unless all predictions are strings."""
    if wrong := [question for question, answer in predictions.items() if not isinstance(answer, str)]:
        raise InputError(
            f"{len(wrong)} of {len(predictions)} predictions are not text ({first_ids(wrong)}); give strings."
        )


def _is_list_of_text(answers: object) -> bool:
    return (
        isinstance(answers, Sequence)
        and not isinstance(answers, str)  # a string is a sequence of one-letter strings too
        and len(answers) > 0
        and all(isinstance(answer, str) for answer in answers)
    )


def check_ids(
    noun: str, given: Mapping[Id, object] | None, references: Mapping[Id, object], exactly: bool = False
) -> None:
    """Check that each question with references has a value in `given`.

    Args:
        noun: name of the values, for error messages.
        given: values by question id; None is not checked.
        references: references by question id.
        exactly: whether `given` must have no other ids.

    Raises:
        InputError: an id is missing or unexpected.
    """
    if given is None:
        return
    missing = [question for question in references if question not in given]
    extra = [question for question in given if question not in references] if exactly else []
    if not missing and not extra:
        return
    problems = [f"{len(missing)} of {len(references)} questions have no {noun} ({first_ids(missing)})"] * bool(missing)
    problems += [f"{len(extra)} of {len(given)} {noun}s have no reference answers ({first_ids(extra)})"] * bool(extra)
    raise InputError(f"{' and '.join(problems)}; score exactly the questions of one split, with ids of the same kind.")


def first_ids(ids: Sequence[object]) -> str:
    """Format the first three ids for an error message."""
    return ", ".join(map(repr, ids[:3])) + (", ..." if len(ids) > 3 else "")
