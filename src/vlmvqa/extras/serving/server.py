"""Address, start and shutdown of the server."""

from __future__ import annotations

import errno
import logging
import shutil
import signal
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from tempfile import mkdtemp
from types import FrameType
from typing import TYPE_CHECKING

from vlmvqa.errors import InputError
from vlmvqa.extras.serving.limits import Limits
from vlmvqa.inference.predictor import Predictor

if TYPE_CHECKING:
    from vlmvqa.extras.serving.browse import Run

INSTALL_HINT = "pip install 'vlmvqa[demo]'"


@dataclass(frozen=True)
class Address:
    """Host and port to listen on, and who may send requests.

    Attributes:
        token: token that clients must send; None: no authentication.
        open: allow requests from other machines without a token.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    token: str | None = None
    open: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.port, int) or not 0 <= self.port < 2**16:
            raise InputError(f"port={self.port} is not a port; use a number below 65536, or 0 for any free one")
        if not isinstance(self.open, bool):
            raise InputError(f"open={self.open} is unknown; use open=true or open=false")
        if self.token is not None and (len(self.token) < 8 or not self.token.isascii()):
            raise InputError("token is shorter than 8 characters or contains non-ASCII characters; use another")
        if not self.local and self.token is None and not self.open:
            raise InputError(
                f"host={self.host} accepts requests from other machines, and there is no token; set token=..., or "
                "open=true to allow requests without one"
            )

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def url(self) -> str:
        """URL to open on this machine."""
        host = "127.0.0.1" if self.host == "0.0.0.0" else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


def check_packages() -> None:
    """Check that the packages of the page are installed, before models are loaded.

    Raises:
        InputError: a package is missing.
    """
    try:
        import fastapi  # noqa: F401
        import gradio  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(f"the page needs {error.name}, which is not installed; {INSTALL_HINT}") from None


def listen(address: Address) -> socket.socket:
    """Return a listening socket.

    Raises:
        InputError: the port is in use, or this machine has no such address.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address.host, address.port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"port {address.port} of {address.host} is already in use; stop the program that uses it, or choose "
                f"another port, as in port={address.port + 1} (port=0: any free one)"
            ) from None
        raise InputError(
            f"cannot listen on {address.host}:{address.port} ({error.strerror or error}); correct host=... or port=..."
        ) from None
    return listener


def serve(
    models: Mapping[str, Predictor],
    run: Run | None,
    examples: Sequence[bytes],
    address: Address,
    limits: Limits,
    folder: Path,
    listener: socket.socket,
) -> None:
    """Run the server until SIGINT (Ctrl-C) or SIGTERM.

    Args:
        run: run to browse.
        examples: image files to choose from.
        folder: folder for temporary files; nothing is written elsewhere.
    """
    import uvicorn

    from vlmvqa.extras.serving import api, page
    from vlmvqa.extras.serving.access import AccessMiddleware
    from vlmvqa.extras.serving.service import Service

    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(mkdtemp(dir=folder, prefix="gradio-")).resolve()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # bad forms are reported to the client
    service = Service(models, limits)
    try:
        app = api.build(service)
        page.mount(app, service, run, examples, temporary)
        middleware = AccessMiddleware(app, limits, address.token, local=address.local and address.token is None)
        config = uvicorn.Config(
            middleware,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=limits.clients,
            timeout_graceful_shutdown=1,  # open pages never disconnect by themselves
        )

        class Server(uvicorn.Server):
            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                middleware.shutdown()
                await super().shutdown(sockets)

        port = listener.getsockname()[1]
        print(f"{' and '.join(models)} on {Address(address.host, port, address.token, True).url}")
        print("the API is documented at /docs; press Ctrl-C to stop", flush=True)
        signal.signal(signal.SIGTERM, _interrupt)
        with suppress(KeyboardInterrupt):
            Server(config).run(sockets=[listener])
    finally:
        service.close()
        listener.close()
        shutil.rmtree(temporary, ignore_errors=True)
    print("stopped")


def _interrupt(_: int, __: FrameType | None) -> None:
    """Handle SIGTERM like Ctrl-C, so that temporary files are removed."""
    raise KeyboardInterrupt
