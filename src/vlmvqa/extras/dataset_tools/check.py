"""Check a dataset: compare the size of each split with its published size and list every unusable record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from vlmvqa.data.example import Example, count_questions
from vlmvqa.data.images import decode
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.ranks import bar

Read = Callable[[str, BadRecords], Sequence[Example]]
THREADS = 8


@dataclass(frozen=True)
class SplitCheck:
    """The result for a split.

    Attributes:
        published: "questions" and "images" of the split, where they are published.
        problems: an error message for each unusable record or image, or for a split that cannot be read.
    """

    split: str
    published: Mapping[str, int]
    questions: int = 0
    images: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether the split has its published size and no problems."""
        found = {"questions": self.questions, "images": self.images}
        return not self.problems and all(found[name] == number for name, number in self.published.items())


def check(read: Read, splits: Mapping[str, Mapping[str, int]], decode_images: bool) -> Iterator[SplitCheck]:
    """Check each split.

    Args:
        read: returns the examples of a split and adds bad records to its second argument.
        splits: the published sizes by split.
        decode_images: whether to decode every image too, which takes minutes instead of seconds.
    """
    for split, published in splits.items():
        bad_records = BadRecords("skip")
        try:
            examples = read(split, bad_records)
        except InputError as error:
            yield SplitCheck(split, published, problems=[str(error)])
            continue
        problems = list(bad_records.seen)
        images = list({example.image_id: example for example in examples}.values())
        if decode_images:
            problems += _decoding_errors(images, split)
        yield SplitCheck(split, published, count_questions(examples), len(images), problems)


def _decoding_errors(images: Sequence[Example], split: str) -> list[str]:
    """Return an error message for each image that cannot be decoded."""
    bad_records = BadRecords("skip")

    def check_image(example: Example) -> None:
        try:
            decode(example.image, example.name)
        except InputError as error:
            bad_records.add_error(error)

    with ThreadPoolExecutor(THREADS) as pool:  # JPEG decoding releases the GIL
        list(bar(pool.map(check_image, images), doing=f"decoding {split}", unit="images", total=len(images)))
    return bad_records.seen


def table(results: Sequence[SplitCheck]) -> str:
    """Return a table with one line per split."""
    lines = [f"{'split':<16}{'questions':>12}{'published':>12}{'images':>10}{'published':>12}{'problems':>10}"]
    for result in results:
        published = result.published
        expected = published.get("questions"), published.get("images")
        numbers = (result.questions, expected[0], result.images, expected[1], len(result.problems))
        widths = (12, 12, 10, 12, 10)
        cells = (f"{'-' if n is None else f'{n:,}':>{width}}" for n, width in zip(numbers, widths, strict=True))
        lines.append(f"{result.split:<16}" + "".join(cells) + ("" if result.complete else "  incomplete"))
    return "\n".join(lines)
