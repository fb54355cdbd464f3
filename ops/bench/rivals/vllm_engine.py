"""vLLM's AsyncLLM, by the rival's own Python: `python -m ops.bench.rivals.vllm_engine MODEL_DIR DTYPE THREADS CACHE`.

This file and `ops.bench.contestants.wire` need nothing of Warmgate's environment.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Any

from ops.bench.contestants.wire import Burst, claim_stdout, converse


async def main(model_dir: str, dtype: str, threads: str, cache: str) -> None:
    out = claim_stdout()
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS=threads, HF_HUB_OFFLINE="1"
    )
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(
        model=model_dir,
        dtype=dtype,
        max_model_len=2048,
        max_num_seqs=32,
        enable_prefix_caching=cache == "cache",
        disable_log_stats=True,
        enforce_eager=os.environ.get("WARMGATE_BENCH_VLLM_EAGER", "1") == "1",
    )
    engine: Any = AsyncLLM.from_engine_args(arguments)

    async def run(burst: Burst) -> None:
        start = time.perf_counter()

        async def one(index: int, prompt: list[int]) -> None:
            sampling = SamplingParams(
                max_tokens=burst.max_tokens,
                temperature=0.0,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            async for output in engine.generate({"prompt_token_ids": prompt}, sampling, f"{start}-{index}"):
                burst.came(index, output.outputs[0].token_ids, time.perf_counter() - start)

        await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(burst.prompts)))

    try:
        await converse(out, {"dtype": dtype, "enforce_eager": arguments.enforce_eager, "detokenize": False}, run)
    finally:
        engine.shutdown()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
