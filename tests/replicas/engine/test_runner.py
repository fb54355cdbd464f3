"""Whole requests on tiny models: whatever the schedule, the tokens are those of transformers."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from replicas.contract import GenerateRequest, pack_tokens
from tests.replicas.engine.conftest import TinyModels
from tests.replicas.engine.driver import build, make_request, run
from tests.replicas.engine.tiny import oracle_logits, random_tokens

LENGTHS = [1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 33, 60, 100, 140]
SMALL: dict[str, Any] = {"block_size": 4, "max_num_batched_tokens": 24, "max_num_seqs": 6, "max_model_len": 200}


def greedy(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """Recomputes everything for each token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(oracle_logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def requests(**changes: Any) -> list[GenerateRequest]:
    return [make_request(str(n), random_tokens(n, seed=n), **changes) for n in LENGTHS]


@pytest.mark.parametrize("name", ["llama", "mistral with window", "qwen2 with some windows", "qwen3"])
def test_greedy_output_of_a_mixed_batch_equals_transformers(name: str, tiny_model: TinyModels) -> None:
    folder, oracle = tiny_model(name)
    answers = run(build(folder, **SMALL).core, requests())
    for n in LENGTHS:
        assert answers[str(n)].tokens == greedy(oracle, random_tokens(n, seed=n), 8), n


def test_cache_hits_do_not_change_the_tokens(tiny_model: TinyModels) -> None:
    folder, _ = tiny_model("llama")
    core = build(folder, **SMALL).core
    cold, warm = run(core, requests()), run(core, requests())
    assert [a.tokens for a in warm.values()] == [a.tokens for a in cold.values()]
    assert [a.num_cached for a in warm.values()] == [n - 1 if n % 4 == 0 else n // 4 * 4 for n in LENGTHS]
    assert {a.num_cached for a in cold.values()} == {0}


def test_preempted_requests_resume_with_identical_tokens(tiny_model: TinyModels) -> None:
    folder, _ = tiny_model("llama")
    sampled = {"temperature": 1.0, "max_tokens": 40, "frequency_penalty": 0.3}
    roomy = run(build(folder, **SMALL, prefix_caching=False).core, requests(**sampled))
    block_bytes = 3 * 4 * 2 * 2 * 16 * 4
    tight = build(folder, **SMALL, prefix_caching=False, kv_cache_gib=51 * block_bytes / 2**30)
    assert tight.facts.num_blocks == 51
    answers = run(tight.core, requests(**sampled))
    assert tight.core.scheduler.num_preemptions > 0
    assert [a.tokens for a in answers.values()] == [a.tokens for a in roomy.values()]


def test_a_request_resumed_on_another_engine_continues_identically(tiny_model: TinyModels) -> None:
    folder, _ = tiny_model("qwen2")
    settings = {"temperature": 0.9, "top_p": 0.9, "presence_penalty": 0.5, "max_tokens": 20, "seed": 2**63 - 1}
    prompt = random_tokens(30, seed=1)
    whole = run(build(folder, **SMALL).core, [make_request("a", prompt, **settings)])["a"].tokens
    for done in (1, 7, 19):
        request = make_request("b", prompt, produced=pack_tokens(whole[:done]), **settings)
        rest = run(build(folder, **SMALL).core, [request, *requests()])["b"].tokens
        assert whole[:done] + rest == whole


def test_logprobs_equal_those_of_transformers(tiny_model: TinyModels) -> None:
    folder, oracle = tiny_model("llama")
    prompt = random_tokens(37, seed=3)
    answer = run(build(folder, **SMALL).core, [make_request("a", prompt, logprobs=3), *requests()])["a"]
    raw = torch.log_softmax(oracle_logits(oracle, prompt + answer.tokens), dim=-1)[36:-1]
    for given, expected in zip(answer.logprobs, raw, strict=True):
        assert given.logprob == pytest.approx(expected[given.token_id].item(), abs=1e-4)
        assert [i for i, _ in given.top] == expected.topk(3).indices.tolist()


@pytest.mark.parametrize("length", [1, 2, 24, 25, 130])
def test_prompt_logprobs_score_every_position_across_chunks(length: int, tiny_model: TinyModels) -> None:
    folder, oracle = tiny_model("llama")
    prompt = random_tokens(length, seed=9)
    core = build(folder, **SMALL).core
    run(core, [make_request("warm", prompt)])  # a cached prefix must not swallow scores
    answer = run(core, [make_request("a", prompt, prompt_logprobs=2, max_tokens=1), *requests()])["a"]
    raw = torch.log_softmax(oracle_logits(oracle, prompt), dim=-1)
    assert answer.prompt_logprobs is not None and len(answer.prompt_logprobs) == length
    assert answer.prompt_logprobs[0] is None
    for i, given in enumerate(answer.prompt_logprobs[1:]):
        assert given is not None and given.token_id == prompt[i + 1]
        assert given.logprob == pytest.approx(raw[i, given.token_id].item(), abs=1e-4)
        assert [token_id for token_id, _ in given.top] == raw[i].topk(2).indices.tolist()


def test_seeded_sampling_does_not_depend_on_the_schedule(tiny_model: TinyModels) -> None:
    folder, _ = tiny_model("llama")
    wanted = requests(temperature=1.0, max_tokens=12)
    alone = {r.request_id: run(build(folder, **SMALL).core, [r])[r.request_id].tokens for r in wanted}
    shuffled = random.Random(1).sample(wanted, k=len(wanted))
    together = run(build(folder, **{**SMALL, "max_num_batched_tokens": 7}).core, shuffled)
    assert {name: answer.tokens for name, answer in together.items()} == alone
