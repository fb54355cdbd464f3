"""LoRA adapters in a real vLLM: equal to merged weights, and the two faults of its engine guarded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from replicas.contract import AdapterSpec, BlocksStored, EngineError, RefusedError, cache_namespace, unpack_tokens
from tests.replicas.engine.lora_kit import Written, write_adapter
from tests.replicas.vllm.conftest import NEEDED
from tests.replicas.vllm.vllm_kit import FRANCE, MARKS, STORY, Driver, config, eventually, tokenizer_of, tokens_of

pytestmark = [*MARKS, NEEDED]
SLOTS = 2


@pytest.fixture(scope="module")
def base(smollm2: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)


@pytest.fixture(scope="module")
def written(base: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> list[Written]:
    folder = tmp_path_factory.mktemp("adapters")
    return [stronger(write_adapter(folder / f"{i}", base, rank=rank, seed=i), 4) for i, rank in enumerate((4, 8))]


def stronger(written: Written, factor: int) -> Written:
    """The same matrices with more weight: enough to change what a model says that was trained to say it."""
    path = written.path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"lora_alpha": factor * config["lora_alpha"]}))
    return Written(written.path, written.rank, {name: factor * delta for name, delta in written.deltas.items()})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def driver(smollm2: Path) -> AsyncIterator[Driver]:
    from replicas.vllm.launch import Wanted
    from replicas.vllm_engine import VllmEngine

    driver = Driver(tokenizer_of(smollm2))
    driver.engine = VllmEngine(Wanted(smollm2, config(max_adapters=SLOTS, max_lora_rank=12), "m"))
    driver.facts = await driver.engine.start(driver.take)
    try:
        yield driver
    finally:
        await driver.engine.close()


def greedy(model: PreTrainedModel, prompt: bytes, num_tokens: int) -> tuple[int, ...]:
    """Ends of sequence are tokens like others."""
    ids = list(unpack_tokens(prompt))
    start = len(ids)
    with torch.inference_mode():
        for _ in range(num_tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[start:])


async def test_slots_and_ranks_are_what_the_profile_says(driver: Driver) -> None:
    facts = driver.facts
    assert facts is not None
    assert (facts.max_adapters, facts.max_adapter_rank, facts.adapter_pool_ranks) == (SLOTS, 12, SLOTS * 12)


async def test_each_row_of_a_full_batch_has_its_own_adapter(
    driver: Driver, base: PreTrainedModel, written: list[Written]
) -> None:
    """As many adapters as slots, and rows of the base model among them, which vLLM gives the last slot's adapter unless
    there is a slot more."""
    names: list[str | None] = [None, "a@1", "b@1"]
    for name, adapter in zip(names[1:], written, strict=True):
        await driver.engine.load_adapter(adapter.spec(str(name)))
    models = [base, written[0].merged(base), written[1].merged(base)]
    requests = [
        driver.request(text, adapter=name, max_tokens=10, ignore_eos=True)
        for text in (FRANCE, STORY)
        for name in (None, "a@1", "b@1")
    ]
    for request in requests:
        driver.engine.submit(request)
    for request in requests:
        found = tokens_of(await driver.end_of(request.request_id))
        expected = greedy(models[names.index(request.adapter)], request.prompt, 10)
        assert found == expected, request.adapter
    assert len({greedy(model, requests[0].prompt, 10) for model in models}) == 3, "these adapters change nothing"


async def test_versions_have_caches_of_their_own(driver: Driver, written: list[Written]) -> None:
    await driver.engine.unload_adapter("b@1")
    prompt = STORY * 4
    await driver.engine.load_adapter(written[1].spec("a@2"))
    old = await driver.ask(prompt, adapter="a@1", max_tokens=4, ignore_eos=True)
    new = await driver.ask(prompt, adapter="a@2", max_tokens=4, ignore_eos=True)
    assert new[0].num_cached_tokens == 0
    assert tokens_of(old) != tokens_of(new)
    assert (await driver.ask(prompt, adapter="a@2", max_tokens=1))[0].num_cached_tokens
    events: list[object] = []
    spaces = {cache_namespace(name, b"") for name in ("a@1", "a@2")}
    await eventually(
        lambda: (
            events.extend(driver.engine.kv_events())
            or spaces <= {event.namespace for event in events if isinstance(event, BlocksStored)}
        )
    )
    await driver.engine.unload_adapter("a@2")
    await driver.engine.load_adapter(written[1].spec("b@1"))


async def test_what_cannot_be_loaded_leaves_the_engine_as_it_was(
    driver: Driver, written: list[Written], tmp_path: Path
) -> None:
    await driver.engine.unload_adapter("b@1")
    with pytest.raises(EngineError, match="could not load adapter gone@1"):
        await driver.engine.load_adapter(AdapterSpec(adapter_id="gone@1", path=str(tmp_path / "nowhere")))
    with pytest.raises(RefusedError) as refused:
        await driver.ask(FRANCE, adapter="gone@1")
    assert refused.value.fault.code == "adapter_not_found" and refused.value.fault.retryable
    assert driver.text_of(await driver.ask(FRANCE)) == "The capital of France is Paris."
    await driver.engine.load_adapter(written[1].spec("b@1"))


async def test_an_adapter_in_use_is_not_unloaded(driver: Driver) -> None:
    request = driver.request(STORY, adapter="b@1", max_tokens=30, ignore_eos=True)
    driver.engine.submit(request)
    with pytest.raises(EngineError, match="in use"):
        await driver.engine.unload_adapter("b@1")
    await driver.end_of(request.request_id)
    await driver.engine.unload_adapter("b@1")
    with pytest.raises(RefusedError):
        driver.engine.submit(driver.request(STORY, adapter="b@1"))
    await driver.engine.unload_adapter("b@1")  # gone already: nothing happens


async def test_scoring_prompts_is_refused_since_it_would_end_the_engine(driver: Driver) -> None:
    for _ in range(3):
        with pytest.raises(RefusedError) as refused:
            driver.engine.submit(driver.request(FRANCE, prompt_logprobs=1))
        assert refused.value.fault.param == "prompt_logprobs"
    await asyncio.gather(*(driver.ask(FRANCE, logprobs=1, adapter=name) for name in (None, "a@1", None)))
