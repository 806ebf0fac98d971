"""The images and questions of predict.py's command line, read without PyTorch: mistakes are reported at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

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
