"""One HTTP request and its answer, straight on ASGI: no request object to build, no response class to run.

Endpoint ─► Exchange: headers once, body counted while it is read, answer through `send`, errors in one place
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import msgspec
from starlette.types import Message, Receive, Scope, Send

from gateway.errors import (
    ApiError,
    InternalError,
    PayloadTooLargeError,
    UnsupportedMediaTypeError,
)
from gateway.types import Gateway

logger = logging.getLogger("warmgate.api")

Header: TypeAlias = tuple[bytes, bytes]

JSON = b"application/json"
STATUS_CLIENT_GONE = 499
_SANE_ID = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._:/+=-]{0,127}")


class ClientGoneError(Exception):
    """The client closed its connection before its answer was there."""


class Exchange:
    """A request being answered. `request_id` is ours and unique; the client's own is only echoed."""

    __slots__ = (
        "_headers",
        "_receive",
        "_send",
        "arrived",
        "client_gone",
        "client_request_id",
        "extra_headers",
        "gateway",
        "request_id",
        "scope",
        "started",
        "status",
    )

    def __init__(self, gateway: Gateway, scope: Scope, receive: Receive, send: Send) -> None:
        self.gateway = gateway
        self.scope = scope
        self._receive = receive
        self._send = send
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        self.arrived = gateway.clock()
        self.request_id = f"{gateway.ingress_id}-{gateway.random.getrandbits(96):024x}"
        self.client_request_id = sane_request_id(self._headers.get(b"x-request-id"))
        self.extra_headers: list[Header] = [(b"x-warmgate-ingress", gateway.ingress_id.encode())]
        self.started = False
        self.status = 0
        self.client_gone = False

    def header(self, name: bytes) -> bytes | None:
        return self._headers.get(name)

    async def json_body(self) -> bytes:
        """The whole body. Raises 413 beyond `admission.max_body_bytes`, 415 for anything that is not plain JSON."""
        self._check_media_type()
        limit = self.gateway.config.admission.max_body_bytes
        declared = self._headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > limit:
            raise _too_large(limit)
        chunks: list[bytes] = []
        num_bytes = 0
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            chunk = message.get("body", b"")
            num_bytes += len(chunk)
            if num_bytes > limit:
                raise _too_large(limit)
            chunks.append(chunk)
            more = message.get("more_body", False)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def watch_disconnect(self) -> asyncio.Task[None]:
        """Cancels the calling task when the client goes away; cancel the returned task when done. The caller tells
        this cancellation from others by `client_gone`."""
        answering = asyncio.current_task()
        assert answering is not None
        return asyncio.create_task(self._cancel_when_gone(answering))

    async def _cancel_when_gone(self, answering: asyncio.Task[object]) -> None:
        try:
            while (await self._receive())["type"] != "http.disconnect":
                pass  # bytes after the body's end are nobody's
        except Exception as error:  # a server between us and the client that failed: nobody hears us any more
            logger.warning("request %s: its client cannot be heard any more: %r", self.request_id, error)
        self.client_gone = True
        answering.cancel()

    async def _out(self, message: Message) -> None:
        try:
            await self._send(message)
        except OSError as error:  # ASGI 2.4: writing to a client that has gone
            self.client_gone = True
            raise ClientGoneError from error

    async def start(self, status: int, headers: list[Header]) -> None:
        """Sends status and headers, those every answer has included."""
        self.started = True
        self.status = status
        spent_ms = int((self.gateway.clock() - self.arrived) * 1000)
        await self._out(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [
                    (b"x-request-id", self.echoed_id()),
                    (b"openai-processing-ms", b"%d" % spent_ms),
                    *headers,
                    *self.extra_headers,
                ],
            }
        )

    async def write(self, body: bytes) -> None:
        await self._out({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self, body: bytes = b"") -> None:
        await self._out({"type": "http.response.body", "body": body, "more_body": False})

    async def send(self, body: bytes, *, status: int = 200, media_type: bytes = JSON) -> None:
        """A whole answer at once; to HEAD without its body."""
        await self.start(status, [(b"content-type", media_type), (b"content-length", b"%d" % len(body))])
        await self.end(b"" if self.scope["method"] == "HEAD" else body)

    async def refuse(self, error: ApiError) -> None:
        """The answer that an error is."""
        self.extra_headers += [(k.encode(), v.encode()) for k, v in error.headers().items()]
        await self.send(msgspec.json.encode(error.body()), status=error.status)

    def echoed_id(self) -> bytes:
        return self.client_request_id or self.request_id.encode()

    def _check_media_type(self) -> None:
        media_type = self._headers.get(b"content-type", JSON).split(b";", 1)[0].strip().lower()
        if media_type not in (JSON, b""):
            shown = media_type.decode("latin-1")[:80]
            raise UnsupportedMediaTypeError(f"Content-Type must be application/json, not {shown!r}.")
        encoding = self._headers.get(b"content-encoding", b"identity").strip().lower()
        if encoding not in (b"identity", b""):
            raise UnsupportedMediaTypeError("Content-Encoding is not supported; send the JSON as it is.")


class Endpoint:
    """An ASGI app around one handler: whatever it raises becomes OpenAI's error body, and nothing internal leaks."""

    def __init__(self, gateway: Gateway, name: str, handle: Callable[[Exchange], Awaitable[None]]) -> None:
        self._gateway = gateway
        self.name = name
        self._handle = handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(self._gateway, scope, receive, send)
        try:
            await self._handle(exchange)
        except ClientGoneError:
            pass
        except Exception as error:
            if exchange.started:
                raise  # the answer is half out: only cutting the connection is honest
            refusal = as_api_error(error, exchange.request_id)
            self._gateway.metrics.requests.labels(self.name, "", str(refusal.status)).inc()
            await exchange.refuse(refusal)


def as_api_error(error: Exception, request_id: str) -> ApiError:
    """The client's view of anything raised; what is not an ApiError is logged under the request's id."""
    if isinstance(error, ApiError):
        return error
    logger.error("request %s failed", request_id, exc_info=error)
    return InternalError("The server had an error while processing your request. Sorry about that!")


def sane_request_id(raw: bytes | None) -> bytes | None:
    """A client's `x-request-id` if it may be echoed: 1 to 128 plain characters."""
    return raw if raw is not None and _SANE_ID.fullmatch(raw) else None


def _too_large(limit: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"The request body is larger than {limit} bytes.")
