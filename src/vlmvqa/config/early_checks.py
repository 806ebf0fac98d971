"""Check a script's settings without PyTorch: missing settings and paths, counts, types.

`usage.py` calls this before PyTorch is imported, `command_line.py` again for every job.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vlmvqa.config.trainer_arguments import problems
from vlmvqa.errors import InputError, suggest
from vlmvqa.paths import refuse_missing, refuse_missing_model

# The first word of prepare.py, which names the job.
PREPARE = ("download", "check", "pack", "features")
# Settings of each script that name saved models, and other files and folders.
MODELS = {
    "train": ("init_from",),
    "eval": ("checkpoint",),
    "predict": ("checkpoint",),
    "serve": ("checkpoint", "compare"),
    "merge": ("base", "adapter", "models"),
    "helm": ("checkpoint",),
}
PATHS = {"eval": ("predictions", "compare"), "serve": ("browse", "examples")}
# Scripts that read data.root, and the sources whose files must exist already (others are generated).
READS_DATA = ("train", "eval", "show", "merge", "helm", *(f"prepare {job}" for job in PREPARE if job != "download"))
FILES = ("coco_captions", "docvqa", "gqa", "jsonl", "vqav2")
# The least value of a whole number.
LEAST = {
    "samples": 0,
    "log_samples": 0,
    "attributions": 0,
    "workers": 0,
    "batch_size": 1,
    "max_instances": 1,
    "seed": 0,
}
NULLABLE = {"merge": ("samples",), "prepare": ("workers",)}


def refuse_mistakes(config: DictConfig, name: str) -> None:
    """Raise at the first mistake.

    Args:
        name: the script's; of prepare.py with its first word.

    Raises:
        InputError: what is wrong, and what to do.
    """
    script = name.split()[0]
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise InputError(f"{missing[0]} must be given; add {missing[0]}=... to the command")
    if script == "eval":
        _refuse_eval(config)
    if script == "merge" and not OmegaConf.is_list(config.models):
        raise InputError(f"models={config.models} should be a list: models=[runs/a,runs/b]")
    if script == "predict":
        read_questions(config)
    if script == "train":
        for sentence in problems(_resolved(config.trainer)):
            raise InputError(sentence)
    _refuse_counts(config, NULLABLE.get(script, ()))
    for key in MODELS.get(script, ()):
        for model in _listed(config[key]):
            refuse_missing_model(str(model))
    for key in PATHS.get(script, ()):
        for path in _listed(config[key]):
            refuse_missing(key, str(path))
    if name in READS_DATA and config.get("data") is not None:
        _refuse_missing_data(_resolved(config.data), "data")


def refuse_no_root(where: str, root: str | None, hub: str | None, packed: str | None) -> None:
    """Raise if a data set names no source to read it from."""
    if root is None and hub is None and packed is None:
        raise InputError(f"{where}.root must be given; add {where}.root=... to the command")


def read_questions(config: DictConfig) -> tuple[list[Path], list[str]]:
    """Return the images and the questions of predict.py's command line.

    Raises:
        InputError: there are none, or a file does not exist or cannot be read.
    """
    for image in config.image:
        refuse_missing("image", str(image))
    images = [path for image in config.image for path in _images(Path(image).expanduser())]
    questions = [*config.question, *_lines(config.questions)]
    if not images or not questions:
        raise InputError("nothing to ask: give image=... (a file or folder) and question=... or questions=... (a file)")
    return images, questions


def prepare_job(words: Sequence[str]) -> str:
    """Return the first word of prepare.py's command line, which names its job.

    Raises:
        InputError: it names none, or another word follows.
    """
    known, word = ", ".join(PREPARE), words[0] if words else ""
    if word not in PREPARE:
        said = f"unknown job '{word}'" if word and "=" not in word else "no job given"
        near = suggest(word, PREPARE) or "."
        raise InputError(f"prepare.py: {said}; its first word is one of {known}{near}")
    for before, after in pairwise(words):
        if "=" not in after and not after.startswith("-") and not before.startswith("-"):
            raise InputError(f"prepare.py {word}: '{after}' is no setting; give settings as key=value")
    return word


def _refuse_eval(config: DictConfig) -> None:
    given = [name for name in ("checkpoint", "predictions", "compare") if config[name] is not None]
    if len(given) != 1:
        raise InputError(
            "say what to score: checkpoint=... (a trained model), predictions=... (a file of answers), or "
            f"compare=[...,...] (two results); {' and '.join(given) + ' are given' if given else 'none is given'}"
        )
    if given == ["compare"] and len(_listed(config.compare)) != 2:
        shown = _listed(config.compare)
        raise InputError(f"compare={shown} should name two folders of results: compare=[runs/a,runs/b]")
    if given != ["compare"] and config.get("data") is None:
        raise InputError("data=... must be given, the name of a file in conf/data: data=shapes, data=vqav2...")


def _refuse_counts(config: DictConfig, nullable: Sequence[str]) -> None:
    for key, least in LEAST.items():
        if key not in config or (config[key] is None and key in nullable):
            continue
        if type(config[key]) is not int or config[key] < least:
            raise InputError(f"{key}={config[key]} should be a whole number, at least {least}")


def _refuse_missing_data(data: dict[str, Any], where: str) -> None:
    """Raise if a data set's files are read from a folder that does not exist."""
    for name, part in (data.get("parts") or {}).items():
        _refuse_missing_data(part, f"{where}.parts.{name}")
    if data.get("source") not in FILES:
        return
    root, hub, packed = (data.get(key) for key in ("root", "hub", "shards"))
    refuse_no_root(where, root, hub, packed)
    if root is not None and hub is None and packed is None and not data.get("synthetic"):
        refuse_missing(f"{where}.root", str(root))


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


def _listed(value: Any) -> list[Any]:
    """Return a setting as a list; null is an empty one."""
    if value is None:
        return []
    return list(value) if OmegaConf.is_list(value) else [value]


def _resolved(node: DictConfig) -> dict[str, Any]:
    found = OmegaConf.to_container(node, resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}
