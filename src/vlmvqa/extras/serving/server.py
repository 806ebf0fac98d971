"""A server on a port: what it is made of, and how it ends."""

from __future__ import annotations

import errno
import logging
import shutil
import signal
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
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

EXTRA = "pip install 'vlmvqa[demo]'"


@dataclass(frozen=True)
class Address:
    """Where to listen, and who may ask.

    Attributes:
        token: what clients must send; None: nothing.
        open: let other machines ask without one.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    token: str | None = None
    open: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.port, int) or not 0 <= self.port < 2**16:
            raise InputError(f"port={self.port} is none; use a number below 65536, 0 for any that is free")
        if not isinstance(self.open, bool):
            raise InputError(f"open={self.open} is unknown; use open=true or open=false")
        if self.token is not None and (len(self.token) < 8 or not self.token.isascii()):
            raise InputError("token is shorter than 8 characters or holds others than ASCII has; take another")
        if not self.local and self.token is None and not self.open:
            raise InputError(
                f"host={self.host} lets other machines ask, and there is no token; give token=..., or open=true to let "
                "anybody"
            )

    @property
    def local(self) -> bool:
        """Whether only this machine can ask."""
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.host == "0.0.0.0" else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


@dataclass(frozen=True)
class Served:
    """What a server shows: models by name, a run to browse, examples to pick (pictures' files)."""

    models: Mapping[str, Predictor]
    run: Run | None = None
    examples: Sequence[bytes] = field(default_factory=tuple)


def refuse_missing() -> None:
    """Say before a model is loaded that the packages of the page are not there.

    Raises:
        InputError: so.
    """
    try:
        import fastapi  # noqa: F401
        import gradio  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(f"the page needs {error.name}, which is not installed; {EXTRA}") from None


def listen(address: Address) -> socket.socket:
    """The address, taken.

    Raises:
        InputError: the port is already in use, or this machine has no such address.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((address.host, address.port))
        taken.listen(128)
    except OSError as error:
        taken.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"port {address.port} of {address.host} is already in use; stop the program that uses it, or choose "
                f"another port, as in port={address.port + 1} (port=0: any free one)"
            ) from None
        raise InputError(
            f"cannot listen on {address.host}:{address.port} ({error.strerror or error}); correct host=... or port=..."
        ) from None
    return taken


def serve(served: Served, address: Address, limits: Limits, folder: Path, taken: socket.socket) -> None:
    """Answer until the process is told to end (Ctrl-C, or SIGTERM).

    Args:
        folder: what is written goes here, and nowhere else.
        taken: of `listen`.
    """
    import uvicorn

    from vlmvqa.extras.serving import api, page
    from vlmvqa.extras.serving.access import Guard
    from vlmvqa.extras.serving.service import Service

    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(mkdtemp(dir=folder, prefix="gradio-")).resolve()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # of what clients send wrongly, they are told
    service = Service(served.models, limits)
    try:
        app = api.build(service)
        page.mount(app, service, served.run, served.examples, temporary)
        guarded = Guard(app, limits, address.token, local=address.local and address.token is None)
        config = uvicorn.Config(
            guarded,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=limits.clients,
            timeout_graceful_shutdown=1,  # a page that is open somewhere never hangs up by itself
        )

        class Server(uvicorn.Server):
            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                guarded.end()
                await super().shutdown(sockets)

        server = Server(config)
        port = taken.getsockname()[1]
        print(f"{' and '.join(served.models)} on {Address(address.host, port, address.token, True).url}")
        print("the API is described at /docs; Ctrl-C ends it", flush=True)
        signal.signal(signal.SIGTERM, _end)
        with suppress(KeyboardInterrupt):
            server.run(sockets=[taken])
    finally:
        service.close()
        taken.close()
        shutil.rmtree(temporary, ignore_errors=True)
    print("ended")


def _end(_: int, __: FrameType | None) -> None:
    """SIGTERM as Ctrl-C: what was written is removed."""
    raise KeyboardInterrupt
