"""What is true of every path: errors, ids, limits, probes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from msgspec.structs import replace

from configs.schema import AdmissionConfig, HttpConfig, TenantConfig
from gateway.errors import QueueFullError, UnavailableError
from tests.gateway.openai_schema import problems
from tests.gateway.scripted import FACTS, Options, serve, spoken

CHAT = "/v1/chat/completions"
BODY = {"model": "sim", "messages": [{"role": "user", "content": "hi"}]}
KEYED = Options(tenants=(TenantConfig(id="a", keys=("sk-a",), models=("sim",)),))


@pytest.mark.parametrize("path", ["/", "/nope", "/v1/chat/completions/", "/v1/embeddings", "/docs/x"])
async def test_unknown_path_is_404_with_our_body(path: str) -> None:
    async with serve().client() as client:
        answer = await client.post(path, json=BODY)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "unknown_url"
    assert problems(answer.json(), "ErrorResponse") == []
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(("method", "path", "allow"), [("GET", CHAT, "POST"), ("DELETE", "/v1/models", "GET, HEAD")])
async def test_wrong_method_is_405_and_names_the_right_ones(method: str, path: str, allow: str) -> None:
    async with serve().client() as client:
        answer = await client.request(method, path)
    assert answer.status_code == 405
    assert sorted(answer.headers["allow"].split(", ")) == allow.split(", ")
    assert answer.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-encoding": "gzip"},
    ],
)
async def test_anything_but_plain_json_is_415(headers: dict[str, str]) -> None:
    async with serve().client() as client:
        answer = await client.post(
            CHAT, content=json.dumps(BODY), headers={"content-type": "application/json"} | headers
        )
    assert answer.status_code == 415
    assert answer.json()["error"]["code"] == "unsupported_media_type"


@pytest.mark.parametrize("media_type", [None, "application/json; charset=utf-8", "Application/JSON"])
async def test_json_is_taken_however_it_is_declared(media_type: str | None) -> None:
    headers = {} if media_type is None else {"content-type": media_type}
    async with serve().client() as client:
        answer = await client.post(CHAT, content=json.dumps(BODY), headers=headers)
    assert answer.status_code == 200


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream", "image/png", "*/*"])
async def test_accept_decides_nothing(accept: str) -> None:
    async with serve().client(accept=accept) as client:
        stream = await client.post(CHAT, json={**BODY, "stream": True})
        plain = await client.post(CHAT, json=BODY)
    assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert plain.headers["content-type"] == "application/json"


async def test_a_body_too_large_is_413_declared_or_streamed() -> None:
    served = serve(options=Options(admission=AdmissionConfig(max_body_bytes=1000)))

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 100

    async with served.client() as client:
        declared = await client.post(CHAT, content=b" " * 1001)
        streamed = await client.post(CHAT, content=chunks())
        fitting = await client.post(CHAT, json=BODY)
    assert [declared.status_code, streamed.status_code, fitting.status_code] == [413, 413, 200]
    assert declared.json()["error"]["code"] == streamed.json()["error"]["code"] == "payload_too_large"


@pytest.mark.parametrize(("sent", "echoed"), [("trace-1:a/b", True), ("a" * 129, False), ("a b", False), ("", False)])
async def test_a_sane_request_id_is_echoed_and_ours_stays_unique(sent: str, echoed: bool) -> None:
    served = serve()
    async with served.client(**{"x-request-id": sent}) as client:
        answers = [await client.post(CHAT, json=BODY) for _ in range(2)]
        missing = await client.get("/nope")
    assert all((answer.headers["x-request-id"] == sent) == echoed for answer in [*answers, missing])
    assert len({job.request_id for job in served.dispatcher.jobs}) == 2
    assert all(job.request_id.startswith("in1-") for job in served.dispatcher.jobs)
    assert served.ledger.records[0].client_request_id == (sent if echoed else None)


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/tokenize", "/detokenize"])
async def test_posts_without_a_key_are_401(path: str) -> None:
    served = serve(options=KEYED)
    async with served.client() as client:
        answer = await client.post(path, json=BODY)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert served.ledger.records == []
    assert 'status="401"' in served.gateway.metrics.exposition().decode()


async def test_models_are_those_a_tenant_may_use_aliases_included() -> None:
    async with serve(options=KEYED).client(authorization="Bearer sk-a") as client:
        listed = (await client.get("/v1/models")).json()
        alias = await client.get("/v1/models/org/sim-model")
        forbidden = await client.get("/v1/models/other")
        asked = await client.post(CHAT, json={**BODY, "model": "other"})
    assert [card["id"] for card in listed["data"]] == ["sim", "org/sim-model"]
    assert problems(listed, "ListModelsResponse") == []
    assert alias.json()["root"] == "sim" and alias.json()["max_model_len"] == 512
    assert forbidden.status_code == asked.status_code == 404
    assert asked.json()["error"]["code"] == "model_not_found"
    assert asked.json()["error"]["param"] == "model"


async def test_unknown_model_is_404() -> None:
    async with serve().client() as client:
        answer = await client.post(CHAT, json={**BODY, "model": "gpt-9"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


async def test_probes_need_no_key_and_ready_needs_a_replica_for_every_model() -> None:
    served = serve(options=KEYED)
    async with served.client() as client:
        ready = await client.get("/ready")
        served.dispatcher.ready = 0
        waiting = await client.get("/ready")
        alive = await client.get("/health")
        version = await client.get("/version")
        head = await client.head("/metrics")
        metrics = await client.get("/metrics")
    assert (ready.status_code, waiting.status_code, alive.status_code) == (200, 503, 200)
    assert "sim, other" in waiting.json()["error"]["message"]
    assert waiting.headers["retry-after"] == "1"
    assert version.json()["version"]
    assert (head.status_code, head.content) == (200, b"")
    assert metrics.headers["content-type"].startswith("text/plain; version=")
    assert "warmgate_requests_total" in metrics.text


async def test_a_model_whose_replicas_were_never_seen_is_503() -> None:
    async with serve(options=Options(facts=None)).client() as client:
        answer = await client.post(CHAT, json=BODY)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_replica_available")
    assert answer.headers["retry-after"] == "5"


async def test_what_is_unexpected_is_500_and_leaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    served = serve(lambda job: [RuntimeError("secret detail")])
    async with served.client() as client:
        answer = await client.post(CHAT, json=BODY)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in answer.text
    assert served.ledger.records[0].request_id in caplog.text
    assert "secret detail" in caplog.text


@pytest.mark.parametrize(
    ("error", "status"),
    [(QueueFullError("full", retry_after_s=0.25), 429), (UnavailableError("none", retry_after_s=2), 503)],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_before_the_first_delta_are_statuses(error: Exception, status: int, stream: bool) -> None:
    served = serve(lambda job: [error])
    async with served.client() as client:
        answer = await client.post(CHAT, json={**BODY, "stream": stream})
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert int(answer.headers["retry-after"]) >= 1 and int(answer.headers["retry-after-ms"]) >= 1
    assert served.ledger.records[0].outcome == "refused"


async def test_quota_is_told_in_headers_and_enforced() -> None:
    tenant = TenantConfig(id="a", anonymous=True, requests_per_minute=2, tokens_per_minute=1000, max_concurrent=4)
    served = serve(options=Options(tenants=(tenant,)))
    async with served.client() as client:
        first = await client.post(CHAT, json=BODY)
        await client.post(CHAT, json=BODY)
        third = await client.post(CHAT, json=BODY)
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-remaining-tokens"] == str(1000 - 21)
    assert (third.status_code, third.json()["error"]["type"]) == (429, "rate_limit_error")
    assert third.headers["retry-after"] == "30"
    assert served.gateway.tenants.quota(served.dispatcher.jobs[0].tenant).num_open == 0
    assert 'warmgate_refusals_total{reason="rate_limit_exceeded"} 1.0' in served.gateway.metrics.exposition().decode()


async def test_docs_show_the_schemas_that_requests_are_decoded_into() -> None:
    async with serve().client() as client:
        page = await client.get("/docs")
        document = (await client.get("/openapi.json")).json()
    assert page.status_code == 200 and "swagger" in page.text
    temperature = document["components"]["schemas"]["ChatRequest"]["properties"]["temperature"]
    assert {"type": "number", "minimum": 0, "maximum": 2} in temperature["anyOf"]
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    assert body["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ChatRequest"}
    told = document["paths"]["/v1/routing/decisions/{request_id}"]["get"]
    assert [(p["name"], p["in"]) for p in told["parameters"]] == [("request_id", "path")]
    assert told["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith("/Explanation")
    assert "terms_s" in document["components"]["schemas"]["ShownCandidate"]["properties"]


async def test_tokenize_and_detokenize_have_vllms_shapes() -> None:
    async with serve().client() as client:
        plain = await client.post("/tokenize", json={"model": "sim", "prompt": "hé", "return_token_strs": True})
        chat = await client.post("/tokenize", json={**BODY, "add_generation_prompt": False})
        back = await client.post("/detokenize", json={"model": "sim", "tokens": plain.json()["tokens"]})
    assert plain.json() == {
        "count": 3,
        "max_model_len": 512,
        "tokens": [104, 195, 169],
        "token_strs": ["h", "\\xc3", "\\xa9"],
    }
    assert chat.json()["count"] == 10 and chat.json()["token_strs"] is None
    assert back.json() == {"prompt": "hé"}


async def test_tokenize_needs_no_model_where_there_is_only_one() -> None:
    options = Options(models=(Options().models[0],))
    async with serve(options=options).client() as client:
        answer = await client.post("/tokenize", json={"prompt": "a"})
    assert answer.json()["tokens"] == [97]


async def test_every_request_of_a_tenant_leaves_exactly_one_record() -> None:
    served = serve(lambda job: spoken(job))
    async with served.client() as client:
        await client.post(CHAT, json={**BODY, "n": 3})
        await client.post(CHAT, json={**BODY, "stream": True, "user": "u-1"}, headers={"x-request-id": "trace-9"})
        await client.post(CHAT, json={**BODY, "temperature": 9})
        await client.post("/v1/completions", json={"model": "sim", "prompt": ["a", "b"]})
        await client.get("/v1/models")
    fanned, streamed, refused, listed = served.ledger.records
    assert (fanned.num_choices, fanned.num_prompt_tokens, fanned.num_completion_tokens) == (3, 21, 39)
    assert fanned.outcome == streamed.outcome == "ok"
    assert (streamed.stream, streamed.user, streamed.client_request_id) == (True, "u-1", "trace-9")
    assert (refused.outcome, refused.status, refused.code) == ("refused", 400, "invalid_value")
    assert (listed.num_choices, listed.num_prompt_tokens, listed.route) == (2, 2, "completions")


async def test_priority_is_bounded_by_the_tenants_ceiling() -> None:
    served = serve(options=Options(tenants=(TenantConfig(id="a", anonymous=True, max_priority=-3),)))
    async with served.client() as client:
        for priority in (-100, -2, 5, None):
            await client.post(CHAT, json={**BODY, "priority": priority})
    assert [job.priority for job in served.dispatcher.jobs] == [-3, -2, 5, 0]


async def test_a_tenants_patience_becomes_the_deadline_of_its_jobs() -> None:
    patient, hasty = TenantConfig(id="a", keys=("k-a",)), TenantConfig(id="b", keys=("k-b",), max_wait_s=2.5)
    served = serve(options=Options(tenants=(patient, hasty), admission=AdmissionConfig(max_wait_s=30.0)))
    for key in ("k-a", "k-b"):
        async with served.client(authorization=f"Bearer {key}") as client:
            await client.post(CHAT, json=BODY)
    now = served.clock()
    assert [job.deadline for job in served.dispatcher.jobs] == [None, now + 2.5]


async def test_engine_limits_bound_what_may_be_asked() -> None:
    facts = replace(FACTS, max_logprobs=3, prompt_logprobs=False)
    async with serve(options=Options(facts=facts)).client() as client:
        many = await client.post(CHAT, json={**BODY, "logprobs": True, "top_logprobs": 4})
        scored = await client.post("/v1/completions", json={"model": "sim", "prompt": "a", "echo": True, "logprobs": 1})
    assert many.status_code == scored.status_code == 400
    assert scored.json()["error"]["code"] == "unsupported_parameter"


async def test_a_server_whose_receive_fails_is_a_client_that_is_gone() -> None:
    served = serve(lambda job: [asyncio.Event()])
    body = json.dumps(BODY).encode()
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])
    sent: list[object] = []

    async def receive() -> dict[str, object]:
        for message in messages:
            return message
        raise ConnectionError("the proxy died")

    async def send(message: object) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [], "query_string": b""}
    await served.app(scope, receive, send)  # type: ignore[arg-type]
    assert sent == []
    assert served.ledger.records[0].outcome == "cancelled"
    assert len(served.dispatcher.cancelled) == 1


async def test_an_answer_names_its_replica_and_its_ingress() -> None:
    body = {"model": "sim", "messages": [{"role": "user", "content": "hi"}], "n": 2}
    async with serve().client() as client:
        for stream in (False, True):
            answer = await client.post("/v1/chat/completions", json={**body, "stream": stream})
            assert answer.headers["x-warmgate-replica"] == "scripted-0"
            assert answer.headers["x-warmgate-ingress"] == "in1"


async def test_an_answer_names_its_replica_as_other_routers_do_where_the_profile_asks_for_it() -> None:
    for asked in (False, True):
        async with serve(options=Options(http=HttpConfig(worker_id_header=asked))).client() as client:
            answers = [await client.post(CHAT, json={**BODY, "stream": stream}) for stream in (False, True)]
        assert [answer.headers.get("x-worker-id") for answer in answers] == ["scripted-0" if asked else None] * 2
        assert all(answer.headers["x-warmgate-replica"] == "scripted-0" for answer in answers)
