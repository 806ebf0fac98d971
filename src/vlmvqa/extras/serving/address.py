"""Host and port of the server, and who may send requests."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass
from ipaddress import ip_address

from vlmvqa.errors import InputError


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
