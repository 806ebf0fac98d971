"""pycocoevalcap's Java tools: the official tokenizer, METEOR and SPICE, and a check that they are installed."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from vlmvqa.errors import InputError

Texts = Sequence[Sequence[str]]  # by image: the prediction, then the references
Scores = tuple[float, list[float]]  # of the dataset, and of each image

# Line breaks in Java. The tokenizer reads one caption per line, so a break inside a caption would shift later ones.
_LINE_BREAK = re.compile(r"[\n\r\x0b\x0c\x85\u2028\u2029]")
_SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
_SPICE_JAVA = 15  # newest version that SPICE's libraries support


def check(needed: Sequence[str]) -> None:
    """Raise an InputError if pycocoevalcap, Java, or a file that a tool needs is missing.

    Args:
        needed: the tools to run: "meteor", "spice", "tokenizer='java'".
    """
    if not needed:
        return
    tools = " and ".join(needed)
    package = importlib.util.find_spec("pycocoevalcap")
    if package is None or not package.submodule_search_locations:
        raise InputError(f"{tools} needs pycocoevalcap; install it with: pip install 'vlmvqa[captions]'")
    if shutil.which("java") is None:
        raise InputError(f"{tools} needs Java, and there is no `java` on the PATH; install a Java runtime (8 to 15).")
    if "spice" in needed:
        _check_spice(Path(package.submodule_search_locations[0]) / "spice" / "lib")


def _check_spice(folder: Path) -> None:
    output = subprocess.run(["java", "-version"], capture_output=True, text=True, check=False).stderr
    version = re.search(r'version "(?:1\.)?(\d+)', output)
    if version and int(version[1]) > _SPICE_JAVA:
        raise InputError(f"spice does not run on Java {version[1]}; put Java 8 to {_SPICE_JAVA} first on the PATH.")
    if missing := [name for name in _SPICE_JARS if not (folder / name).is_file()]:
        raise InputError(
            f"spice needs {' and '.join(missing)} in {folder}; download them with: "
            "python -m pycocoevalcap.spice.get_stanford_models"
        )


def tokenize(captions: Sequence[str]) -> list[str]:
    """Tokenize captions with Stanford's PTB tokenizer; tokens are separated by spaces."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    lines = {n: [{"caption": _LINE_BREAK.sub(" ", text)}] for n, text in enumerate(captions)}
    tokens = PTBTokenizer().tokenize(lines)
    if len(tokens) != len(captions):
        raise InputError(
            f"Java's tokenizer returned {len(tokens)} lines for {len(captions)} captions; use tokenizer='python'."
        )
    return [tokens[n][0] for n in range(len(captions))]


def meteor(texts: Texts) -> Scores:
    """Compute METEOR 1.5 of tokenized captions."""
    from pycocoevalcap.meteor.meteor import Meteor

    corpus, each = Meteor().compute_score(*_by_number(texts))
    return float(corpus), [float(score) for score in each]


def spice(texts: Texts) -> Scores:
    """Compute SPICE of tokenized captions."""
    from pycocoevalcap.spice.spice import Spice

    corpus, each = Spice().compute_score(*_by_number(texts))
    return float(corpus), [float(image["All"]["f"]) for image in each]


def _by_number(texts: Texts) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Return references and predictions in the scorers' format."""
    return {n: list(text[1:]) for n, text in enumerate(texts)}, {n: [text[0]] for n, text in enumerate(texts)}


SCORERS = {"meteor": meteor, "spice": spice}
