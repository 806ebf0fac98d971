"""ASGI middleware: authentication, allowed routes and methods, body size and time limits.

Gradio also has routes for files, uploads and proxies, and its events may name files. The page uses none of these, so
they are blocked: no path that a client names is opened.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from fastapi import HTTPException  # starlette's would become status 400 while FastAPI reads a form
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlmvqa.extras.serving.limits import Limits, busy

PUBLIC_PATHS = ("/health",)
UPLOAD_PATHS = ("/answer", "/image")
# Method of each API route. Other methods are rejected here: FastAPI would pass them on to gradio, mounted at /.
API_METHODS = {"/answer": "POST", "/image": "POST", "/docs": "GET", "/openapi.json": "GET", "/health": "GET"}
# The routes of gradio that its page needs.
GRADIO_PATHS = re.compile(
    r"/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt|(assets|static)/.+"
    r"|gradio_api/(info|startup-events|queue/(join|data)|heartbeat/\w+|reset|cancel))?/?"
)
GRADIO_POST_PATHS = re.compile(r"/gradio_api/(queue/join|reset|cancel)/?")
MAX_EVENT_BYTES = 200_000  # an event of the page holds a few questions
CONTENT_SECURITY_POLICY = (  # nothing is loaded from or sent to another host
    "default-src 'self'; img-src 'self' data: blob:; font-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)
HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
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
        self._shutdown = asyncio.Event()
        self._num_uploads = 0  # from before a body is read until its request is answered

    def shutdown(self) -> None:
        """End the event streams of open pages, which would keep the server running."""
        self._shutdown.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an allowed request to the application, answer the others."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        path = scope["path"]
        send = _with_headers(send)
        shutdown = self._shutdown if path.startswith("/gradio_api/") else None
        receive = _limited(receive, self._max_bytes(path), self.limits.timeout_s, shutdown)
        request = Request(scope, receive)
        try:
            response = self._reject(request)
            if response is None and path.startswith("/gradio_api/queue/join"):
                body = await request.body()
                response = _reject_event(body)
                receive = _replay(body, receive)
        except HTTPException as error:
            response = _error(error.status_code, error.detail)
        except ClientDisconnect:
            response = _error(400, "the client disconnected")
        is_upload = response is None and path in UPLOAD_PATHS
        if is_upload and self._num_uploads >= self.limits.queue + self.limits.max_batch:
            full = busy(f"{self._num_uploads} requests are active")
            response, is_upload = _error(full.status, full.message, full.headers), False
        self._num_uploads += is_upload
        try:
            await (response or self.app)(scope, receive, send)
        except asyncio.CancelledError:  # the server is shutting down and doesn't wait for this response
            if not self._shutdown.is_set():
                raise
        finally:
            self._num_uploads -= is_upload

    def _max_bytes(self, path: str) -> int:
        """Return the largest allowed body: an image with its questions, or an event of the page."""
        if path not in UPLOAD_PATHS:
            return MAX_EVENT_BYTES
        return self.limits.bytes + 4 * self.limits.questions * self.limits.characters + 20_000

    def _reject(self, request: Request) -> Response | None:
        """Return an error for a request that isn't allowed, None for one that is."""
        path = request.scope["path"]
        if self.local and not LOOPBACK.fullmatch(request.headers.get("host", "")):
            return _error(421, "this server answers only as localhost; start it with a token to use other names")
        if path not in PUBLIC_PATHS and not self._is_authenticated(request):
            message = "this server requires a token; send it in the header Authorization: Bearer ..."
            # Browsers ask for it once: the password, with any user name.
            return _error(401, message, {"www-authenticate": 'Basic realm="vlmvqa: the token is the password"'})
        method = _allowed_method(path)
        if method is None:
            return _error(404, f"there is no {_shorten(path)}; /docs lists the routes")
        if request.method not in (method, "HEAD"):  # a HEAD response has no body
            message = f"{_shorten(request.method)} {_shorten(path)} is not allowed; use {method} (see /docs)"
            return _error(405, message, {"allow": method})
        return None

    def _is_authenticated(self, request: Request) -> bool:
        """Return whether a request has the token, as a Bearer token or as the password of HTTP's Basic scheme."""
        if self.token is None:
            return True
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        token = given.strip().encode("utf-8", "replace")
        if scheme.lower() == "basic":
            with suppress(binascii.Error):
                token = base64.b64decode(token).partition(b":")[2]
        elif scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(token, self.token)  # the time doesn't reveal how many characters match


def _allowed_method(path: str) -> str | None:
    """Return the method of a route; None if there is no such route."""
    if path in API_METHODS:
        return API_METHODS[path]
    if GRADIO_PATHS.fullmatch(path):
        return "POST" if GRADIO_POST_PATHS.fullmatch(path) else "GET"
    return "GET" if path.startswith("/image/") else None


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}..."


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"error": message}, status, headers)


def _with_headers(send: Send) -> Send:
    """Add `HEADERS` to a response, unless it sets them itself."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            message.setdefault("headers", [])
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return send_with_headers


def _limited(receive: Receive, max_bytes: int, timeout_s: float, shutdown: asyncio.Event | None) -> Receive:
    """Limit size and time of a body as it arrives, whatever its headers declare.

    Args:
        shutdown: once the body is complete, report a disconnected client when this is set.
    """
    num_bytes, complete = 0, False
    deadline = asyncio.get_running_loop().time() + timeout_s

    async def receive_limited() -> Message:
        nonlocal num_bytes, complete
        if complete:  # the only message left is a disconnect
            return await (receive() if shutdown is None else _disconnect(receive, shutdown))
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise HTTPException(408, f"the request did not arrive within {timeout_s:g} seconds; retry") from None
        num_bytes += len(message.get("body", b""))
        complete = not message.get("more_body", False)
        if num_bytes > max_bytes:
            raise HTTPException(413, f"the request has more than {max_bytes / 1e6:.3g} MB; send less")
        return message

    return receive_limited


async def _disconnect(receive: Receive, shutdown: asyncio.Event) -> Message:
    """Wait until the client disconnects or the server shuts down."""
    tasks = [asyncio.ensure_future(waiting) for waiting in (receive(), shutdown.wait())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
    return {"type": "http.disconnect"}


def _reject_event(body: bytes) -> Response | None:
    """Return an error for an event of the page that is not JSON or names a file."""
    try:
        if _names_file(json.loads(body)):
            return _error(400, "events of this page may not name files; remove `path`")
    except (ValueError, RecursionError):
        return _error(400, "events of this page must be JSON")
    return None


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return `body` again as the first message."""
    replayed = False

    async def receive_replayed() -> Message:
        nonlocal replayed
        if replayed:
            return await receive()
        replayed = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_replayed


def _names_file(value: Any) -> bool:
    """Return whether gradio would look for a file: it treats any object with a `path` as one."""
    if isinstance(value, dict):
        return "path" in value or any(map(_names_file, value.values()))
    return isinstance(value, list) and any(map(_names_file, value))
