"""Adapters in the engine: equal to merged weights whatever the schedule, and no token of another's."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import replicas.engine.engine as engine_module
import replicas.engine.lora.setup as lora_setup
from configs.schema import EngineConfig
from replicas.contract import EngineError, GenerateRequest, RefusedError, StepDelta, pack_tokens
from replicas.engine.core import EngineCore
from replicas.engine.engine import native_engine
from replicas.engine.families import spec_from_config
from replicas.engine.loop import BuiltEngine
from replicas.engine.lora.layout import shapes_of
from replicas.engine.lora.pool import page_bytes
from replicas.engine.lora.product import Gathered, InPlace, ShortProducts
from replicas.engine.lora.store import LoraStore
from tests.replicas.engine.conftest import TinyModels
from tests.replicas.engine.driver import Answer, build, make_request, run
from tests.replicas.engine.lora_kit import LINEAR, Written, write_adapter
from tests.replicas.engine.test_runner import SMALL, greedy
from tests.replicas.engine.tiny import oracle_logits, random_tokens

FAMILY = "llama with biases"
WITH_LORA: dict[str, Any] = {**SMALL, "max_adapters": 6, "max_lora_rank": 128, "max_num_seqs": 12}
KINDS: dict[str, dict[str, Any]] = {
    "r4": {"rank": 4},
    "r8 of attention": {"rank": 8, "modules": ("q_proj", "v_proj")},
    "r16 stabilised": {"rank": 16, "use_rslora": True},
    "r32 with patterns": {"rank": 32, "rank_pattern": {"k_proj": 5, "up_proj": 48}, "alpha_pattern": {"o_proj": 7}},
    "r128": {"rank": 128, "dtype": torch.bfloat16},
    "one layer": {"rank": 8, "modules": ("down_proj", "gate_proj", "k_proj"), "layers": [1]},
}


@pytest.fixture(scope="module")
def adapters(tiny_model: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    _, model = tiny_model(FAMILY)
    folder = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(folder / name, model, **about) for name, about in KINDS.items()}


@pytest.fixture(scope="module")
def oracles(tiny_model: TinyModels, adapters: dict[str, Written]) -> dict[str | None, PreTrainedModel]:
    """The base model, and one model merged with each adapter."""
    _, model = tiny_model(FAMILY)
    return {None: model, **{name: written.merged(model) for name, written in adapters.items()}}


def loaded(folder: Path, adapters: dict[str, Written], **changes: Any) -> BuiltEngine:
    """An engine that has all of them."""
    engine = build(folder, **{**WITH_LORA, **changes})
    for name, written in adapters.items():
        engine.core.load_adapter(written.spec(name))
    return engine


def mixed(adapters: dict[str, Written], **changes: Any) -> list[GenerateRequest]:
    """Every adapter and the base model, with prompts of every kind: one token, a block, several chunks."""
    names = [None, *adapters]
    lengths = [1, 3, 4, 9, 23, 24, 25, 41, 60, 75]
    return [
        make_request(f"{i}", random_tokens(length, seed=length), adapter=names[i % len(names)], **changes)
        for i, length in enumerate(lengths + lengths[::-1])
    ]


def tokens(answers: dict[str, Answer]) -> dict[str, list[int]]:
    return {name: answer.tokens for name, answer in answers.items()}


def test_a_mixed_batch_equals_models_with_merged_weights(
    tiny_model: TinyModels, adapters: dict[str, Written], oracles: dict[str | None, PreTrainedModel]
) -> None:
    requests = mixed(adapters, logprobs=0)
    answers = run(loaded(tiny_model(FAMILY)[0], adapters).core, requests)
    for request in requests:
        prompt, answer = random_tokens(request.num_prompt_tokens, seed=request.num_prompt_tokens), answers
        own = answer[request.request_id]
        assert own.tokens == greedy(oracles[request.adapter], prompt, 8), request.adapter
        raw = torch.log_softmax(oracle_logits(oracles[request.adapter], prompt + own.tokens), dim=-1)
        for at, given_ in enumerate(own.logprobs, start=len(prompt) - 1):
            assert given_.logprob == pytest.approx(raw[at, given_.token_id].item(), abs=2e-4)


def test_adapters_change_what_is_said(
    tiny_model: TinyModels, adapters: dict[str, Written], oracles: dict[str | None, PreTrainedModel]
) -> None:
    prompt = random_tokens(30, seed=1)
    requests = [make_request(str(name), prompt, adapter=name) for name in oracles]
    said = tokens(run(loaded(tiny_model(FAMILY)[0], adapters).core, requests))
    assert len({tuple(answer) for answer in said.values()}) == len(said)


@pytest.mark.parametrize("name", ["qwen3", "qwen2", "mistral with window", "llama3 rope"])
def test_every_family_applies_them_as_merged_weights_do(name: str, tiny_model: TinyModels, tmp_path: Path) -> None:
    folder, model = tiny_model(name)
    written = write_adapter(tmp_path, model, rank=8)
    prompt = random_tokens(37, seed=3)
    core = loaded(folder, {"x": written}).core
    answers = run(core, [make_request("a", prompt, adapter="x"), make_request("b", prompt)])
    assert answers["a"].tokens == greedy(written.merged(model), prompt, 8)
    assert answers["b"].tokens == greedy(model, prompt, 8)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_num_batched_tokens": 12},
        {"prefix_caching": False},
        {"max_num_seqs": 1},
    ],
    ids=str,
)
def test_the_schedule_does_not_change_the_tokens(
    changes: dict[str, Any], tiny_model: TinyModels, adapters: dict[str, Written]
) -> None:
    folder, _ = tiny_model(FAMILY)
    expected = tokens(run(loaded(folder, adapters).core, mixed(adapters)))
    assert tokens(run(loaded(folder, adapters, **changes).core, mixed(adapters))) == expected


@pytest.mark.parametrize("short", [InPlace(), Gathered(torch.device("cpu"))], ids=["in place", "gathered"])
def test_without_compiled_kernels_the_tokens_are_the_same(
    short: ShortProducts, tiny_model: TinyModels, adapters: dict[str, Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = tiny_model(FAMILY)
    expected = tokens(run(loaded(folder, adapters).core, mixed(adapters)))
    monkeypatch.setattr(lora_setup, "_short", lambda place, kept: short)
    assert tokens(run(loaded(folder, adapters).core, mixed(adapters))) == expected


def test_cached_prefixes_are_an_adapter_s_own(tiny_model: TinyModels, adapters: dict[str, Written]) -> None:
    core = loaded(tiny_model(FAMILY)[0], adapters).core
    prompt = random_tokens(41, seed=8)
    names = [None, *adapters]
    cold = [run(core, [make_request("x", prompt, adapter=name)])["x"] for name in names]
    warm = [run(core, [make_request("x", prompt, adapter=name)])["x"] for name in names]
    assert [answer.num_cached for answer in cold] == [0] * len(names)
    assert [answer.num_cached for answer in warm] == [40] * len(names)
    assert [answer.tokens for answer in warm] == [answer.tokens for answer in cold]


def test_preempted_requests_with_adapters_resume_with_identical_tokens(
    tiny_model: TinyModels, adapters: dict[str, Written]
) -> None:
    folder, _ = tiny_model(FAMILY)
    sampled = {"temperature": 1.0, "max_tokens": 20}
    roomy = tokens(run(loaded(folder, adapters, prefix_caching=False).core, mixed(adapters, **sampled)))
    block_bytes = 3 * 4 * 2 * 2 * 16 * 4
    tight = loaded(folder, adapters, prefix_caching=False, kv_cache_gib=51 * block_bytes / 2**30)
    assert tokens(run(tight.core, mixed(adapters, **sampled))) == roomy
    assert tight.core.scheduler.num_preemptions > 0


def test_a_request_resumed_on_another_engine_continues_identically(
    tiny_model: TinyModels, adapters: dict[str, Written]
) -> None:
    folder, _ = tiny_model(FAMILY)
    prompt = random_tokens(30, seed=1)
    settings: dict[str, Any] = {"temperature": 0.9, "max_tokens": 20, "adapter": "r16 stabilised"}
    whole = run(loaded(folder, adapters).core, [make_request("a", prompt, **settings)])["a"].tokens
    for done in (1, 13):
        request = make_request("b", prompt, produced=pack_tokens(whole[:done]), **settings)
        rest = run(loaded(folder, adapters).core, [request, *mixed(adapters)])["b"].tokens
        assert whole[:done] + rest == whole


@pytest.mark.parametrize("changes", [{"lora_dtype": "bfloat16"}, {"dtype": "bfloat16"}], ids=str)
def test_bfloat16_stays_near_the_merged_model(
    changes: dict[str, str], tiny_model: TinyModels, adapters: dict[str, Written], oracles: dict[str | None, Any]
) -> None:
    core = loaded(tiny_model(FAMILY)[0], adapters, **changes).core
    requests = mixed(adapters, logprobs=0, max_tokens=4)
    answers = run(core, requests)
    tolerance = 0.05 if "lora_dtype" in changes else 0.8
    for request in requests:
        prompt = random_tokens(request.num_prompt_tokens, seed=request.num_prompt_tokens)
        own = answers[request.request_id]
        raw = torch.log_softmax(oracle_logits(oracles[request.adapter], prompt + own.tokens), dim=-1)
        for at, given_ in enumerate(own.logprobs, start=len(prompt) - 1):
            assert given_.logprob == pytest.approx(raw[at, given_.token_id].item(), abs=tolerance)


@pytest.fixture(scope="module")
def by_budget(tiny_model: TinyModels, adapters: dict[str, Written]) -> dict[int, EngineCore]:
    folder, _ = tiny_model(FAMILY)
    return {budget: loaded(folder, adapters, max_num_batched_tokens=budget).core for budget in (12, 24, 100)}


@pytest.fixture(scope="module")
def alone(tiny_model: TinyModels, adapters: dict[str, Written]) -> EngineCore:
    return loaded(tiny_model(FAMILY)[0], adapters, prefix_caching=False).core


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_whoever_shares_the_batch_an_answer_is_the_same(
    data: st.DataObject, by_budget: dict[int, EngineCore], alone: EngineCore, adapters: dict[str, Written]
) -> None:
    """No cross-talk: adapters, prompts and the budget are drawn; each request alone is the oracle."""
    names = st.sampled_from([None, *adapters])
    wanted = data.draw(st.lists(st.tuples(names, st.integers(1, 50)), min_size=2, max_size=8))
    core = by_budget[data.draw(st.sampled_from([12, 24, 100]))]
    requests = [
        make_request(f"{i}", random_tokens(length, seed=i), adapter=name, max_tokens=4)
        for i, (name, length) in enumerate(wanted)
    ]
    together = tokens(run(core, requests))
    for request in requests:
        assert run(alone, [request])[request.request_id].tokens == together[request.request_id]


def test_a_plain_batch_never_touches_the_pool(tiny_model: TinyModels, adapters: dict[str, Written]) -> None:
    engine = loaded(tiny_model(FAMILY)[0], adapters)
    store = engine.core.adapters
    store.rows = lambda spans: pytest.fail("a batch without adapters asked for rows")  # type: ignore[union-attr]
    run(engine.core, [make_request(f"{n}", random_tokens(n, seed=n)) for n in (1, 9, 30)])


def test_loads_and_unloads_between_steps_disturb_nobody(tiny_model: TinyModels, adapters: dict[str, Written]) -> None:
    """Adapters come and go through a pool with room for three while one request decodes."""
    folder, _ = tiny_model(FAMILY)
    small = {name: adapters[name] for name in ("r4", "r8 of attention", "r16 stabilised", "one layer")}
    request = make_request("a", random_tokens(20, seed=4), adapter="r4", max_tokens=60)
    expected = run(loaded(folder, small).core, [request])["a"].tokens
    rank_bytes = page_bytes_of(folder)
    core = loaded(folder, {"r4": small["r4"]}, max_lora_rank=16, lora_pool_gib=41.5 * rank_bytes / 2**30).core
    rng, answer, resident = random.Random(3), Answer(), list[str]()
    core.add(request)
    while core.has_work:
        for delta in core.step():
            answer.take(delta)
        if resident and rng.random() < 0.5:
            core.unload_adapter(resident.pop(rng.randrange(len(resident))))
        else:
            name = rng.choice([n for n in small if n != "r4"])
            if name not in resident and sum(small[n].rank for n in resident) + small[name].rank <= 36:
                core.load_adapter(small[name].spec(name))
                resident.append(name)
        core.adapters.check()  # type: ignore[union-attr]
    assert answer.tokens == expected


def page_bytes_of(folder: Path) -> int:
    engine = build(folder, **WITH_LORA)
    assert engine.core.adapters is not None
    pool = engine.core.adapters.pool  # type: ignore[attr-defined]
    assert engine.facts.adapter_pool_ranks == pool.num_ranks == 6 * 128
    return int(pool.num_bytes // pool.num_pages)


async def test_an_adapter_is_read_beside_the_steps(
    tiny_model: TinyModels, adapters: dict[str, Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a checkpoint is being read, which here never ends by itself, requests go on and are answered."""
    folder, _ = tiny_model(FAMILY)
    reading, go_on = threading.Event(), threading.Event()
    write = LoraStore._write

    def slow(store: LoraStore, *about: Any) -> None:
        reading.set()
        assert go_on.wait(30)
        write(store, *about)

    monkeypatch.setattr(LoraStore, "_write", slow)
    ended: dict[str, asyncio.Event] = {name: asyncio.Event() for name in ("plain", "adapted")}
    said: dict[str, list[int]] = {name: [] for name in ended}

    def sink(deltas: Sequence[StepDelta]) -> None:
        for delta in deltas:
            said[delta.request_id] += delta.token_ids
            if delta.finish_reason is not None:
                ended[delta.request_id].set()

    engine = native_engine(folder, EngineConfig(**WITH_LORA, self_check=False), "tested")
    try:
        await engine.start(sink)
        loading = asyncio.create_task(engine.load_adapter(adapters["r4"].spec("r4")))
        assert await asyncio.to_thread(reading.wait, 30)
        prompt = random_tokens(20, seed=1)
        engine.submit(make_request("plain", prompt))
        await asyncio.wait_for(ended["plain"].wait(), 30)
        assert not loading.done() and engine.stats().adapters == ()
        with pytest.raises(RefusedError, match="adapter r4 is not loaded here"):
            engine.submit(make_request("adapted", prompt, adapter="r4"))
        go_on.set()
        await loading
        engine.submit(make_request("adapted", prompt, adapter="r4"))
        await asyncio.wait_for(ended["adapted"].wait(), 30)
        assert engine.stats().adapters == ("r4",)
        assert said["adapted"] != said["plain"]
    finally:
        go_on.set()
        await engine.close()


