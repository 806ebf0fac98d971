"""The controls: the most frequent answers, and the same questions about other images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmvqa.data.example import Example, NoImage, Question
from vlmvqa.errors import InputError
from vlmvqa.inference.baselines import blank_images, prior_answers, shuffle_images


def example(image: int, *questions: tuple[str | None, str | None]) -> Example:
    """Return an example of `image` with questions given as (question type, target)."""
    return Example(
        image=Path(f"{image}.jpg"),
        image_id=image,
        questions=tuple(
            Question(id=f"{image}/{number}", text="?", prompt="?", target=target, question_type=kind)
            for number, (kind, target) in enumerate(questions)
        ),
    )


TRAIN = [
    example(1, ("is the", "yes"), ("is the", "yes"), ("how many", "2")),
    example(2, ("is the", "no"), ("how many", "3"), ("how many", "2"), (None, "yes")),
    example(3, ("what", None)),
]


def test_prior_is_the_most_frequent_answer_of_the_question_type() -> None:
    answers = prior_answers(TRAIN, [example(9, ("how many", None), ("is the", "no"))])
    assert answers == {"9/0": "2", "9/1": "yes"}


def test_prior_of_an_unseen_or_missing_type_is_the_most_frequent_answer_overall() -> None:
    assert prior_answers(TRAIN, [example(9, ("what", None), (None, None))]) == {"9/0": "yes", "9/1": "yes"}


def test_equally_frequent_answers_are_told_apart_by_the_alphabet() -> None:
    train = [example(1, ("what", "red")), example(2, ("what", "blue"))]
    for order in (train, train[::-1]):
        assert prior_answers(order, [example(9, ("what", None))]) == {"9/0": "blue"}


def test_prior_without_a_training_answer_is_an_error() -> None:
    with pytest.raises(InputError, match="No training question has an answer"):
        prior_answers([example(1, ("what", None))], TRAIN)


def test_every_image_gives_way_to_another_and_the_questions_stay() -> None:
    examples = [example(image, ("what", "red")) for image in range(20)]
    shuffled = shuffle_images(examples, seed=3)
    assert shuffled is not None
    assert [other.questions for other in shuffled] == [own.questions for own in examples]
    assert all(
        other.image_id != own.image_id and other.image != own.image
        for own, other in zip(examples, shuffled, strict=True)
    )
    assert all(other.image == Path(f"{other.image_id}.jpg") for other in shuffled)
    assert sorted(other.image_id for other in shuffled) == list(range(20))


def test_images_that_are_asked_about_together_move_together() -> None:
    examples = [replace(example(n, ("same", "no")), more_images=(Path(f"more-{n}.jpg"),)) for n in range(5)]
    shuffled = shuffle_images(examples, seed=0)
    assert shuffled is not None and all(one.more_images == (Path(f"more-{one.image_id}.jpg"),) for one in shuffled)
    assert [len(one.named_images) for one in blank_images(examples)] == [2] * 5
    assert not any(isinstance(one, Path) for two in blank_images(examples) for one, _ in two.named_images)


def test_text_only_questions_stay_and_images_are_exchanged_with_as_many() -> None:
    """So that a control changes what is shown, not the form of the input."""
    single = [example(n, ("what", "red")) for n in range(3)]
    pairs = [replace(example(n, ("same", "no")), more_images=(Path(f"more-{n}.jpg"),)) for n in range(3, 6)]
    text = replace(example(6, ("why", "so")), image=NoImage())
    given = [text, *single, *pairs]
    shuffled = shuffle_images(given, seed=0)
    assert shuffled is not None and shuffled[0] == text and blank_images(given)[0] == text
    for own, other in zip(given[1:], shuffled[1:], strict=True):
        assert other.image_id != own.image_id and len(other.named_images) == len(own.named_images)
    assert shuffle_images([text, single[0], pairs[0]], seed=0) is None


def test_shuffle_follows_the_seed() -> None:
    examples = [example(image, ("what", "red")) for image in range(20)]
    assert shuffle_images(examples, seed=3) == shuffle_images(examples, seed=3)
    assert shuffle_images(examples, seed=3) != shuffle_images(examples, seed=4)


@given(st.lists(st.integers(0, 5), max_size=12), st.integers(0, 10))
def test_an_image_that_comes_twice_is_never_shown_for_itself(images: list[int], seed: int) -> None:
    shuffled = shuffle_images([example(image, ("what", "red")) for image in images], seed)
    if len(set(images)) < 2:
        assert shuffled is None
    else:
        assert shuffled is not None
        assert all(own != other.image_id for own, other in zip(images, shuffled, strict=True))
