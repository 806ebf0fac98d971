"""What stands before all routes: who may ask, how much may be sent, which routes and methods there are.

Gradio has routes for files, uploads, proxies and other things that this page does not use, and its events may name
files. None of that is let through, so that nothing here opens what a client names.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import secrets
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlmvqa.extras.serving.limits import Limits
from vlmvqa.extras.serving.style import SIGN_IN

COOKIE = "vlmvqa"
OPEN = ("/health",)
# The method of each route of the API. Others are refused here: FastAPI would pass them on to gradio, mounted at /.
OURS = {"/answer": "POST", "/picture": "POST", "/docs": "GET", "/openapi.json": "GET", "/health": "GET"}
# What gradio's page asks of its server, for what this page is made of.
GRADIOS = re.compile(
    r"/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt|(assets|static)/.+"
    r"|gradio_api/(info|startup-events|queue/(join|data)|heartbeat/\w+|reset|cancel))?/?"
)
POSTED = re.compile(r"/gradio_api/(queue/join|reset|cancel)/?")
EVENT = 200_000  # bytes of an event: a few questions
PAGE = (
    "default-src 'self'; img-src 'self' data: blob:; font-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)
HEADERS = {
    "content-security-policy": PAGE,  # nothing of the page comes from elsewhere, nor is anything sent there
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
LOOPBACK = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?", re.IGNORECASE)


class Guard:
    """An application behind its checks.

    Args:
        token: what `Authorization: Bearer` must hold; the page asks for it once. None: anybody may ask.
        local: answer only what is addressed to this machine by its own name. A page of another site, whose name was
            made to lead here, could read the answers otherwise.
    """

    def __init__(self, app: ASGIApp, limits: Limits, token: str | None = None, local: bool = False) -> None:
        self.app, self.limits, self.local = app, limits, local
        self.token = None if token is None else token.encode()
        self.session = secrets.token_urlsafe(32)  # of who gave the token to the page; another at each start
        self._ending = asyncio.Event()

    def end(self) -> None:
        """Let the pages that are open go: each listens for news as long as there may be some."""
        self._ending.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        send = _with_headers(send)
        listens = scope["path"].startswith("/gradio_api/")
        receive = _limited(receive, self._most(scope["path"]), self.limits.timeout_s, self._ending if listens else None)
        try:
            refusal = await self._refusal(Request(scope, receive))
            if refusal is None and scope["path"].startswith("/gradio_api/queue/join"):
                refusal, receive = await _checked_event(receive)
        except HTTPException as error:
            refusal = _error(error.status_code, error.detail)
        try:
            await (refusal or self.app)(scope, receive, send)
        except asyncio.CancelledError:  # the server ends, and waits no longer for this answer
            if not self._ending.is_set():
                raise

    def _most(self, path: str) -> int:
        """Bytes of a body: a picture with its questions, or an event of the page."""
        if path not in ("/answer", "/picture"):
            return EVENT
        return self.limits.bytes + 4 * self.limits.questions * self.limits.characters + 20_000

    async def _refusal(self, request: Request) -> Response | None:
        """What a request is answered with in place of what it asks for, if anything."""
        path = request.scope["path"]
        if self.local and not LOOPBACK.fullmatch(request.headers.get("host", "")):
            return _error(421, "this server answers only as localhost; start it with a token to give it other names")
        if self.token is not None and path not in OPEN:
            if path == "/sign-in" and request.method == "POST":
                return await self._sign_in(request)
            if not self._known(request):
                return _unknown(request)
        method = _method(path)
        if method is None:
            return _error(404, f"there is no {_short(path)}; /docs lists the routes")
        if request.method not in (method, "HEAD"):  # an answer to HEAD has no body
            wrong = f"{_short(request.method)} {_short(path)} is not allowed; use {method} (/docs lists the routes)"
            return _error(405, wrong, {"allow": method})
        return None

    def _known(self, request: Request) -> bool:
        """Whether a request holds the token, or the cookie of who gave it before."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._equal(given.strip()):
            return True
        try:
            cookie = SimpleCookie(request.headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and hmac.compare_digest(cookie.value.encode(), self.session.encode())

    def _equal(self, given: str) -> bool:
        """In a time that says nothing about how much of it is right."""
        return self.token is not None and hmac.compare_digest(given.encode("utf-8", "replace"), self.token)

    async def _sign_in(self, request: Request) -> Response:
        fields = parse_qs((await request.body()).decode("utf-8", "replace"))
        if not self._equal(fields.get("token", [""])[0].strip()):
            return HTMLResponse(SIGN_IN.replace("<!--said-->", "That is not the token."), 401)
        found = RedirectResponse("/", 303)
        found.set_cookie(COOKIE, self.session, httponly=True, samesite="strict")
        return found


def _method(path: str) -> str | None:
    """The method of a route; None: there is no such route."""
    if path in OURS:
        return OURS[path]
    if GRADIOS.fullmatch(path):
        return "POST" if POSTED.fullmatch(path) else "GET"
    return "GET" if path.startswith("/picture/") else None


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}..."


