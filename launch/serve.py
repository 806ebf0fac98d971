"""A page to try a trained model, and an HTTP API beside it, until Ctrl-C.

python launch/serve.py checkpoint=runs/demo
python launch/serve.py checkpoint=runs/demo compare=runs/other examples=photos port=8000
"""

from __future__ import annotations

import usage  # noqa: F401 - first: it answers -h without PyTorch

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from PIL import Image

import from_config
from vlmvqa.cli import group, leave, run
from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.example import Example, ImageSource
from vlmvqa.data.tasks import data_settings, read_examples
from vlmvqa.errors import InputError
from vlmvqa.extras.serving import browse, uploads
from vlmvqa.extras.serving.limits import Limits, Refused
from vlmvqa.extras.serving.server import Address, Served, listen, refuse_missing, serve
from vlmvqa.inference.predictor import Predictor, load
from vlmvqa.settings import build_settings

EXAMPLES = 6  # of a run's pictures, where none are given


def main(config: DictConfig) -> None:
    refuse_missing()
    limits = build_settings(Limits, group(config, "limits"), "limits")
    token = None if config.token is None else str(config.token)
    address = Address(str(config.host), config.port, token, config.open)
    opened, pictures = _browsed(config)
    examples = _shown(_read(config.examples) or pictures, limits)
    with listen(address) as taken:  # before a model is loaded, which may take minutes
        served = Served(_models(config), opened, examples)
        serve(served, address, limits, from_config.run_folder(config), taken)


def _models(config: DictConfig) -> dict[str, Predictor]:
    given = [str(path) for path in (config.checkpoint, config.compare) if path is not None]
    if len(set(given)) < len(given):
        raise InputError(f"compare={given[1]} is the checkpoint itself; name another")
    models = {path: load(path) for path in given}
    for predictor in models.values():
        predictor.decoding = from_config.decoding(config, predictor.decoding)
    return models


def _browsed(config: DictConfig) -> tuple[browse.Run | None, list[bytes]]:
    """The run to browse, and some of its pictures."""
    if config.browse is None:
        folder = Path(config.checkpoint).expanduser()
        if not (folder / "metrics.json").is_file():
            return None, []
    else:
        folder = Path(config.browse).expanduser()
    opened = browse.read(folder)
    try:
        examples = _examples(folder)
    except InputError as error:
        print(f"{folder} is browsed without its pictures: {error}")
        return opened, []
    pictures: dict[int | str, ImageSource] = {example.image_id: example.image for example in examples}
    contents = [_content(image) for image in list(pictures.values())[:EXAMPLES]]
    return replace(opened, pictures=pictures), [content for content in contents if content is not None]


def _examples(folder: Path) -> list[Example]:
    """What a scored run was asked."""
    whole = folder if (folder / "config.yaml").is_file() else folder.parent  # a mixture's task has a folder of its own
    if not (whole / "config.yaml").is_file():
        raise InputError(f"{folder} has no config.yaml")
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    settings = OmegaConf.load(whole / "config.yaml")
    assert isinstance(settings, DictConfig)
    data = data_settings(settings)
    if whole != folder:
        data = data.tasks[folder.name]
    if data.hub is None and data.shards is None and not Path(data.root or "").expanduser().is_dir():
        raise InputError(f"{data.root} is not there")  # and what is drawn at first use is not drawn for this
    return read_examples(data, metrics["split"], metrics["max_samples"], BadRecords("skip"))


def _content(image: ImageSource) -> bytes | None:
    """A picture's file; None: it is none, or cannot be read."""
    if isinstance(image, Image.Image):
        return None
    try:
        return image if isinstance(image, bytes) else image.read_bytes()
    except OSError:
        return None


def _read(given: str | Iterable[str]) -> list[bytes]:
    """The pictures of files and folders."""
    found: list[bytes] = []
    for path in (Path(one).expanduser() for one in ([given] if isinstance(given, str) else given)):
        try:
            files = sorted(path.iterdir()) if path.is_dir() else [path]
            found += [file.read_bytes() for file in files if file.suffix.lower() in Image.registered_extensions()]
        except OSError as error:
            raise InputError(f"examples={path} cannot be read ({error.strerror}); correct the path") from None
    return found


def _shown(contents: Iterable[bytes], limits: Limits) -> list[bytes]:
    """Those that a client might send too: the page asks about its examples as it does about what is dropped on it."""
    kept = []
    for content in contents:
        try:
            uploads.decode(content, limits)
        except Refused as error:
            print(f"an example is left out: {error.sentence}")
        else:
            kept.append(content)
    return kept


if __name__ == "__main__":
    run(main, "serve")
    leave()  # taking PyTorch and gradio apart takes longer than a user waits after Ctrl-C
