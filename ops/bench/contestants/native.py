"""The in-house engine, in process: `python -m ops.bench.contestants.native MODEL_DIR DTYPE THREADS CACHE`."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from configs.schema import EngineConfig
from ops.bench.contestants.wire import Burst, claim_stdout, converse
from replicas.contract import GenerateRequest, SamplingParams, pack_tokens
from replicas.engine.engine import native_engine
from replicas.local import LocalEngine


async def main(model_dir: str, dtype: str, threads: str, cache: str) -> None:
    out = claim_stdout()
    sharing = cache == "cache"
    config = EngineConfig(dtype=dtype, threads=int(threads), kv_cache_gib=0.5, prefix_caching=sharing)  # type: ignore[arg-type]
    async with LocalEngine(native_engine(Path(model_dir), config, "bench")) as engine:
        facts = engine.facts
        assert facts is not None

        async def run(burst: Burst) -> None:
            start = time.perf_counter()

            async def one(index: int, prompt: list[int]) -> None:
                sampling = SamplingParams(max_tokens=burst.max_tokens, seed=index, temperature=0.0, ignore_eos=True)
                request = GenerateRequest(request_id=f"{start}-{index}", prompt=pack_tokens(prompt), sampling=sampling)
                async for delta in engine.stream(request):
                    burst.came(index, delta.token_ids, time.perf_counter() - start)

            await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(burst.prompts)))

        await converse(out, {"dtype": facts.dtype, "self_check": facts.self_check}, run)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