def test_the_pool_takes_what_the_arithmetic_says(tiny_model: TinyModels) -> None:
    """docs/engine.md: layers · (Σ in_features + Σ out_features of the seven modules) · bytes of a value."""
    core = build(tiny_model(FAMILY)[0], **WITH_LORA).core
    pool = core.adapters.pool  # type: ignore[union-attr]
    matrices = [matrix for layers in pool.layers.values() for layer in layers for matrix in layer.matrices]
    hidden, q, kv, inner = 96, 6 * 16, 2 * 16, 128
    page = 3 * ((5 * hidden + q + inner) + (q + 2 * kv + 2 * hidden + 2 * inner)) * 4
    assert pool.num_bytes == sum(matrix.numel() * 4 for matrix in matrices) == pool.num_pages * page
    smollm2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    llama3 = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    for sizes, kv_heads, dtype, mega in ((smollm2, 3, torch.float32, 1.22), (llama3, 8, torch.bfloat16, 5.24)):
        common = {"architectures": ["LlamaForCausalLM"], "vocab_size": 1, "max_position_embeddings": 8192}
        spec = spec_from_config({**common, **sizes, "num_key_value_heads": kv_heads})
        assert page_bytes(shapes_of(spec), spec.num_layers, dtype) == pytest.approx(mega * 1e6, rel=0.005)


