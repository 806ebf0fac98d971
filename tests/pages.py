"""The code blocks of README.md and docs/: what each is, and who runs it.

A block's language and the line above it say what happens to it:

    bash                              its commands are run as they stand, but for fewer pictures and steps
    python                            it is run
    json, yaml                        it is read
    text                              what is printed, or a drawing: nothing to run
    From `src/...`:                   above python: an excerpt, which stands in that file word by word
    New file `...`:, Change `...`:    a worked example's: it is written, or applied, and the commands after it are run
    *Needs ....*                      it cannot run on any machine; where weights or a data set are all that is missing,
                                      the tests run it on tiny models of the same classes and on drawn data
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = ("bash", "python", "json", "yaml", "diff", "text")
# What the tests put something small in the place of.
STAND_INS = (
    *("Gemma 2's weights", "VQAv2", "DocVQA", "GQA", "COCO captions", "TextVQA", "your own images"),
    *("a GPU of 80 GB", "a GPU of 24 GB"),  # for the size of the weights alone
)
SCRIPT = re.compile(r"launch/(\w+)\.(?:py|slurm)|^vlmvqa (helm) ")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, its language, its text, and the last line above it that is not empty."""

    page: Path
    line: int
    language: str
    text: str
    above: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}, line {self.line}"

    @property
    def needs(self) -> str | None:
        """What a machine lacks that cannot run it."""
        found = re.fullmatch(r"\*Needs (.+)\.\*", self.above)
        return found[1] if found else None

    @property
    def lacks(self) -> list[str]:
        """The same, one by one."""
        return re.split(r",? and |, ", self.needs) if self.needs else []

    @property
    def can_be_run(self) -> bool:
        """Whether it can be run here: with what the tests have instead, if need be."""
        return all(what in STAND_INS for what in self.lacks)

    @property
    def excerpt_of(self) -> str | None:
        """The source file that it is an excerpt of."""
        found = re.search(r"From `(\S+)`:$", self.above)
        return found[1] if found else None

    @property
    def written_to(self) -> str | None:
        """The file that a worked example makes of it, or changes by it."""
        found = re.fullmatch(r"(?:New file|Change) `(\S+)`:", self.above)
        return found[1] if found else None

    @property
    def commands(self) -> list[str]:
        """Lines of bash: continued ones joined, without remarks."""
        lines = re.sub(r" *\\\n *", " ", self.text).splitlines()
        return [line for line in (re.split(r"(?:^| )#", line)[0].strip() for line in lines) if line]


def blocks(page: Path) -> Iterator[Block]:
    lines, above, number = page.read_text().splitlines(), "", 0
    while number < len(lines):
        line = lines[number]
        if line.startswith("```"):
            end = lines.index("```", number + 1)
            yield Block(page, number + 1, line[3:], "\n".join(lines[number + 1 : end]), above)
            number, above = end, ""
        elif line.strip():
            above = line
        number += 1


def commands(page: Path) -> list[str]:
    """Those of launch/ and evaluation/."""
    return [
        line for block in blocks(page) if block.language == "bash" for line in block.commands if SCRIPT.search(line)
    ]


def script(command: str) -> str:
    """The name of a command's script: train, eval, helm..."""
    found = SCRIPT.search(command)
    assert found, command
    return found[1] or found[2]
