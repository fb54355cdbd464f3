"""Why a request went where it went, asked of two live ingresses over a real Valkey and sim replicas."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from click.testing import CliRunner, Result

from configs.schema import AdapterConfig, ChannelConfig, Config, EngineConfig, GroupConfig, ModelConfig, SimConfig
from configs.schema import TenantConfig as Who
from ops.cli import main
from tests.gateway.test_compose import Stack, running, until, valkey
from tests.routing.conftest import Valkey

__all__ = ["valkey"]  # a fixture

MINE, OTHERS = {"authorization": "Bearer sk-a"}, {"authorization": "Bearer sk-b"}
CONFIG = Config(
    cluster="test",
    models=(ModelConfig(id="m", source="sim:bytes", default_max_tokens=4, route_block_tokens=16),),
    adapters=(AdapterConfig(name="tuned", base_model="m"),),
    groups=(GroupConfig(name="g", model="m"),),
    tenants=(Who(id="a", keys=("sk-a",)), Who(id="b", keys=("sk-b",))),
    channel=ChannelConfig(heartbeat_s=0.2, dead_after_s=2.0),
)
ENGINE = EngineConfig(kind="sim", max_num_seqs=8, sim=SimConfig(step_base_s=0.002, max_adapters=2, adapter_load_s=0.01))
DECISIONS = "/v1/routing/decisions/"


@pytest.fixture
async def two(valkey: Valkey) -> AsyncIterator[tuple[Stack, Stack]]:
    """Two ingresses before the same two replicas."""
    async with running(CONFIG, valkey) as one, running(CONFIG, valkey) as other:
        for _ in range(2):
            await one.host("m", ENGINE)
        await until(lambda: other.num_ready == 2)
        yield one, other


async def chat(stack: Stack, **fields: Any) -> httpx.Response:
    headers = {**MINE, **fields.pop("headers", {})}
    body = {"model": "m", "messages": [{"role": "user", "content": "hello " * 20}], "ignore_eos": True, **fields}
    answer = await stack.client.post("/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


async def ask(stack: Stack, asked_id: str, headers: dict[str, str] = MINE) -> httpx.Response:
    return await stack.client.get(DECISIONS + asked_id, headers=headers)


async def test_whichever_ingress_is_asked_every_id_of_a_request_leads_to_its_decisions(
    two: tuple[Stack, Stack],
) -> None:
    one, _ = two
    answer = await chat(one, n=2)
    request_id, answer_id = answer.headers["x-request-id"], answer.json()["id"]
    assert request_id.startswith(one.composed.gateway.ingress_id + "-")
    for stack in two:
        for asked_id, choices in (
            (request_id, {0, 1}),
            (answer_id, {0, 1}),
            (f"{request_id}-1", {1}),
            (f"{answer_id}-0", {0}),
        ):
            found = await ask(stack, asked_id)
            assert found.status_code == 200, found.text
            told = found.json()
            assert (told["request_id"], told["ingress_id"]) == (request_id, one.composed.gateway.ingress_id)
            assert {decision["choice"] for decision in told["decisions"]} == choices
            replicas = {decision["replica_id"] for decision in told["decisions"]}
            assert replicas <= set(answer.headers["x-warmgate-replica"].split(","))
            for decision in told["decisions"]:
                assert {c["replica_id"] for c in decision["candidates"]} == {"m-0", "m-1"}
                assert all(c["filtered"] or "prefill" in c["terms_s"] for c in decision["candidates"])


async def test_a_request_is_also_found_by_the_id_its_client_gave_it(two: tuple[Stack, Stack]) -> None:
    one, other = two
    answer = await chat(one, headers={"x-request-id": "trace/7:a"})
    assert answer.headers["x-request-id"] == "trace/7:a"
    for stack in (one, other):
        found = await ask(stack, "trace%2F7:a")
        assert found.status_code == 200, found.text
        assert found.json()["request_id"] in answer.json()["id"]


async def test_another_tenants_request_is_as_unknown_as_none_at_all(two: tuple[Stack, Stack]) -> None:
    one, other = two
    answer = await chat(one, headers={"x-request-id": "trace-8"})
    none_at_all = answer.json()["id"].replace(answer.json()["id"][-6:], "ffffff")
    for stack in (one, other):
        refusals = [await ask(stack, answer.json()["id"], OTHERS), await ask(stack, none_at_all)]
        refusals += [await ask(stack, "trace-8", OTHERS), await ask(stack, "x" * 2000)]
        for refused in refusals:
            assert refused.status_code == 404
            error = refused.json()["error"]
            assert (error["type"], error["code"], error["param"]) == ("not_found_error", "decision_not_found", None)
    assert (await ask(one, answer.json()["id"], {})).status_code == 401


async def test_an_owner_that_is_gone_is_named_and_its_decisions_with_it(two: tuple[Stack, Stack]) -> None:
    one, other = two
    answer = await chat(one)
    await one.composed.close()
    refused = await ask(other, answer.json()["id"])
    assert refused.status_code == 404
    message = refused.json()["error"]["message"]
    assert one.composed.gateway.ingress_id in message and "does not answer" in message


async def test_with_redis_gone_an_ingress_still_explains_its_own(two: tuple[Stack, Stack]) -> None:
    one, other = two
    answer = await chat(one)
    one.valkey.kill()
    assert (await ask(one, answer.json()["id"])).status_code == 200
    refused = await ask(other, answer.json()["id"])
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "ingress_unreachable")
    assert refused.headers["retry-after"] == "1"
    assert (await chat(other)).status_code == 200


async def test_what_was_cached_is_in_the_header_as_in_the_usage(two: tuple[Stack, Stack]) -> None:
    one, _ = two
    first = await chat(one)
    assert first.headers["x-warmgate-cached-tokens"] == "0"
    for _ in range(3):  # on both replicas at the latest
        second = await chat(one)
    cached = second.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > 64 and second.headers["x-warmgate-cached-tokens"] == str(cached)
    streamed = await chat(one, stream=True, stream_options={"include_usage": True})
    usage = json.loads(streamed.text.split("data: ")[-2])["usage"]
    told = usage["prompt_tokens_details"]["cached_tokens"]
    assert streamed.headers["x-warmgate-cached-tokens"] == str(told)


async def test_the_explanation_says_what_the_router_believed_to_be_cached(two: tuple[Stack, Stack]) -> None:
    one, _ = two
    first = await chat(one)
    warm_id = first.headers["x-warmgate-replica"]
    for _ in range(50):  # a busy machine's events may be too late to be believed
        again = await chat(one)
        (decision,) = (await ask(one, again.json()["id"])).json()["decisions"]
        matched = {c["replica_id"]: c["matched_tokens"] for c in decision["candidates"]}
        if matched.get(warm_id, 0) > 64:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"{matched=}")


async def test_where_an_adapter_was_is_told(two: tuple[Stack, Stack]) -> None:
    one, other = two
    for _ in range(2):
        answer = await chat(one, model="tuned")
    told = (await ask(other, answer.json()["id"])).json()
    assert (told["model"], told["adapter"]) == ("m", "tuned@1")
    states = {c["replica_id"]: c["adapter"] for c in told["decisions"][0]["candidates"]}
    assert states[told["decisions"][0]["replica_id"]] == "resident"


async def warmgate(*args: str) -> Result:
    """The command, in a thread: it speaks plain blocking HTTP."""
    return await asyncio.to_thread(CliRunner().invoke, main, args)


async def test_the_command_shows_a_table_a_decision_with_the_winner_marked(two: tuple[Stack, Stack]) -> None:
    one, other = two
    answer = await chat(one)
    place = ("--url", str(other.client.base_url), "--key", "sk-a")
    done = await warmgate("explain", answer.json()["id"], *place)
    assert done.exit_code == 0, done.output
    winner = answer.headers["x-warmgate-replica"]
    (marked,) = [line for line in done.output.splitlines() if line.startswith("→")]
    assert winner in marked
    assert len(re.findall(r"^(?:→|\s) +m-\d ", done.output, re.MULTILINE)) == 2
    header = next(line for line in done.output.splitlines() if "replica" in line and "cost" in line)
    assert "prefill" in header and "cached" in header
    as_json = await warmgate("explain", answer.json()["id"], "--json", *place)
    assert json.loads(as_json.output) == (await ask(one, answer.json()["id"])).json()
    unknown = await warmgate("explain", "nothing", *place)
    assert unknown.exit_code == 1
    assert unknown.output.startswith("error: No routing decision is known") and unknown.output.count("\n") == 1
