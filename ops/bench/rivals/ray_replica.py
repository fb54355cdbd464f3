"""A sim engine as a plain Ray Serve deployment: what Ray's own request routers are tried before."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import msgspec
from ray import serve

from configs.schema import EngineConfig
from replicas.contract import GenerateRequest, SamplingParams, pack_tokens
from replicas.local import LocalEngine
from replicas.sim_engine import sim_engine

VOCAB_SIZE = 512


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request as Ray's routers look at it: by its attribute `prompt`."""

    request_id: str
    prompt: str
    max_tokens: int


class SimReplica:
    """One replica. Its stream has two pieces: (its name, cached tokens) with the first token, the tokens at the end."""

    async def __init__(self, engine_json: bytes) -> None:  # type: ignore[misc]  # Serve awaits it
        config = msgspec.json.decode(engine_json, type=EngineConfig)
        self._engine = LocalEngine(sim_engine(config, VOCAB_SIZE, (), "sim"))
        await self._engine.start()
        self._name: str = serve.get_replica_context().replica_id.unique_id

    async def generate(self, prompt: Prompt) -> AsyncIterator[tuple[str, int] | int]:
        sampling = SamplingParams(max_tokens=prompt.max_tokens, seed=0, temperature=0.0, ignore_eos=True)
        tokens = pack_tokens(list(prompt.prompt.encode()))
        request = GenerateRequest(request_id=prompt.request_id, prompt=tokens, sampling=sampling)
        num_tokens = 0
        async for delta in self._engine.stream(request):
            if not num_tokens:
                yield self._name, delta.num_cached_tokens or 0
            num_tokens += len(delta.token_ids)
        yield num_tokens
