"""docs/troubleshooting.md quotes sentences that the code prints, word by word."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
QUOTED = re.findall(r"^> (`+)(.+)\1$", PAGE.read_text(), re.MULTILINE)
SENTENCES = [sentence for _, sentence in QUOTED]
CHANGES = "\0"  # what stands for a value in a sentence of the source


def templates(path: Path) -> set[str]:
    """The texts of a source file, with a mark where an f-string puts a value."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        if isinstance(node, ast.JoinedStr):
            found.add("".join(str(part.value) if isinstance(part, ast.Constant) else CHANGES for part in node.values))
    return found


@functools.cache
def source() -> list[str]:
    """The texts of all source files; read by the first test, since every worker imports this module."""
    files = [path for room in ("src", "launch", "evaluation") for path in (ROOT / room).rglob("*.py")]
    return [text for path in files for text in templates(path)]


def prints(text: str, sentence: str) -> bool:
    """Whether a text of the source makes the sentence: `<...>` stands for values, and for words about them."""
    pieces = re.split(r"<[^>]+>", sentence)
    if max(pieces, key=len) not in text:
        return False
    return bool(re.search("[^;]*?\0[^;]*?".join(map(re.escape, pieces)), text))


@pytest.mark.parametrize("sentence", SENTENCES)
def test_the_source_prints_it(sentence: str) -> None:
    assert any(prints(text, sentence) for text in source())


def test_sentences_are_quoted() -> None:
    assert len(SENTENCES) > 30 and len(SENTENCES) == PAGE.read_text().count("\n> ")
