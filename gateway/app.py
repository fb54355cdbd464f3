"""The HTTP face: FastAPI around handlers that speak ASGI themselves.

FastAPI serves the documentation and finds the routes of GET; what clients post goes straight to its
`gateway.api.exchange.Endpoint`, past middleware that would cost a microsecond for each piece of a stream. Whatever
answers, the error body is OpenAI's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gateway.api.adapters import Adapters
from gateway.api.chat import ChatRequest, ChatRoute
from gateway.api.completions import CompletionRequest, CompletionRoute
from gateway.api.decisions import Decisions
from gateway.api.exchange import Endpoint, Exchange, as_api_error, sane_request_id
from gateway.api.generate import Generation
from gateway.api.health import Health
from gateway.api.lora import LoraAdapters
from gateway.api.models import Models
from gateway.api.openapi import document
from gateway.api.tokenize import Tokenize
from gateway.errors import ApiError, MethodNotAllowedError, NotFoundError
from gateway.sse import encode
from gateway.types import Gateway

GET, POST = ("GET",), ("POST",)


@dataclass(frozen=True, slots=True)
class Path:
    """A path, its methods, its handler, and the name it has in metrics."""

    path: str
    methods: tuple[str, ...]
    name: str
    handle: Callable[[Exchange], Awaitable[None]]


class GatewayApp(FastAPI):
    """FastAPI with a direct way to the endpoints in `direct`, by path, for POST."""

    def __init__(self, direct: dict[str, Endpoint], **options: Any) -> None:
        super().__init__(**options)
        self._direct = direct

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            endpoint = self._direct.get(scope["path"])
            if endpoint is not None:
                await endpoint(scope, receive, send)
                return
        await super().__call__(scope, receive, send)


def build_app(gateway: Gateway) -> FastAPI:
    """The ASGI app of one ingress. Starting and closing what `gateway` holds is its owner's task."""
    docs = gateway.config.http.docs
    paths = _paths(gateway)
    endpoints = {path.path: Endpoint(gateway, path.name, path.handle) for path in paths}
    app = GatewayApp(
        {path.path: endpoints[path.path] for path in paths if path.methods == POST},
        title="Warmgate",
        docs_url="/docs" if docs else None,
        redoc_url=None,
        openapi_url="/openapi.json" if docs else None,
        redirect_slashes=False,
    )
    app.openapi = document  # type: ignore[method-assign]  # FastAPI's documented way to replace it
    app.router.routes += [Route(path.path, endpoints[path.path], methods=list(path.methods)) for path in paths]
    errors = _Errors(gateway)
    app.add_exception_handler(HTTPException, errors.routing)
    app.add_exception_handler(Exception, errors.unexpected)
    return app


def _paths(gateway: Gateway) -> list[Path]:
    """Every path, in the order routes are tried."""
    chat = Generation(gateway, ChatRoute(), ChatRequest)
    completions = Generation(gateway, CompletionRoute(), CompletionRequest)
    models, tokens, health, decisions = Models(gateway), Tokenize(gateway), Health(gateway), Decisions(gateway)
    adapters, fleet = LoraAdapters(gateway), Adapters(gateway)
    return [
        Path("/version", GET, "version", health.version),
        Path("/metrics", GET, "metrics", health.metrics),
        Path("/ready", GET, "ready", health.ready),
        Path("/health", GET, "health", health.health),
        Path("/detokenize", POST, "detokenize", tokens.detokenize),
        Path("/tokenize", POST, "tokenize", tokens.tokenize),
        Path("/v1/models/{model_id:path}", GET, "models", models.get_one),
        Path("/v1/models", GET, "models", models.list_all),
        Path("/v1/routing/decisions/{request_id:path}", GET, "decisions", decisions.get_one),
        Path("/v1/unload_lora_adapter", POST, "unload_lora_adapter", adapters.unload),
        Path("/v1/load_lora_adapter", POST, "load_lora_adapter", adapters.load),
        Path("/v1/adapters/{name:path}", ("GET", "DELETE"), "adapters", fleet.item),
        Path("/v1/adapters", ("GET", "POST"), "adapters", fleet.collection),
        Path("/v1/completions", POST, completions.route_name, completions),
        Path("/v1/chat/completions", POST, chat.route_name, chat),
    ]


class _Errors:
    """What FastAPI and the router raise, in OpenAI's body."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def routing(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.url.path
        if error.status_code == 405:
            refusal: ApiError = MethodNotAllowedError(f"{request.method} is not allowed for {path}.")
        elif error.status_code == 404:
            refusal = NotFoundError(f"Unknown request URL: {request.method} {path}.")
        else:
            refusal = ApiError(error.detail)
            refusal.status = error.status_code
        self._gateway.metrics.requests.labels("none", "", str(refusal.status)).inc()
        return self._response(request, refusal, dict(error.headers or {}))

    async def unexpected(self, request: Request, error: Exception) -> Response:
        return self._response(request, as_api_error(error, self._request_id(request)), {})

    def _response(self, request: Request, refusal: ApiError, headers: dict[str, str]) -> Response:
        headers = {**headers, **refusal.headers(), "x-request-id": self._request_id(request)}
        return Response(encode(refusal.body()), refusal.status, headers, "application/json")

    def _request_id(self, request: Request) -> str:
        own = sane_request_id(request.headers.get("x-request-id", "").encode("latin-1"))
        return own.decode() if own else f"{self._gateway.ingress_id}-{self._gateway.random.getrandbits(96):024x}"