def test_an_adapter_in_use_is_not_unloaded(tiny_model: TinyModels, adapters: dict[str, Written]) -> None:
    core = loaded(tiny_model(FAMILY)[0], adapters).core
    core.add(make_request("a", random_tokens(5, seed=1), adapter="r4"))
    with pytest.raises(EngineError, match="r4 is in use: num_open=1"):
        core.unload_adapter("r4")
    core.abort("a")
    core.unload_adapter("r4")
    assert core.adapters is not None and "r4" not in core.adapters.resident


def test_a_full_engine_says_so_and_keeps_its_pages(tiny_model: TinyModels, adapters: dict[str, Written]) -> None:
    core = loaded(tiny_model(FAMILY)[0], {"r4": adapters["r4"]}, max_adapters=1).core
    with pytest.raises(EngineError, match="no slot is free for x: 1 are taken"):
        core.load_adapter(adapters["r8 of attention"].spec("x"))
    core.load_adapter(adapters["r4"].spec("r4"))  # twice is once
    core.adapters.check()  # type: ignore[union-attr]
    with pytest.raises(EngineError, match="no room for rank 128: free=124 of 128"):
        core.load_adapter(adapters["r128"].spec("y"))


def test_a_pool_that_cannot_hold_one_adapter_is_said_at_start(tiny_model: TinyModels) -> None:
    with pytest.raises(EngineError, match="max_lora_rank is 128: a rank takes"):
        build(tiny_model(FAMILY)[0], **WITH_LORA, lora_pool_gib=0.001)


