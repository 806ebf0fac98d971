"""Checks of the command lines of eval.py and predict.py, without PyTorch, so that mistakes are reported at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmvqa.config.early_checks import listed
from vlmvqa.errors import InputError
from vlmvqa.paths import refuse_missing


def read_questions(
    image: Sequence[str], question: Sequence[str], questions: str | None
) -> tuple[list[Path], list[str]]:
    """Return the images and the questions of predict.py's command line.

    Args:
        image: files and folders.
        question: questions.
        questions: a file with one question a line.

    Raises:
        InputError: there are none, or a file does not exist or cannot be read.
    """
    for path in image:
        refuse_missing("image", str(path))
    images = [file for path in image for file in _images(Path(path).expanduser())]
    asked = [*map(str, question), *_lines(questions)]
    if not images or not asked:
        raise InputError("nothing to ask: give image=... (a file or folder) and question=... or questions=... (a file)")
    return images, asked


def _images(path: Path) -> list[Path]:
    """Return the image files of a folder; a file is returned as it is."""
    if not path.is_dir():
        return [path]
    from PIL import Image

    endings = Image.registered_extensions()
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in endings)
    if not found:
        raise InputError(f"{path} holds no image files")
    return found


def _lines(path: str | None) -> Iterator[str]:
    if path is None:
        return
    refuse_missing("questions", str(path))
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"questions={path} cannot be read as text, one question a line ({error})") from error
    yield from (line.strip() for line in lines if line.strip())


def refuse_eval(values: Mapping[str, Any]) -> None:
    """Raise unless eval.py's values name one thing to score.

    Raises:
        InputError: nothing is named, several things, or no data.
    """
    given = [name for name in ("checkpoint", "predictions", "compare") if values[name] is not None]
    if len(given) != 1:
        raise InputError(
            "choose what to score: checkpoint=... (a trained model), predictions=... (a file of answers), or "
            f"compare=[...,...] (two results); {' and '.join(given) + ' are given' if given else 'none is given'}"
        )
    if given == ["compare"] and len(listed(values["compare"])) != 2:
        shown = listed(values["compare"])
        raise InputError(f"compare={shown} should name two folders of results: compare=[runs/a,runs/b]")
    if given != ["compare"] and values.get("data") is None:
        raise InputError("data=... must be given, the name of a file in conf/data: data=shapes, data=vqav2...")
