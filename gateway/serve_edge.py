"""The outermost ASGI layer of every Ray Serve process that speaks HTTP: what Serve adds or answers becomes ours.

Serve finds `middlewares` by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH and wraps its own request handling in it, both
behind HAProxy (each ingress replica's server) and as a plain proxy. Neither ray nor the gateway's app is imported here.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.errors import ApiError, DeadlineError, InternalError, QueueFullError, UnavailableError

SERVE_HEADERS = frozenset({b"x-request-timeout-seconds", b"x-request-disconnect-disabled"})
"""Request headers by which a client could tell Serve to cut a stream, or to keep generating for a client long gone."""

_NOT_DEPLOYED = UnavailableError("The gateway is not up.", code="ingress_unavailable", retry_after_s=1.0)
_ANSWERS: dict[int, ApiError] = {
    404: _NOT_DEPLOYED,  # Serve's own: it has no application for any path
    408: DeadlineError("The request took too long."),
    429: QueueFullError("Too many requests at this gateway process.", retry_after_s=1.0),
    500: InternalError("The gateway failed to answer this request."),
    503: UnavailableError("The gateway cannot take this request now.", code="ingress_unavailable", retry_after_s=1.0),
}


def middlewares() -> list[Middleware]:
    """What Serve asks for by import path."""
    return [Middleware(ServeEdge)]


class ServeEdge:
    """Removes Serve's control headers from requests, its second `x-request-id` from answers, and gives its own plain
    text errors OpenAI's body. Paths below `/-/` are Serve's health routes and stay as they are."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):
            await self._app(scope, receive, send)
            return
        if any(name in SERVE_HEADERS for name, _ in scope["headers"]):
            scope = {**scope, "headers": [h for h in scope["headers"] if h[0] not in SERVE_HEADERS]}
        answer = _Answer(send)
        try:
            await self._app(scope, receive, answer)
        except Exception:
            await answer.fail()
            raise  # uvicorn logs it, and cuts the connection of an answer that had begun
        else:
            await answer.fail()  # Serve's plain proxy returns without an answer when the app raised


class _Answer:
    """One response on its way out: body messages pass untouched unless Serve, not the app, wrote the answer."""

    __slots__ = ("_replaced", "_send", "_started")

    def __init__(self, send: Send) -> None:
        self._send = send
        self._started = False
        self._replaced = False

    async def fail(self) -> None:
        """Answers 500 where no answer ever began; otherwise does nothing."""
        if not self._started:
            await self._replace(_ANSWERS[500], [])

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            if not self._replaced:
                await self._send(message)
            return
        if message["type"] == "http.response.start":
            self._started = True
            headers = _one_request_id(message["headers"])
            if message["status"] >= 400 and not _is_json(headers):
                self._replaced = True
                await self._replace(_ANSWERS.get(message["status"], _ANSWERS[500]), headers)
                return
            message = {**message, "headers": headers}
        await self._send(message)

    async def _replace(self, error: ApiError, headers: list[tuple[bytes, bytes]]) -> None:
        body = json.dumps(error.body()).encode()
        kept = [h for h in headers if h[0].lower() not in (b"content-type", b"content-length", b"retry-after")]
        added = {"content-type": "application/json", "content-length": str(len(body)), **error.headers()}
        kept += [(name.encode(), value.encode()) for name, value in added.items()]
        await self._send({"type": "http.response.start", "status": error.status, "headers": kept})
        await self._send({"type": "http.response.body", "body": body})


def _one_request_id(headers: Any) -> list[tuple[bytes, bytes]]:
    """The headers with the first `x-request-id` alone: the app's own comes before the one Serve appends."""
    kept: list[tuple[bytes, bytes]] = []
    found = False
    for name, value in headers:
        is_request_id = name.lower() == b"x-request-id"
        if not (is_request_id and found):
            kept.append((name, value))
        found = found or is_request_id
    return kept


def _is_json(headers: list[tuple[bytes, bytes]]) -> bool:
    return any(name.lower() == b"content-type" and value.startswith(b"application/json") for name, value in headers)
