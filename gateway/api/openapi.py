"""The OpenAPI document, with the schemas of the very types that requests are decoded into."""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import version
from typing import Any

import msgspec

from gateway.adapter_states import AdapterView
from gateway.api.adapters import AdapterList, CreateAdapterRequest
from gateway.api.chat import ChatRequest
from gateway.api.completions import CompletionRequest
from gateway.api.lora import LoadLoraAdapterRequest, UnloadLoraAdapterRequest
from gateway.api.tokenize import DetokenizeRequest, TokenizeChatRequest, TokenizePromptRequest
from gateway.decisions import Explanation

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_POSTS: dict[str, tuple[str, tuple[type[msgspec.Struct], ...]]] = {
    "/v1/chat/completions": ("Answer a chat", (ChatRequest,)),
    "/v1/completions": ("Continue prompts, or score them", (CompletionRequest,)),
    "/tokenize": ("Text or messages to token ids", (TokenizePromptRequest, TokenizeChatRequest)),
    "/detokenize": ("Token ids to text", (DetokenizeRequest,)),
    "/v1/load_lora_adapter": ("Add a LoRA adapter (administrators)", (LoadLoraAdapterRequest,)),
    "/v1/unload_lora_adapter": ("Remove a LoRA adapter (administrators)", (UnloadLoraAdapterRequest,)),
    "/v1/adapters": ("Add an adapter, or a version of one (administrators)", (CreateAdapterRequest,)),
}
_GETS = {
    "/v1/models": "Models you may use",
    "/v1/models/{model_id}": "One model",
    "/v1/adapters": "Adapters, and how each is doing (administrators)",
    "/v1/adapters/{name}": "One adapter (administrators)",
    "/v1/routing/decisions/{request_id}": "Why a request of yours went where it went",
    "/health": "This process answers",
    "/ready": "Every model has a ready replica",
    "/version": "Version of this server",
    "/metrics": "Prometheus metrics",
}
_DELETES = {"/v1/adapters/{name}": "Remove an adapter (administrators)"}
_ANSWERS: dict[str, type[msgspec.Struct]] = {
    "/v1/routing/decisions/{request_id}": Explanation,
    "/v1/adapters": AdapterList,
    "/v1/adapters/{name}": AdapterView,
}
"""What a path answers, where the shape is ours alone."""

_REF = "#/components/schemas/{name}"


@cache
def document() -> dict[str, Any]:
    """The document that /openapi.json serves."""
    types = [request_type for _, request_types in _POSTS.values() for request_type in request_types]
    types += _ANSWERS.values()
    _, schemas = msgspec.json.schema_components(types, ref_template=_REF)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Warmgate", "version": version("warmgate")},
        "paths": _paths(),
        "components": {
            "schemas": {**schemas, "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }


def _paths() -> dict[str, dict[str, Any]]:
    """By path, then by method."""
    found: dict[str, dict[str, Any]] = {path: {"post": _post(path)} for path in _POSTS}
    for path in _GETS:
        found.setdefault(path, {})["get"] = _get(path, "")
    for path in _DELETES:
        found.setdefault(path, {})["delete"] = _get(path, "delete_")
    return found


def _post(path: str) -> dict[str, Any]:
    summary, types = _POSTS[path]
    refs = [{"$ref": _REF.format(name=request_type.__name__)} for request_type in types]
    schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
    return {
        "summary": summary,
        "operationId": path.strip("/").replace("/", "_"),
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": _responses(),
    }


def _get(path: str, prefix: str) -> dict[str, Any]:
    """A request without a body. `prefix`: of the operation's id."""
    is_get = not prefix
    id_prefix = prefix or ("list_" if path in _POSTS else "")
    operation: dict[str, Any] = {
        "summary": (_GETS if is_get else _DELETES)[path],
        "operationId": id_prefix + path.strip("/").replace("/", "_").replace("{", "").replace("}", ""),
        "responses": _responses(),
    }
    operation["parameters"] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", path)
    ]
    if is_get and path in _ANSWERS:
        schema = {"$ref": _REF.format(name=_ANSWERS[path].__name__)}
        operation["responses"]["200"]["content"] = {"application/json": {"schema": schema}}
    return operation


def _responses() -> dict[str, Any]:
    error = {
        "description": "An error",
        "content": {"application/json": {"schema": {"$ref": _REF.format(name="Error")}}},
    }
    return {"200": {"description": "OK"}, "4XX": error, "5XX": error}