def _unknown(request: Request) -> Response:
    if "text/html" in request.headers.get("accept", ""):
        return HTMLResponse(SIGN_IN, 401)
    wanted = "this server asks for a token; send it as the header Authorization: Bearer ..."
    return _error(401, wanted, {"www-authenticate": "Bearer"})


def _error(status: int, sentence: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": sentence}, status, headers)


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            given = {name.lower() for name, _ in message.get("headers", ())}
            more = [(name.encode(), value.encode()) for name, value in HEADERS.items() if name.encode() not in given]
            message = {**message, "headers": [*message.get("headers", ()), *more]}
        await send(message)

    return sending


def _limited(receive: Receive, most: int, seconds: float, ending: asyncio.Event | None) -> Receive:
    """A body is read as far as it may go and no further, whatever its headers say of its length, and not for ever.

    Args:
        ending: who listens on is told that nobody is there any more when this is set.
    """
    taken, whole = 0, False
    latest = asyncio.get_running_loop().time() + seconds

    async def receiving() -> Message:
        nonlocal taken, whole
        if whole:  # what comes now is that the client has left
            return await (receive() if ending is None else _left(receive, ending))
        try:
            async with asyncio.timeout_at(latest):
                message = await receive()
        except TimeoutError:
            raise HTTPException(408, f"the request did not come within {seconds:g} seconds; send it again") from None
        taken += len(message.get("body", b""))
        whole = not message.get("more_body", False)
        if taken > most:
            raise HTTPException(413, f"more than {most / 1e6:.3g} MB were sent; send less")
        return message

    return receiving


async def _left(receive: Receive, ending: asyncio.Event) -> Message:
    """That the client has left, or that the server ends."""
    waiting = [asyncio.ensure_future(one) for one in (receive(), ending.wait())]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for one in waiting:
            one.cancel()
    return {"type": "http.disconnect"}


async def _checked_event(receive: Receive) -> tuple[Response | None, Receive]:
    """An event of the page, which never names a file; and the same body to be read again."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return _error(400, "the client left"), receive
        body += message.get("body", b"")
        if not message.get("more_body", False):
            break
    try:
        if _names_a_file(json.loads(body)):
            return _error(400, "an event of this page names no files"), receive
    except (ValueError, RecursionError):
        return _error(400, "an event of this page is JSON"), receive
    return None, _again(bytes(body), receive)


def _again(body: bytes, receive: Receive) -> Receive:
    told = False

    async def receiving() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receiving


def _names_a_file(value: Any) -> bool:
    """Whether gradio would look for a file: all that it takes for one has a path."""
    if isinstance(value, dict):
        return "path" in value or any(map(_names_a_file, value.values()))
    return isinstance(value, list) and any(map(_names_a_file, value))
