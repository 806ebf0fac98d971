"""ASGI middleware: authentication, body size and time limits, security headers."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import re
from contextlib import suppress

from fastapi import HTTPException  # starlette's may become status 400 while FastAPI reads a form
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlmvqa.extras.serving import errors
from vlmvqa.extras.serving.limits import MILLION, Limits, RequestError, busy

PUBLIC_PATH = "/health"
# Of uploads, with the bytes that a byte of the image takes: in JSON, images are base64.
UPLOAD_PATHS = {"/answer": 1.0, "/v1/chat/completions": 4 / 3}
HEADERS = {
    # Nothing is loaded from or sent to another host, and no inline script or style runs.
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; "
    "frame-ancestors 'none'; form-action 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
LOOPBACK = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?", re.IGNORECASE)


class AccessMiddleware:
    """Check each request before it reaches the application.

    Args:
        token: required as `Authorization: Bearer ...`, or as a password in the browser; None: no authentication.
        local: accept only requests whose host is a name of this machine. This prevents DNS rebinding: a page of
            another site whose name resolves to this machine could read the answers.
    """

    def __init__(self, app: ASGIApp, limits: Limits, token: str | None = None, local: bool = False) -> None:
        self.app, self.limits, self.local = app, limits, local
        self.token = None if token is None else token.encode()
        self._num_uploads = 0  # from before a body is read until its request is answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an allowed request to the application, answer the others."""
        if scope["type"] != "http":  # start and end of the server; FastAPI closes websockets, which have no routes
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        error = self._error(scope["path"], Headers(scope=scope))
        app = self.app if error is None else errors.response(scope["path"], error)
        is_upload = scope["path"] in UPLOAD_PATHS
        limited = _limited(receive, self.limits, UPLOAD_PATHS.get(scope["path"], 1.0))
        self._num_uploads += is_upload
        try:
            await app(scope, limited, send_with_headers)
        finally:
            self._num_uploads -= is_upload

    def _error(self, path: str, headers: Headers) -> RequestError | None:
        """Return the error for a request that isn't allowed, None for one that is."""
        if self.local and not LOOPBACK.fullmatch(headers.get("host", "")):
            return RequestError(421, "this server answers only as localhost; start it with a token to use other names")
        if path != PUBLIC_PATH and not self._is_authenticated(headers.get("authorization", "")):
            message = "this server requires a token; send it in the header Authorization: Bearer ..."
            # Browsers ask for it once: the password, with any user name.
            basic = {"www-authenticate": 'Basic realm="vlmvqa: the token is the password"'}
            return RequestError(401, message, basic, code="invalid_api_key")
        if path in UPLOAD_PATHS and headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            return RequestError(403, "a page of another site may not ask; open this server's own page")
        if path in UPLOAD_PATHS and self._num_uploads >= self.limits.queue + self.limits.max_batch:
            return busy(f"{self._num_uploads} requests are active")
        return None

    def _is_authenticated(self, authorization: str) -> bool:
        """Return whether a header has the token, as a Bearer token or as the password of HTTP's Basic scheme."""
        scheme, _, given = authorization.partition(" ")
        token = given.strip().encode("utf-8", "replace")
        if scheme.lower() == "basic":
            with suppress(binascii.Error):
                token = base64.b64decode(token).partition(b":")[2]
        elif scheme.lower() != "bearer":
            token = b""
        # The time doesn't reveal how many characters match.
        return self.token is None or hmac.compare_digest(token, self.token)


def _limited(receive: Receive, limits: Limits, encoding: float) -> Receive:
    """Limit size and time of a body as it arrives, whatever its headers declare."""
    max_bytes = encoding * limits.megabytes * MILLION + 4 * limits.questions * limits.characters + 20_000
    num_bytes, complete = 0, False
    deadline = asyncio.get_running_loop().time() + limits.timeout_s

    async def receive_limited() -> Message:
        nonlocal num_bytes, complete
        try:
            async with asyncio.timeout_at(None if complete else deadline):  # after the body: wait for a disconnect
                message = await receive()
        except TimeoutError:
            raise HTTPException(408, f"the request did not arrive within {limits.timeout_s:g} seconds; retry") from None
        num_bytes += len(message.get("body", b""))
        complete = not message.get("more_body", False)
        if num_bytes > max_bytes:
            raise HTTPException(413, f"the request has more than {max_bytes / 1e6:.3g} MB; send less")
        return message

    return receive_limited
