"""What pycocoevalcap runs in Java: the official tokenizer, METEOR and SPICE. Looked for before anything runs."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from vlmvqa.errors import InputError

# What Java takes for the end of a line: the tokenizer reads a caption a line, so one inside shifts all later captions.
_LINE_BREAK = re.compile(r"[\n\r\x0b\x0c\x85\u2028\u2029]")
_SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
_SPICE_JAVA = 15  # the newest that SPICE's libraries run on


def check(needed: Sequence[str]) -> None:
    """Refuse to begin what would stop halfway.

    Args:
        needed: of "meteor", "spice" and "tokenizer='java'", what is to run.

    Raises:
        InputError: pycocoevalcap, Java, or what SPICE downloads is missing.
    """
    if not needed:
        return
    wanted = " and ".join(needed)
    found = importlib.util.find_spec("pycocoevalcap")
    if found is None or not found.submodule_search_locations:
        raise InputError(f"{wanted} needs pycocoevalcap; install it with: pip install 'vlmvqa[captions]'")
    if shutil.which("java") is None:
        raise InputError(f"{wanted} needs Java, and there is no `java` on the PATH; install a Java runtime (8 to 15).")
    if "spice" in needed:
        _check_spice(Path(found.submodule_search_locations[0]) / "spice" / "lib")


def _check_spice(folder: Path) -> None:
    said = subprocess.run(["java", "-version"], capture_output=True, text=True, check=False).stderr
    version = re.search(r'version "(?:1\.)?(\d+)', said)
    if version and int(version[1]) > _SPICE_JAVA:
        raise InputError(
            f"spice does not run on Java {version[1]}; put a Java of 8 to {_SPICE_JAVA} first on the PATH."
        )
    if missing := [name for name in _SPICE_JARS if not (folder / name).is_file()]:
        raise InputError(
            f"spice needs {' and '.join(missing)} in {folder}; fetch them once, with a network, with: "
            "python -m pycocoevalcap.spice.get_stanford_models"
        )


def tokenize(captions: Sequence[str]) -> list[str]:
    """The tokens of each caption with spaces between, as Stanford's PTB tokenizer gives them."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    lines = {n: [{"caption": _LINE_BREAK.sub(" ", text)}] for n, text in enumerate(captions)}
    found = PTBTokenizer().tokenize(lines)
    if len(found) != len(captions):
        raise InputError(
            f"Java's tokenizer gave {len(found)} lines for {len(captions)} captions; use tokenizer='python'."
        )
    return [found[n][0] for n in range(len(captions))]


def _meteor(texts: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """METEOR 1.5 of tokenized captions, `texts[i]` being an image's prediction and then its references."""
    from pycocoevalcap.meteor.meteor import Meteor

    corpus, each = Meteor().compute_score(*_by_number(texts))
    return float(corpus), [float(score) for score in each]


def _spice(texts: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """SPICE of tokenized captions, `texts[i]` being an image's prediction and then its references."""
    from pycocoevalcap.spice.spice import Spice

    corpus, each = Spice().compute_score(*_by_number(texts))
    return float(corpus), [float(image["All"]["f"]) for image in each]


def _by_number(texts: Sequence[Sequence[str]]) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """References and predictions as the scorers take them."""
    return {n: list(text[1:]) for n, text in enumerate(texts)}, {n: [text[0]] for n, text in enumerate(texts)}


SCORERS: dict[str, Callable[[Sequence[Sequence[str]]], tuple[float, list[float]]]] = {
    "meteor": _meteor,
    "spice": _spice,
}
