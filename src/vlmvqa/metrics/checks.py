"""What every metric checks of its input before it counts anything: options, ids, and that answers are text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from vlmvqa.errors import InputError, suggest

Id = TypeVar("Id", bound=int | str)


def check_option(option: str, name: str, known: Iterable[str]) -> None:
    """Refuse a `name` that is not among those known for the `option`."""
    if name not in known:
        raise InputError(f"{option}={name!r} is unknown{suggest(name, known)}; use one of {', '.join(known)}.")


def check_answers(predictions: Mapping[Id, str], references: Mapping[Id, Sequence[str]]) -> None:
    """Refuse anything but one text and a list of at least one text for each of the same ids."""
    if not references:
        raise InputError("There are no reference answers to score against; use a split that has answers.")
    check_ids("prediction", predictions, references, exactly=True)
    if wrong := [question for question, answers in references.items() if not _is_list_of_text(answers)]:
        raise InputError(
            f"{len(wrong)} of {len(references)} questions have no list of reference answers ({few(wrong)}); "
            "give each a list of at least one string."
        )
    check_text(predictions)


def check_text(predictions: Mapping[Id, str]) -> None:
    """Refuse predictions that are not strings."""
    if wrong := [question for question, answer in predictions.items() if not isinstance(answer, str)]:
        raise InputError(f"{len(wrong)} of {len(predictions)} predictions are not text ({few(wrong)}); give strings.")


def _is_list_of_text(answers: object) -> bool:
    """A bare string is a sequence of strings too, and would quietly count as so many one-letter answers."""
    return (
        isinstance(answers, Sequence)
        and not isinstance(answers, str)
        and len(answers) > 0
        and all(isinstance(answer, str) for answer in answers)
    )


def check_ids(
    what: str, given: Mapping[Id, object] | None, references: Mapping[Id, object], exactly: bool = False
) -> None:
    """Each question with references must have its `what`; `exactly` also forbids any others."""
    if given is None:
        return
    missing = [question for question in references if question not in given]
    extra = [question for question in given if question not in references] if exactly else []
    if not missing and not extra:
        return
    problems = [f"{len(missing)} of {len(references)} questions have no {what} ({few(missing)})"] * bool(missing)
    problems += [f"{len(extra)} of {len(given)} {what}s have no reference answers ({few(extra)})"] * bool(extra)
    raise InputError(f"{' and '.join(problems)}; score exactly the questions of one split, with ids of the same kind.")


def few(ids: Sequence[object]) -> str:
    """The first three, as an error names them."""
    return ", ".join(map(repr, ids[:3])) + (", ..." if len(ids) > 3 else "")
