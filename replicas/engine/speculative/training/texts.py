"""Text to train drafters on: the model's own, since it is the model's own that they will have to guess.

An aligned model that is given nothing but the beginning of a user's turn writes the turn, then answers it (Magpie, Xu
et al. 2024): so no data set is needed, and what it says in use is what it says here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from replicas.contract import GenerateRequest, SamplingParams, pack_tokens
from replicas.engine.core import EngineCore
from replicas.engine.runner import TorchRunner

Progress = Callable[[str], None]
"""Called with words for a progress display."""


@dataclass(frozen=True, slots=True)
class TextPlan:
    """How much is said: `num_tokens` in all, in texts of `max_tokens`, from the prompts in turn."""

    num_tokens: int
    max_tokens: int = 256
    temperatures: tuple[float, ...] = (0.7, 1.0)
    top_p: float = 0.95
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Text:
    """What the model said after a prompt. `features[i]` is what `tokens[first + i]` was drawn from.

    tokens: [num_tokens] int64; features: [num_tokens - first, hidden] float16.
    """

    tokens: Tensor
    first: int
    features: Tensor


class FeatureLog:
    """A tap that keeps everything, in half precision."""

    def __init__(self) -> None:
        self.by_request: dict[str, list[Tensor]] = {}

    def take(self, request_id: str, position: int, feature: Tensor) -> None:
        """See `FeatureTap`."""
        self.by_request.setdefault(request_id, []).append(feature.to("cpu", torch.float16))


def generate(core: EngineCore, prompts: Sequence[Sequence[int]], plan: TextPlan, progress: Progress) -> list[Text]:
    """Lets the engine speak. It must be the native one, without speculation, and have nothing else to do."""
    runner = core.runner
    assert isinstance(runner, TorchRunner) and core.speculator is None and not core.has_work
    log = runner.tap = FeatureLog()
    try:
        return list(_say_all(core, prompts, plan, log, progress))
    finally:
        runner.tap = None


def _say_all(
    core: EngineCore, prompts: Sequence[Sequence[int]], plan: TextPlan, log: FeatureLog, progress: Progress
) -> list[Text]:
    num_texts = -(-plan.num_tokens // plan.max_tokens)
    said: dict[str, list[int]] = {}
    texts: list[Text] = []
    while len(texts) < num_texts:
        while len(said) < num_texts and len(said) - len(texts) < 2 * core.scheduler.max_running:
            request = _request(len(said), prompts, plan)
            core.add(request)
            said[request.request_id] = list(prompts[len(said) % len(prompts)])
        for delta in core.step():
            said[delta.request_id] += delta.token_ids
            if delta.finish_reason is not None:
                assert delta.fault is None, delta.fault
                features = torch.stack(log.by_request.pop(delta.request_id))
                tokens = torch.tensor(said[delta.request_id])
                texts.append(Text(tokens, len(tokens) - len(features), features))
                progress(f"said {len(texts) * plan.max_tokens} of {plan.num_tokens} tokens")
    return texts


def _request(number: int, prompts: Sequence[Sequence[int]], plan: TextPlan) -> GenerateRequest:
    sampling = SamplingParams(
        max_tokens=plan.max_tokens,
        seed=plan.seed + number,
        temperature=plan.temperatures[number % len(plan.temperatures)],
        top_p=plan.top_p,
        ignore_eos=True,  # a turn ends, and the next begins
    )
    prompt = pack_tokens(prompts[number % len(prompts)])
    return GenerateRequest(request_id=str(number), prompt=prompt, sampling=sampling)


def likeliest_tokens(texts: Sequence[Text], count: int, vocab_size: int) -> Tensor:
    """The tokens said most often, most frequent first; ties and what was never said by id. [count] int64."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for text in texts:
        said = text.tokens[text.first :]
        counts.index_add_(0, said, torch.ones_like(said))
    return torch.argsort(counts, descending=True, stable=True)[:count]


def has_fast_bfloat16() -> bool:
    """Whether this processor trains several times as fast in bfloat16."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
