"""Words that the project's prose avoids, and the words to write instead.

Prose is found by the parser of its language: docstrings, messages and comments of Python files, comments of conf/, and
the sentences of README.md and docs/ outside their code.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

CODE = [path for folder in ("src", "launch", "evaluation", "bench") for path in sorted((ROOT / folder).rglob("*.py"))]
CONFIGS = sorted((ROOT / "conf").rglob("*.yaml"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# A banned phrase, and what to write instead.
BANNED = {
    r"besides?": "next to, with, also",
    r"whole(?!\s+numbers?\b)": "full, complete, entire, all of",
    r"anew": "again",
    r"mend(?:s|ed|ing)?": "fix, repair",
    r"go(?:es)?\s+on": "continue, resume",
    r"drawn": "generated (data), sampled, plotted",
    r"told": "given, set, passed",
}
BANNED_IN_CODE = BANNED | {r"asked\s+for": "requested, selected, configured"}

# Where a banned phrase is the right one.
ALLOWED: set[tuple[str, str]] = set()

# A text and the number of its first line.
Prose = tuple[int, str]


def texts(tree: ast.Module) -> Iterator[Prose]:
    """Yield docstrings, error messages, log lines and help: each string with a space in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value


def joined(comments: list[Prose]) -> Iterator[Prose]:
    """Join comments on consecutive lines, since a phrase may be broken over two."""
    block: list[str] = []
    for (line, text), (following, _) in pairwise([*comments, (-1, "")]):
        block.append(text)
        if following != line + 1:
            yield line - len(block) + 1, "\n".join(block)
            block = []


def python_comments(source: str) -> Iterator[Prose]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return joined([(one.start[0], one.string.lstrip("#")) for one in tokens if one.type == tokenize.COMMENT])


def yaml_comments(source: str) -> Iterator[Prose]:
    """Yield the comments of a YAML file: a `#` after a space begins one unless it is part of a value."""
    values = [
        (token.start_mark.index, token.end_mark.index)
        for token in yaml.scan(source)
        if isinstance(token, yaml.ScalarToken)
    ]
    comments = []
    start = 0
    for number, line in enumerate(source.splitlines(keepends=True), 1):
        for found in re.finditer(r"(?:^|(?<=\s))#", line):
            if not any(first <= start + found.start() < last for first, last in values):
                comments.append((number, line[found.end() :].rstrip("\n")))
                break
        start += len(line)
    return joined(comments)


def sentences(page: str) -> Iterator[Prose]:
    """Yield a page without code blocks, inline code and the targets of links; line numbers stay."""
    fenced = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
    code = re.compile(r"(`+).+?\1|(?<=\])\([^)\s]+\)", re.DOTALL)
    for pattern in (fenced, code):
        page = pattern.sub(lambda found: re.sub(r"[^\n]", "\0", found[0]), page)
    yield 1, page


def prose(path: Path) -> Iterator[Prose]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        yield from yaml_comments(text)
    elif path.suffix == ".md":
        yield from sentences(text)
    else:
        yield from texts(ast.parse(text))
        yield from python_comments(text)


def faults(path: Path, banned: dict[str, str]) -> list[str]:
    """Return 'file:line: word' for each banned phrase in the prose of a file."""
    name = path.relative_to(ROOT).as_posix()
    found = []
    for line, text in prose(path):
        for pattern, better in banned.items():
            for match in re.finditer(rf"\b(?:{pattern})\b", text, re.IGNORECASE):
                word = " ".join(match[0].split())
                if (name, word) not in ALLOWED:
                    at = line + text.count("\n", 0, match.start())
                    found.append(f"{name}:{at}: '{word}'; write {better}")
    return sorted(set(found))


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_code(path: Path) -> None:
    found = faults(path, BANNED_IN_CODE)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_comments_of_the_config(path: Path) -> None:
    found = faults(path, BANNED_IN_CODE)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_pages(path: Path) -> None:
    found = faults(path, BANNED)
    assert not found, "\n" + "\n".join(found)


def test_prose_is_found_with_its_line() -> None:
    code = '"""A whole\nmodule."""\nx = "whole"  # a name\n# asked\n# for\nraise ValueError(f"{x} goes on")\n'
    assert list(texts(ast.parse(code))) == [(1, "A whole\nmodule."), (6, " goes on")]
    assert list(python_comments(code)) == [(3, " a name\n asked\n for")]
    assert list(yaml_comments("# one\na: 'b # c' # two\n\nd: e#f\n# three\n")) == [(1, " one\n two"), (5, " three")]
    page = "A [whole](whole.md) `whole`.\n\n```bash\nwhole\n```\n"
    assert [text.count("whole") for _, text in sentences(page)] == [1]
