"""Serve a trained model: its config, the models, the browsed run and the example images."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from PIL import Image

from vlmvqa.config.inference_schema import override_decoding
from vlmvqa.config.schema import RunSettings
from vlmvqa.data.example import Example, ImageSource
from vlmvqa.data.tasks import data_settings, read_examples
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.extras.serving import browse, uploads
from vlmvqa.extras.serving.limits import Limits, RequestError
from vlmvqa.extras.serving.server import Address, check_packages, listen, serve
from vlmvqa.inference.predictor import Predictor, load
from vlmvqa.models.interface import GenerationSettings

EXAMPLES = 6  # images of the browsed run, when no examples are given


@dataclass(frozen=True)
class ServeConfig:
    """Config of launch/serve.py; conf/serve.yaml documents its keys."""

    run: RunSettings
    checkpoint: str
    decoding: GenerationSettings
    limits: Limits
    compare: str | None = None
    browse: str | None = None
    examples: str | Sequence[str] = ()
    dtype: str = "auto"
    host: str = "127.0.0.1"
    port: int = 7860
    token: str | None = None
    open: bool = False
    given: frozenset[str] = frozenset()


def serve_model(config: ServeConfig) -> None:
    """Serve the page and the API until Ctrl-C."""
    check_packages()
    token = None if config.token is None else str(config.token)
    address = Address(str(config.host), config.port, token, config.open)
    run, images = _browsed(config)
    examples = _accepted(_read(config.examples) or images, config.limits)
    with listen(address) as listener:  # before a model is loaded, which may take minutes
        serve(_models(config), run, examples, address, config.limits, config.run.folder, listener)


def _models(config: ServeConfig) -> dict[str, Predictor]:
    names = [str(path) for path in (config.checkpoint, config.compare) if path is not None]
    if len(set(names)) < len(names):
        raise InputError(f"compare={names[1]} is the checkpoint itself; name another")
    models = {path: load(path, dtype=config.dtype) for path in names}
    for predictor in models.values():
        predictor.decoding = override_decoding(predictor.decoding, config.decoding, config.given)
    return models


def _browsed(config: ServeConfig) -> tuple[browse.Run | None, list[bytes]]:
    """Return the run to browse, and some of its images."""
    if config.browse is None:
        folder = Path(config.checkpoint).expanduser()
        if not (folder / "metrics.json").is_file():
            return None, []
    else:
        folder = Path(config.browse).expanduser()
    run = browse.read(folder)
    try:
        examples = _examples(folder)
    except InputError as error:
        print(f"{folder} is browsed without images: {error}")
        return run, []
    images: dict[int | str, ImageSource] = {example.image_id: example.image for example in examples}
    contents = [_content(image) for image in list(images.values())[:EXAMPLES]]
    return replace(run, images=images), [content for content in contents if content is not None]


def _examples(folder: Path) -> list[Example]:
    """Read the examples that a scored run was evaluated on.

    Raises:
        InputError: its config or its data does not exist.
    """
    run = folder if (folder / "config.yaml").is_file() else folder.parent  # each task of a mixture has its own folder
    if not (run / "config.yaml").is_file():
        raise InputError(f"{folder} has no config.yaml")
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    data = data_settings(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["data"])
    if run != folder:
        data = data.tasks[folder.name]
    if data.hub is None and data.shards is None and not Path(data.root or "").expanduser().is_dir():
        raise InputError(f"{data.root} does not exist")  # synthetic data is not generated for this
    return read_examples(data, metrics["split"], metrics["max_samples"], BadRecords("skip"))


def _content(image: ImageSource) -> bytes | None:
    """Return the bytes of an image file; None if it is no file, or cannot be read."""
    if isinstance(image, Image.Image):
        return None
    try:
        return image if isinstance(image, bytes) else image.read_bytes()
    except OSError:
        return None


def _read(given: str | Iterable[str]) -> list[bytes]:
    """Read the images of files and folders."""
    found: list[bytes] = []
    for path in (Path(one).expanduser() for one in ([given] if isinstance(given, str) else given)):
        try:
            files = sorted(path.iterdir()) if path.is_dir() else [path]
            found += [file.read_bytes() for file in files if file.suffix.lower() in Image.registered_extensions()]
        except OSError as error:
            raise InputError(f"examples={path} cannot be read ({error.strerror}); correct the path") from None
    return found


def _accepted(contents: Iterable[bytes], limits: Limits) -> list[bytes]:
    """Return the images within the limits: the page uploads an example like any other image."""
    kept = []
    for content in contents:
        try:
            uploads.decode(content, limits)
        except RequestError as error:
            print(f"an example is skipped: {error.message}")
        else:
            kept.append(content)
    return kept
