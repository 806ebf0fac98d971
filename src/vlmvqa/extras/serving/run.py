"""Serve a trained model: the config, start and shutdown, the models, the browsed run and the example images."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from vlmvqa.config.compatibility import missing
from vlmvqa.config.inference_schema import override_decoding
from vlmvqa.config.schema import RunSettings
from vlmvqa.data.example import ImageSource
from vlmvqa.errors import InputError
from vlmvqa.extras.report.scored_data import scored_examples
from vlmvqa.extras.serving import browse, uploads
from vlmvqa.extras.serving.address import Address, listen
from vlmvqa.extras.serving.limits import Limits, RequestError
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
    """Serve the page and the API until SIGINT (Ctrl-C) or SIGTERM."""
    for package in ("fastapi", "python_multipart", "uvicorn"):  # before models are loaded
        if missing(package):
            raise InputError(f"the server needs {package}, which is not installed; pip install 'vlmvqa[demo]'")
    import uvicorn

    from vlmvqa.extras.serving import api
    from vlmvqa.extras.serving.access import AccessMiddleware
    from vlmvqa.extras.serving.batcher import Batcher

    token = None if config.token is None else str(config.token)
    address = Address(str(config.host), config.port, token, config.open)
    run = _browsed(config)
    examples = _accepted(_read(config.examples) or list(run.images.values() if run else ())[:EXAMPLES], config.limits)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # bad forms are reported to the client
    # The port is taken before a model is loaded, which may take minutes.
    with listen(address) as listener, closing(Batcher(_models(config), config.limits)) as batcher:
        app = api.build(batcher, run, examples)
        settings = uvicorn.Config(
            AccessMiddleware(app, config.limits, token, local=address.local and token is None),
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=config.limits.clients,
            timeout_graceful_shutdown=1,
        )
        port = listener.getsockname()[1]
        print(f"{' and '.join(batcher.models)} on {replace(address, port=port).url}")
        print("the API is documented at /docs; press Ctrl-C to stop", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
        with suppress(KeyboardInterrupt):
            uvicorn.Server(settings).run(sockets=[listener])
    print("stopped")


def _models(config: ServeConfig) -> dict[str, Predictor]:
    names = [str(path) for path in (config.checkpoint, config.compare) if path is not None]
    if len(set(names)) < len(names):
        raise InputError(f"compare={names[1]} is the checkpoint itself; name another")
    models = {path: load(path, dtype=config.dtype) for path in names}
    for predictor in models.values():
        predictor.decoding = override_decoding(predictor.decoding, config.decoding, config.given)
    return models


def _browsed(config: ServeConfig) -> browse.Run | None:
    if config.browse is None:
        folder = Path(config.checkpoint).expanduser()
        if not (folder / "metrics.json").is_file():
            return None
    else:
        folder = Path(config.browse).expanduser()
    run = browse.read(folder)
    try:
        examples = scored_examples(folder)
    except InputError as error:
        print(f"{folder} is browsed without images: {error}")
        return run
    return replace(run, images={one.image_id: one.image for one in examples if not one.more_images})


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


def _accepted(sources: Iterable[ImageSource], limits: Limits) -> list[bytes]:
    """Return the image files within the limits: the page sends an example like any other image."""
    kept = []
    for source in sources:
        try:
            content = source.read_bytes() if isinstance(source, Path) else source
            if isinstance(content, bytes):
                uploads.decode(content, limits)
                kept.append(content)
        except (OSError, RequestError) as error:
            print(f"an example is skipped: {error}")
    return kept
