"""Bad inputs on the real stack, HAProxy and Ray Serve in between: each with its status, type, code and param."""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from configs.schema import AdmissionConfig
from tests.e2e.conftest import MODEL, Stack
from tests.gateway.openai_schema import problems
from tests.gateway.test_bad_inputs import BAD, CHAT, HI, NO_OBJECT, TEXT, VOCAB

pytestmark = [pytest.mark.ray, pytest.mark.model]

INVALID = "invalid_request_error"
JSON = {"content-type": "application/json"}
MODEL_VOCAB, MODEL_CONTEXT = 49152, 8192
MAX_BODY_BYTES = AdmissionConfig().max_body_bytes


@dataclass(frozen=True)
class Bad:
    """A request, and the error it must be answered with."""

    method: str
    path: str
    content: bytes = field(repr=False)
    status: int
    type: str
    code: str | None
    param: str | None = None
    headers: dict[str, str] = field(default_factory=lambda: JSON)
    allow: str | None = None


def posted(path: str, body: Any, status: int, kind: str, code: str | None, param: str | None) -> Bad:
    return Bad("POST", path, json.dumps(body).encode(), status, kind, code, param)


def adapted(value: Any) -> Any:
    """The scripted model's name and vocabulary in a request body become the real one's."""
    if isinstance(value, dict):
        return {str(MODEL_VOCAB) if key == str(VOCAB) else key: adapted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [adapted(item) for item in value]
    if value == "sim":
        return MODEL
    return MODEL_VOCAB if value == VOCAB and isinstance(value, int) else value


def fields() -> Iterator[Bad]:
    """The table of the gateway's own tests, but for what is right where there is one model only."""
    for (path, body), param, code in BAD:
        if path not in ("/tokenize", "/detokenize") or "model" in body:
            yield posted(path, adapted(body), 400, INVALID, code, param)


def overflows() -> Iterator[Bad]:
    """More than the context holds."""
    user = {"model": MODEL, "messages": HI}
    long = {"model": MODEL, "messages": [{"role": "user", "content": "many words " * MODEL_CONTEXT}]}
    for body in ({**user, "max_tokens": MODEL_CONTEXT}, {**user, "max_completion_tokens": 2**31 - 1}, long):
        yield posted(CHAT, body, 400, INVALID, "context_length_exceeded", "messages")
    for prompt, limit in (([7] * MODEL_CONTEXT, 1), ([[7], [7] * (MODEL_CONTEXT + 1)], 1), ("abc", MODEL_CONTEXT)):
        body = {"model": MODEL, "prompt": prompt, "max_tokens": limit}
        yield posted(TEXT, body, 400, INVALID, "context_length_exceeded", "prompt")


def bodies() -> Iterator[Bad]:
    """What is no JSON object, too large, or not JSON by its headers."""
    for content, code in NO_OBJECT:
        param = "model" if code == "missing_required_parameter" else None
        yield Bad("POST", CHAT, content, 400, INVALID, code, param)
    yield Bad("POST", TEXT, b"{'model': 1}", 400, INVALID, "invalid_json")
    too_large = b" " * (MAX_BODY_BYTES + 1)
    yield Bad("POST", CHAT, too_large, 413, INVALID, "payload_too_large")
    fine = json.dumps({"model": MODEL, "messages": HI}).encode()
    for media_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        headers = {"content-type": media_type}
        yield Bad("POST", CHAT, fine, 415, INVALID, "unsupported_media_type", headers=headers)
    compressed = {**JSON, "content-encoding": "gzip"}
    yield Bad("POST", CHAT, gzip.compress(fine), 415, INVALID, "unsupported_media_type", headers=compressed)


def routes() -> Iterator[Bad]:
    """No such route, not with this method, no such model."""
    for method, path in (("GET", "/nope"), ("GET", "/"), ("POST", "/v1/embeddings"), ("POST", CHAT + "/")):
        yield Bad(method, path, b"", 404, "not_found_error", "unknown_url")
    for method, path, allow in (
        ("GET", CHAT, "POST"),
        ("PUT", TEXT, "POST"),
        ("PATCH", "/tokenize", "POST"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("POST", "/health", "GET, HEAD"),
    ):
        yield Bad(method, path, b"", 405, INVALID, "method_not_allowed", allow=allow)
    for path, body in (
        (CHAT, {"model": "gpt-4", "messages": HI}),
        (TEXT, {"model": MODEL.upper(), "prompt": "hi"}),
        ("/tokenize", {"model": "../" + MODEL, "prompt": "hi"}),
    ):
        yield posted(path, body, 404, "not_found_error", "model_not_found", "model")
    yield Bad("GET", "/v1/models/gpt-4", b"", 404, "not_found_error", "model_not_found", "model")


ALL = [*fields(), *overflows(), *bodies(), *routes()]
IDS = [f"{i}-{bad.method}-{bad.path}-{bad.status}-{bad.code}-{bad.param}" for i, bad in enumerate(ALL)]


@pytest.fixture(scope="module")
def http(stack: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.url, timeout=30) as made:
        yield made


def test_there_are_enough_of_them() -> None:
    assert len(ALL) >= 60


@pytest.mark.parametrize("bad", ALL, ids=IDS)
def test_a_bad_input_is_refused_through_the_whole_stack(http: httpx.Client, bad: Bad) -> None:
    answer = http.request(bad.method, bad.path, content=bad.content, headers=bad.headers)
    assert answer.status_code == bad.status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    assert problems(answer.json(), "ErrorResponse") == []
    error = answer.json()["error"]
    assert (error["type"], error["code"], error["param"]) == (bad.type, bad.code, bad.param), error
    assert error["message"]
    if bad.allow is not None:
        assert ", ".join(sorted(answer.headers["allow"].split(", "))) == bad.allow


@pytest.mark.parametrize(
    "head",
    [
        b"nonsense\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: a\r\nno colon\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 40_000 + b"\r\n\r\n",
    ],
    ids=["request line", "header", "too many bytes"],
)
def test_what_is_no_http_is_400_and_reaches_nobody(stack: Stack, head: bytes) -> None:
    address = urlsplit(stack.url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as client:
        client.sendall(head)
        assert client.recv(100).startswith(b"HTTP/1.1 400 ")


def test_the_stack_still_answers_after_all_of_it(http: httpx.Client) -> None:
    assert http.get("/ready").status_code == 200
    body = {"model": MODEL, "messages": HI, "temperature": 0, "max_tokens": 4}
    answers = [http.post(CHAT, json=body) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert len({answer.json()["choices"][0]["message"]["content"] for answer in answers}) == 1
    assert answers[0].json()["usage"]["completion_tokens"] >= 1
