"""transformers `generate`: `python -m … MODE MODEL_DIR DTYPE THREADS`.

MODE: `sequential` (one request after the other), `static` (the burst as one batch), `dynamic` (batches of at most 8, as
a server that collects requests makes them), `continuous` (`generate_batch`).
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
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
        for index in self._indices:
            self._burst.came(index, 1, time.perf_counter() - self._start)

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
        fixed = {"do_sample": False, "max_new_tokens": burst.max_tokens, "min_new_tokens": burst.max_tokens}
        if len(indices) == 1:
            model.generate(rows, attention_mask=torch.ones_like(rows), pad_token_id=0, streamer=watch, **fixed)
        else:  # a streamer takes one sequence only: all of the batch's tokens come at its end
            model.generate(rows, attention_mask=torch.ones_like(rows), pad_token_id=0, **fixed)
            for index in indices:
                burst.came(index, burst.max_tokens, time.perf_counter() - start)


def run_continuous(model: Any, burst: Burst) -> None:
    """Tokens come when the whole burst is done: `generate_batch` shows no earlier ones."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    start = time.perf_counter()
    batching = ContinuousBatchingConfig(
        num_blocks=256, max_batch_tokens=512, use_cuda_graph=False, use_async_batching=False
    )
    generation = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=burst.max_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    answers = model.generate_batch(
        burst.prompts,
        generation_config=generation,
        continuous_batching_config=batching,
        warmup=False,
        progress_bar=False,
    )
    for index, answer in enumerate(answers.values()):
        burst.came(index, len(answer.generated_tokens), time.perf_counter() - start)


@torch.inference_mode()
def main(mode: str, model_dir: str, dtype: str, threads: str) -> None:
    out = claim_stdout()
    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    act: Callable[[Burst], None] = (
        (lambda burst: run_continuous(model, burst))
        if mode == "continuous"
        else (lambda burst: run_batches(model, mode, burst))
    )

    async def run(burst: Burst) -> None:
        act(burst)

    asyncio.run(converse(out, {"dtype": dtype, "mode": mode}, run))


if __name__ == "__main__":
    main(*sys.argv[1:])
