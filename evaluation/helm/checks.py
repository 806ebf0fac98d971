"""Checks before a HELM run, for errors that HELM would raise only after half an hour of answers."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vlmvqa.data import images
from vlmvqa.data.example import Example
from vlmvqa.errors import InputError
from vlmvqa.extras.vision.several_images import refuse_several_images
from vlmvqa.paths import replace_file
from vlmvqa.ranks import bar

HELM = "0.5.16"
PUNKT = "tokenizers/punkt_tab/english"
PUNKT_FILES = ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab")


def refuse_missing_helm() -> None:
    """Raise without the supported version of crfm-helm, or without the package that its CIDEr imports."""
    for package, wanted in (("crfm-helm", HELM), ("pycocoevalcap", None)):
        try:
            found = version(package)
        except PackageNotFoundError:
            raise InputError(f"{package} is not installed; install it with: pip install 'vlmvqa[helm]'") from None
        if wanted and found != wanted:
            raise InputError(f"{package} {found} is installed, {wanted} is needed; pip install 'vlmvqa[helm]'")


def use_punkt(punkt: str, home: Path) -> None:
    """Check that nltk can tokenize words; without its model HELM fails after all answers are generated.

    Raises:
        InputError: nltk's sentence model is not installed.
    """
    if punkt not in ("nltk", "stand_in"):
        raise InputError(f"punkt={punkt} is unknown; use nltk or stand_in")
    import nltk

    if punkt == "stand_in":
        for name in PUNKT_FILES:
            replace_file(home / "nltk_data" / PUNKT / name, "")
        nltk.data.path.insert(0, str((home / "nltk_data").resolve()))
    try:
        nltk.word_tokenize("One. Two.")
    except (LookupError, OSError):
        raise InputError(
            "nltk's punkt_tab, which HELM cuts answers into words with, is not installed; fetch it once with: "
            "python -m nltk.downloader punkt_tab; or, without a network, add punkt=stand_in, which differs only for "
            "answers with a full stop inside (abbreviations count as ends of sentences)"
        ) from None


def refuse_bad_images(examples: Sequence[Example]) -> None:
    """Raise at an image that is missing or damaged; HELM would, after half an hour of answers."""
    refuse_several_images(examples, "HELM's scenario")

    def check(example: Example) -> None:
        images.decode(example.image, example.name)

    with ThreadPoolExecutor() as threads:
        found = threads.map(check, examples)
        for _ in bar(found, doing="checking the images", unit="images", total=len(examples)):
            pass
