"""The mock of vLLM's server with a sim engine behind it: prompts take their time, cached blocks take none.

`python -m ops.bench.mock_engine --model NAME --engine JSON` serves like `ops.bench.mock_vllm`. Scheduler and block
pool are the real ones, so the prefix cache fills, hits and evicts as a replica's does. Prompt tokens are UTF-8 bytes.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import click
import msgspec
import uvloop

from configs.schema import EngineConfig
from ops.bench.asgi import Exchange
from ops.bench.mock_vllm import Behaviour, MockVllm, crash_process, serve_forever
from ops.bench.mock_wire import Generation, GenerationBody, error_body
from replicas.contract import GenerateRequest, RefusedError, SamplingParams, pack_tokens
from replicas.local import LocalEngine
from replicas.sim_engine import sim_engine

VOCAB_SIZE = 512
"""Bytes, and room for nothing else: the answer's words are the mock's."""


class EngineVllm(MockVllm):
    """The mock, its streamed answers timed by an engine that runs already."""

    def __init__(self, behaviour: Behaviour, engine: LocalEngine) -> None:
        super().__init__(behaviour, crash_process)
        self._engine = engine

    async def _answer(self, exchange: Exchange, body: GenerationBody, generation: Generation) -> None:
        if not body.stream or generation.num_choices != 1:
            message = "the mock with an engine streams one choice"
            await exchange.answer(400, error_body(400, "BadRequestError", message))
            return
        sampling = SamplingParams(max_tokens=generation.num_tokens, seed=0, temperature=0.0, ignore_eos=True)
        request = GenerateRequest(
            request_id=generation.response_id, prompt=pack_tokens(body.prompts()[0]), sampling=sampling
        )
        try:
            await self._relay(exchange, generation, request)
        except RefusedError as error:
            await exchange.answer(400, error_body(400, "BadRequestError", error.fault.message))

    async def _relay(self, exchange: Exchange, generation: Generation, request: GenerateRequest) -> None:
        """One event a token, as the engine makes them. The answer begins with the first token, as vLLM's does."""
        steps = generation.steps()
        begun = False
        async with contextlib.aclosing(self._engine.stream(request)) as stream:
            async for delta in stream:
                if exchange.gone.is_set():
                    self.counts.aborted += 1
                    return
                if not begun:
                    begun = True
                    generation = replace(generation, num_cached=delta.num_cached_tokens or 0)
                    await exchange.begin(200, b"text/event-stream; charset=utf-8")
                    await exchange.write(generation.opening())
                self.counts.tokens += len(delta.token_ids)
                await exchange.write(b"".join(next(steps) for _ in delta.token_ids))
        await exchange.write(generation.ending(), last=True)


async def serve(model: str, worker_id: str, config: EngineConfig) -> None:
    """Serves until cancelled."""
    longest = config.max_model_len or config.sim.max_model_len
    behaviour = Behaviour(model=model, worker_id=worker_id, stop_after=longest, max_model_len=longest)
    async with LocalEngine(sim_engine(config, VOCAB_SIZE, (), model)) as engine:
        await serve_forever(EngineVllm(behaviour, engine), "127.0.0.1", 0)


@click.command()
@click.option("--model", default="mock", show_default=True)
@click.option("--worker-id", default="mock-0", show_default=True)
@click.option("--engine", default="{}", help="EngineConfig as JSON.")
def main(model: str, worker_id: str, engine: str) -> None:
    """Serve a mock of vLLM's HTTP API over a sim engine; prints one JSON line with its URL."""
    try:
        config = msgspec.json.decode(engine.encode(), type=EngineConfig)
    except msgspec.MsgspecError as error:
        raise click.BadParameter(str(error), param_hint="--engine") from error
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(serve(model, worker_id, config))


if __name__ == "__main__":
    main()
