"""transformers `generate`: `python -m … MODE MODEL_DIR DTYPE THREADS CACHE`.

MODE: `sequential` (one request after the other), `static` (the burst as one batch), `dynamic` (batches of at most 8, as
a server that collects requests makes them), `continuous` (its continuous batching manager).
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from ops.bench.contestants.wire import Burst, claim_stdout, converse

DYNAMIC_BATCH = 8


class Stopwatch(BaseStreamer):
    """Notes when each token of a batch comes. `generate` puts the prompt first, which does not count."""

    def __init__(self, burst: Burst, indices: range, start: float) -> None:
        self._burst, self._indices, self._start, self._is_prompt = burst, indices, start, True

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        at_s = time.perf_counter() - self._start
        for index, token_id in zip(self._indices, value.reshape(-1).tolist(), strict=True):
            self._burst.came(index, [token_id], at_s)

    def end(self) -> None:
        return


def batches(mode: str, num_requests: int) -> list[range]:
    """Which requests run together."""
    size = {"sequential": 1, "static": num_requests, "dynamic": DYNAMIC_BATCH}[mode]
    return [range(i, min(i + size, num_requests)) for i in range(0, num_requests, size)]


def run_batches(model: Any, mode: str, burst: Burst) -> None:
    """All prompts of a burst are equally long, so nothing is padded."""
    start = time.perf_counter()
    for indices in batches(mode, len(burst.prompts)):
        watch = Stopwatch(burst, indices, start)
        rows = torch.tensor([burst.prompts[i] for i in indices])
        # Without an EOS nothing ends early, and EOS stays a token like any other, as `ignore_eos` has it elsewhere.
        fixed = {"do_sample": False, "max_new_tokens": burst.max_tokens, "eos_token_id": None, "pad_token_id": 0}
        model.generate(rows, attention_mask=torch.ones_like(rows), streamer=watch, **fixed)


class Continuous:
    """Continuous batching with a manager kept from burst to burst, as a server would: starting one takes seconds."""

    def __init__(self, model: Any, cache: str) -> None:
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        batching = ContinuousBatchingConfig(
            num_blocks=256,
            max_batch_tokens=512,
            use_cuda_graph=False,
            use_async_batching=False,
            auto_switch_to_flash=False,
            allow_block_sharing=cache == "cache",
        )
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        self._manager = model.init_continuous_batching(generation, batching)
        self._manager.start()

    def run(self, burst: Burst) -> None:
        """Each token counts at the time the manager noted for it (its clock is ours)."""
        start = time.perf_counter()
        ids = self._manager.add_requests(burst.prompts, max_new_tokens=burst.max_tokens, record_timestamps=True)
        indices = {request_id: index for index, request_id in enumerate(ids)}
        while indices:
            answer = self._manager.get_result(timeout=1)
            if answer is None and not self._manager.is_running():
                raise RuntimeError("transformers' generation thread ended")
            if answer is None or not answer.is_finished():
                continue
            index = indices.pop(answer.request_id)
            for token_id, at in zip(answer.generated_tokens, answer.timestamps, strict=True):
                burst.came(index, [token_id], at - start)

    def close(self) -> None:
        self._manager.stop(block=True)


@torch.inference_mode()
def main(mode: str, model_dir: str, dtype: str, threads: str, cache: str) -> None:
    out = claim_stdout()
    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    continuous = Continuous(model, cache) if mode == "continuous" else None

    async def run(burst: Burst) -> None:
        if continuous is None:
            run_batches(model, mode, burst)
        else:
            continuous.run(burst)

    try:
        asyncio.run(converse(out, {"dtype": dtype, "mode": mode}, run))
    finally:
        if continuous is not None:
            continuous.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
