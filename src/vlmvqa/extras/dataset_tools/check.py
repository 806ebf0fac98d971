"""Is a data set all there? What each split holds against what was published, and every record that cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.example import Example, count_questions
from vlmvqa.data.images import decode
from vlmvqa.errors import InputError
from vlmvqa.progress import bar

Read = Callable[[str, BadRecords], Sequence[Example]]


@dataclass(frozen=True)
class Published:
    """How large a split is by its publisher (None: not published)."""

    questions: int | None = None
    images: int | None = None


@dataclass(frozen=True)
class Found:
    """What a split holds.

    Attributes:
        problems: a sentence for each record or picture that cannot be used, or why the split cannot be read.
    """

    split: str
    published: Published
    questions: int = 0
    images: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """As large as published, and without a bad record."""
        expected = (self.published.questions, self.published.images)
        same = all(want in (None, have) for want, have in zip(expected, (self.questions, self.images), strict=True))
        return same and not self.problems


def check(read: Read, splits: Mapping[str, Published], pictures: bool, threads: int = 8) -> Iterator[Found]:
    """Each split in turn.

    Args:
        read: a split's examples; bad records go to the second argument.
        pictures: whether every picture is decoded, too: minutes, where counting takes seconds.
    """
    for split, published in splits.items():
        bad_records = BadRecords("skip")
        try:
            examples = read(split, bad_records)
        except InputError as error:
            yield Found(split, published, problems=[str(error)])
            continue
        problems = list(bad_records.seen)
        if pictures:
            problems += _unreadable(examples, split, threads)
        yield Found(split, published, count_questions(examples), len({e.image_id for e in examples}), problems)


def _unreadable(examples: Sequence[Example], split: str, threads: int) -> list[str]:
    """A sentence for each picture that cannot be decoded."""
    once = list({example.image_id: example for example in examples}.values())

    def problem(example: Example) -> str | None:
        try:
            decode(example.image, example.name)
        except InputError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(threads) as pool:  # JPEGs are decoded without Python's lock
        found = bar(pool.map(problem, once), doing=f"pictures of {split}", unit="images", total=len(once))
        return [sentence for sentence in found if sentence is not None]


def table(found: Sequence[Found]) -> str:
    """All splits as text."""
    lines = [f"{'split':<16}{'questions':>12}{'published':>12}{'images':>10}{'published':>12}{'problems':>10}"]
    for one in found:
        numbers = (one.questions, one.published.questions, one.images, one.published.images, len(one.problems))
        widths = (12, 12, 10, 12, 10)
        cells = (f"{'-' if n is None else f'{n:,}':>{width}}" for n, width in zip(numbers, widths, strict=True))
        lines.append(f"{one.split:<16}" + "".join(cells) + ("" if one.whole else "  not whole"))
    return "\n".join(lines)
