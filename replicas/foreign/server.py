"""Getting to know a server that runs already: whether it is there, which one it is, what it has and what it takes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from configs.schema import EngineConfig, UpstreamConfig
from configs.tokenizer import ModelFiles
from replicas.contract import EngineError, EngineFacts
from replicas.foreign.flavours import Flavour, flavour_of, kv_tokens

logger = logging.getLogger(__name__)

RETRY_S = 2.0
_KV_TOKENS = 262_144
_LOOK_S = 10.0
_REFUSALS = (httpx.codes.BAD_REQUEST, httpx.codes.UNSUPPORTED_MEDIA_TYPE, httpx.codes.UNPROCESSABLE_ENTITY)
"""Statuses that mean a body is not understood; others may pass."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """A server, and the model it serves as our files know it."""

    config: EngineConfig
    files: ModelFiles
    name: str

    @property
    def place(self) -> UpstreamConfig:
        assert self.config.upstream is not None, "the profile's checks have looked"
        return self.config.upstream


@dataclass(frozen=True, slots=True)
class Server:
    """What was found. `model`: its name there."""

    flavour: Flavour
    model: str
    facts: EngineFacts


async def get_to_know(client: httpx.AsyncClient, upstream: Upstream) -> Server:
    """Waits for the server, however long that takes. Raises EngineError when it lacks the model, or takes no prompts
    as token ids."""
    await _reached(client, upstream.place.url)
    cards = await _models(client, upstream.place.url)
    model = upstream.place.model or next(iter(cards), "")
    if model not in cards:
        raise EngineError(f"{upstream.place.url} has no model {model!r}; it has: {', '.join(cards) or 'none'}")
    flavour = await flavour_of(client, cards[model])
    if upstream.config.self_check:
        await _takes_token_ids(client, upstream.place.url, model)
    held = upstream.place.kv_tokens or await _kv_tokens(client) or _KV_TOKENS
    return Server(flavour, model, _facts(upstream, flavour, cards[model], held))


async def _reached(client: httpx.AsyncClient, url: str) -> None:
    misses = 0
    while True:
        try:
            status = (await client.get("/health", timeout=_LOOK_S)).status_code
            if status < 500:  # also where there is no such route
                return
            why = f"/health answers {status}"
        except httpx.HTTPError as error:
            why = f"{type(error).__name__}: {error}"
        if not misses:
            logger.warning("waiting for %s: %s", url, why)
        misses += 1
        await asyncio.sleep(RETRY_S)


async def _models(client: httpx.AsyncClient, url: str) -> dict[str, Mapping[str, Any]]:
    """What `/v1/models` lists, by id."""
    try:
        reply = await client.get("/v1/models", timeout=_LOOK_S)
        return {str(card["id"]): card for card in reply.raise_for_status().json()["data"]}
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise EngineError(f"{url}/v1/models: {error or type(error).__name__}") from error


async def _takes_token_ids(client: httpx.AsyncClient, url: str, model: str) -> None:
    """Asks for one token: better a replica that does not start than one that fails every request."""
    with contextlib.suppress(httpx.HTTPError):  # its health is looked at elsewhere
        reply = await client.post("/v1/completions", json={"model": model, "prompt": [1], "max_tokens": 1}, timeout=60)
        if reply.status_code in _REFUSALS:
            raise EngineError(
                f"{url} takes no prompts as token ids, which OpenAI's /v1/completions has and this gateway sends: "
                f"{reply.status_code} {reply.text[:200]}"
            )


async def _kv_tokens(client: httpx.AsyncClient) -> int | None:
    with contextlib.suppress(httpx.HTTPError, ValueError):
        return kv_tokens((await client.get("/metrics", timeout=_LOOK_S)).text)
    return None


def _facts(upstream: Upstream, flavour: Flavour, card: Mapping[str, Any], held: int) -> EngineFacts:
    """`held`: tokens that its cache holds."""
    config, files = upstream.config, upstream.files
    found = card.get("max_model_len")
    longest = found if isinstance(found, int) else config.max_model_len or files.max_model_len or 4096
    return EngineFacts(
        engine=flavour.name,
        model=upstream.name,
        vocab_size=files.vocab_size,
        max_model_len=min(longest, config.max_model_len or longest),
        block_size=config.block_size,
        num_blocks=max(1, held // config.block_size),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        eos_token_ids=files.special.eos,
        device="upstream",
        structured=flavour.structured and config.structured,
        events=config.prefix_caching,
    )