def test_a_pool_that_is_promised_leaves_its_memory_out_of_the_cache(
    tiny_model: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU its zeros take no memory yet; test_cuda.py has the other side."""
    folder = tiny_model(FAMILY)[0]
    pool_bytes = page_bytes_of(folder) * (1 + 2 * 16)
    monkeypatch.setattr(engine_module, "_free_bytes", lambda device: pool_bytes)
    with pytest.raises(EngineError, match="the KV cache holds 0 tokens"):
        build(folder, max_adapters=2, max_lora_rank=16)


def test_every_linear_layer_is_adapted(tiny_model: TinyModels, tmp_path: Path) -> None:
    """Each module alone changes the answer as the merged model's."""
    folder, model = tiny_model(FAMILY)
    prompt = random_tokens(26, seed=5)
    for module in LINEAR:
        written = write_adapter(tmp_path / module, model, rank=64, modules=(module,), lora_alpha=64)
        answer = run(loaded(folder, {"x": written}).core, [make_request("a", prompt, adapter="x", logprobs=0)])["a"]
        raw = torch.log_softmax(oracle_logits(written.merged(model), prompt), dim=-1)[-1]
        base = torch.log_softmax(oracle_logits(model, prompt), dim=-1)[-1]
        first = answer.logprobs[0]
        assert first.logprob == pytest.approx(raw[first.token_id].item(), abs=1e-4), module
        assert abs((raw - base)[first.token_id].item()) > 1e-3, f"{module} makes no difference to tell"
