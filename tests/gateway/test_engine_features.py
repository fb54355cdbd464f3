"""What a profile switches on in the native engine, asked for over HTTP: the answers stay those of the plain engine."""

from __future__ import annotations

from typing import Any

import pytest

from configs.schema import SpeculativeConfig
from tests.gateway.test_compose import running
from tests.gateway.test_lora import PROMPT, USER, World, host, profile, says, world
from tests.routing import conftest as routing_conftest
from tests.routing.conftest import Valkey

valkey = routing_conftest.valkey
__all__ = ["valkey", "world"]


@pytest.mark.parametrize("method", ["ngram", "lookahead"])
async def test_guessing_changes_no_token_and_is_counted(valkey: Valkey, world: World, method: Any) -> None:
    guesses = SpeculativeConfig(method=method, num_speculative_tokens=4, adaptive=False, prompt_lookup_min=1)
    async with running(profile(world, speculative=guesses), valkey) as stack:
        await host(stack)
        assert await says(stack, "m", 24) == world.says(None, 24)
        body = {"model": "m", "prompt": PROMPT * 4, "max_tokens": 24, "temperature": 0.8, "seed": 7, "ignore_eos": True}
        asked = [await stack.client.post("/v1/completions", json=body, headers=USER) for _ in range(2)]
        assert asked[0].json()["choices"] == asked[1].json()["choices"]
        (state,) = [link.stats for _, link in stack.composed.fleet.links()]
        assert state.num_drafts > 0 and state.num_draft_tokens >= state.num_accepted_tokens


@pytest.mark.parametrize("changes", [{"quantization": "int8"}, {"kv_cache_dtype": "int8"}, {"order": "fair"}], ids=str)
async def test_the_replica_serves_with(valkey: Valkey, world: World, changes: dict[str, Any]) -> None:
    async with running(profile(world, **changes), valkey) as stack:
        await host(stack)
        answer = await says(stack, "m", 8)
        assert len(answer) == 8
        assert answer[0] == world.says(None, 1)[0], "rounding changes this tiny model's first token not"
