import asyncio
import json

import pytest

from gateway.serve_edge import ServeEdge


async def call(app, *, path="/v1/models", headers=()):
    """Sends one GET through the edge; returns what left it, as (status, headers, body)."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": list(headers)}
    await ServeEdge(app)(scope, None, send)
    return sent[0]["status"], sent[0]["headers"], b"".join(m.get("body", b"") for m in sent[1:])


def answering(status, headers, *bodies):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for body in bodies:
            await send({"type": "http.response.body", "body": body})

    return app


JSON = (b"content-type", b"application/json")
TEXT = (b"content-type", b"text/plain; charset=utf-8")


async def test_the_apps_own_request_id_wins_over_serves():
    app = answering(200, [(b"x-request-id", b"ours"), JSON, (b"X-Request-ID", b"serves")], b"{}")
    _, headers, _ = await call(app)
    assert [value for name, value in headers if name.lower() == b"x-request-id"] == [b"ours"]


async def test_serves_request_id_stays_when_the_app_sets_none():
    _, headers, _ = await call(answering(200, [JSON, (b"X-Request-ID", b"serves")], b"{}"))
    assert (b"X-Request-ID", b"serves") in headers


async def test_control_headers_of_serve_do_not_reach_it():
    seen = []

    async def app(scope, receive, send):
        seen.extend(scope["headers"])
        await answering(200, [JSON], b"{}")(scope, receive, send)

    timeout, deaf = (b"x-request-timeout-seconds", b"0.01"), (b"x-request-disconnect-disabled", b"?1")
    await call(app, headers=[timeout, (b"accept", b"*/*"), deaf])
    assert seen == [(b"accept", b"*/*")]


@pytest.mark.parametrize(
    ("status", "becomes", "code"),
    [
        (404, 503, "ingress_unavailable"),
        (408, 504, "deadline_exceeded"),
        (418, 500, "internal_error"),
        (429, 429, "queue_full"),
        (500, 500, "internal_error"),
        (503, 503, "ingress_unavailable"),
    ],
)
async def test_serves_plain_text_errors_become_openai_errors(status, becomes, code):
    app = answering(status, [TEXT, (b"content-length", b"6"), (b"x-request-id", b"r")], b"sec", b"ret")
    got, headers, body = await call(app)
    names = dict(headers)
    assert got == becomes
    assert json.loads(body)["error"]["code"] == code
    assert names[b"content-type"] == b"application/json"
    assert names[b"content-length"] == str(len(body)).encode()
    assert names[b"x-request-id"] == b"r"
    assert (b"retry-after" in names) == (becomes in (429, 503))
    assert b"secret" not in body


async def test_the_apps_own_json_errors_and_plain_text_pass():
    body = b'{"error": {}}'
    assert await call(answering(404, [JSON], body)) == (404, [JSON], body)
    assert await call(answering(200, [TEXT], b"metric 1")) == (200, [TEXT], b"metric 1")


async def test_serves_health_routes_pass_untouched():
    app = answering(503, [TEXT], b"DRAINING")
    assert await call(app, path="/-/healthz") == (503, [TEXT], b"DRAINING")


async def test_an_app_that_raises_before_it_answers_gets_500_and_the_error_goes_on():
    async def app(scope, receive, send):
        raise ValueError("secret")

    sent = []

    async def send(message):
        sent.append(message)

    with pytest.raises(ValueError, match="secret"):
        await ServeEdge(app)({"type": "http", "path": "/", "headers": []}, None, send)
    assert sent[0]["status"] == 500
    assert json.loads(sent[1]["body"])["error"]["code"] == "internal_error"


async def test_an_app_that_never_answers_gets_500():
    async def app(scope, receive, send):
        await asyncio.sleep(0)

    assert (await call(app))[0] == 500


async def test_an_answer_that_broke_off_is_not_answered_twice():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [JSON]})
        raise ValueError

    sent = []

    async def send(message):
        sent.append(message)

    with pytest.raises(ValueError):
        await ServeEdge(app)({"type": "http", "path": "/", "headers": []}, None, send)
    assert [m["type"] for m in sent] == ["http.response.start"]
