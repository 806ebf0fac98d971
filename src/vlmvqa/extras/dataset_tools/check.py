"""Check a dataset: compare the size of each split with its published size and list every unusable record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

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
        published, found: numbers of "questions" and "images"; the published ones where there are any.
        problems: an error message for each unusable record or image, or for a split that cannot be read.
    """

    split: str
    published: Mapping[str, int]
    found: Mapping[str, int]
    problems: Sequence[str]

    @property
    def complete(self) -> bool:
        """Whether the split has its published size and no problems."""
        return not self.problems and {**self.found, **self.published} == self.found


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
            yield SplitCheck(split, published, {"questions": 0, "images": 0}, [str(error)])
            continue
        problems = list(bad_records.seen)
        images = {example.image_id: example for example in examples}
        if decode_images:
            with ThreadPoolExecutor(THREADS) as pool:  # JPEG decoding releases the GIL
                errors = pool.map(_decoding_error, images.values())
                problems += filter(None, bar(errors, doing=f"decoding {split}", unit="images", total=len(images)))
        found = {"questions": count_questions(examples), "images": len(images)}
        yield SplitCheck(split, published, found, problems)


def _decoding_error(example: Example) -> str:
    try:
        for image in example.named_images:
            decode(*image)
    except InputError as error:
        return str(error)
    return ""


def table(results: Sequence[SplitCheck]) -> str:
    """Return a table with one line per split."""
    lines = [f"{'split':<16}{'questions':>12}{'published':>12}{'images':>10}{'published':>12}{'problems':>10}"]
    for one in results:
        published = {name: f"{one.published[name]:,}" if name in one.published else "-" for name in one.found}
        sizes = f"{one.found['questions']:>12,}{published['questions']:>12}"
        sizes += f"{one.found['images']:>10,}{published['images']:>12}"
        lines.append(f"{one.split:<16}{sizes}{len(one.problems):>10,}{'' if one.complete else '  incomplete'}")
    return "\n".join(lines)
