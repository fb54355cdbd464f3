"""Every method of speculation beside everything else an engine does: adapters, logprobs, ends, chunks, preemption, stop
strings, grammars. What is delivered is what plain decoding delivers."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import tokenizers
import torch
from transformers import AutoModelForCausalLM

from configs.grammars.source import GrammarSource
from configs.schema import EngineConfig, SpeculativeConfig
from replicas.contract import Constraint, GenerateRequest, StepDelta
from replicas.detokenize import TextEngine
from replicas.engine.core import EngineCore
from replicas.engine.engine import native_engine
from replicas.engine.speculative.mlp import MlpSpec, MlpWeights, save
from replicas.local import LocalEngine
from tests.replicas.engine.conftest import TinyModels
from tests.replicas.engine.driver import Answer, build, make_request, run
from tests.replicas.engine.letters import write_tokenizer
from tests.replicas.engine.lora_kit import Written, write_adapter
from tests.replicas.engine.tiny import VOCAB, random_tokens

Method = Literal["ngram", "lookahead", "draft_model", "mlp_speculator"]
METHODS: tuple[Method, ...] = get_args(Method)
SMALL: dict[str, Any] = {
    "block_size": 4, "max_num_batched_tokens": 48, "max_num_seqs": 6, "max_model_len": 132, "max_adapters": 2,
    "max_lora_rank": 8,
}  # fmt: skip
BLOCK_BYTES = 3 * 4 * 2 * 2 * 16 * 4  # layers, tokens, k and v, heads, head_dim, float32
FEW_BLOCKS = 36
LENGTHS = [1, 2, 5, 16, 17, 40, 60, 90]
SAMPLED = {"temperature": 1.0, "top_p": 0.95, "frequency_penalty": 0.4, "repetition_penalty": 1.1}


@pytest.fixture(scope="module")
def target(tiny_model: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokens are characters."""
    folder = tmp_path_factory.mktemp("target") / "model"
    shutil.copytree(tiny_model("llama")[0], folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def guessing(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[Method, SpeculativeConfig]:
    """Every method, always on: a draft model that differs a little from the model, and a head that nobody trained."""
    small, head = tmp_path_factory.mktemp("small"), tmp_path_factory.mktemp("head")
    model = AutoModelForCausalLM.from_pretrained(target)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        rows = model.lm_head.weight.clone()
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(small)
    spec = MlpSpec(hidden_size=96, vocab_size=VOCAB, inner_size=32, draft_vocab_size=60)
    kept = torch.randperm(VOCAB, generator=generator)[:60]
    save(head, spec, MlpWeights.fresh(spec, kept, rows[kept]), {})
    models: dict[Method, str] = {"draft_model": str(small), "mlp_speculator": str(head)}
    return {
        method: SpeculativeConfig(
            method=method, model=models.get(method), num_speculative_tokens=4, adaptive=False, prompt_lookup_min=1
        )
        for method in METHODS
    }


@pytest.fixture(scope="module")
def adapters(tiny_model: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Written]:
    _, model = tiny_model("llama")
    folder = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(folder / name, model, rank) for name, rank in (("a", 4), ("b", 8))}


def loaded(target: Path, adapters: Mapping[str, Written], **changes: Any) -> EngineCore:
    core = build(target, **{**SMALL, **changes}).core
    for name, written in adapters.items():
        core.load_adapter(written.spec(name))
    return core


def mixed(**changes: Any) -> list[GenerateRequest]:
    """The model itself and two adapters, prompts shorter and longer than a step."""
    settings = {"max_tokens": 36, **changes}
    return [
        make_request(str(n), random_tokens(n, seed=n), seed=n, adapter=(None, "a", "b")[i % 3], **settings)
        for i, n in enumerate(LENGTHS)
    ]


def assert_same(guessed: Mapping[str, Answer], plain: Mapping[str, Answer]) -> None:
    for name, expected in plain.items():
        answer = guessed[name]
        assert (answer.tokens, answer.finish_reason) == (expected.tokens, expected.finish_reason)
        assert [given.token_id for given in answer.logprobs] == answer.tokens
        for given, wanted in zip(answer.logprobs, expected.logprobs, strict=True):
            assert given.logprob == pytest.approx(wanted.logprob, abs=1e-4)
            assert [i for i, _ in given.top] == [i for i, _ in wanted.top]


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("method", METHODS)
def test_mixed_adapters_logprobs_stops_and_chunks_stay_as_they_are(
    method: Method, sampling: dict[str, Any], target: Path, guessing: Mapping[Method, SpeculativeConfig],
    adapters: Mapping[str, Written],
) -> None:  # fmt: skip
    free = run(loaded(target, adapters), mixed(**sampling))
    stops = tuple(sorted({answer.tokens[23] for answer in free.values()})[:3])
    wanted = mixed(logprobs=2, stop_token_ids=stops, **sampling)
    plain = run(loaded(target, adapters), wanted)
    assert {answer.finish_reason for answer in plain.values()} == {"stop", "length"}
    core = loaded(target, adapters, speculative=guessing[method])
    assert_same(run(core, wanted), plain)
    assert core.stats().num_drafts > 0
    assert method != "draft_model" or core.stats().num_accepted_tokens > 0
    assert core.scheduler.pool.num_used == 0


@pytest.mark.parametrize("method", METHODS)
def test_preempted_requests_say_the_same(
    method: Method, target: Path, guessing: Mapping[Method, SpeculativeConfig], adapters: Mapping[str, Written]
) -> None:
    wanted = mixed(logprobs=1, **SAMPLED)
    plain = run(loaded(target, adapters), wanted)
    gib = FEW_BLOCKS * BLOCK_BYTES * (2 if method == "draft_model" else 1) / 2**30
    tight = loaded(target, adapters, speculative=guessing[method], prefix_caching=False, kv_cache_gib=gib)
    assert tight.scheduler.pool.num_blocks == FEW_BLOCKS
    answers = run(tight, wanted)
    assert tight.scheduler.num_preemptions > 0 and tight.stats().num_drafts > 0
    assert_same(answers, plain)


async def everything(target: Path, wanted: list[GenerateRequest], speculative: SpeculativeConfig | None) -> Any:
    """(tokens, text, finish_reason, stop_reason) of each, one after another; and the accepted guesses."""
    config = EngineConfig(
        block_size=4, max_num_seqs=4, max_model_len=240, self_check=False, kv_cache_gib=0.01, speculative=speculative
    )
    tokenizer = tokenizers.Tokenizer.from_file(str(target / "tokenizer.json"))
    async with LocalEngine(TextEngine(native_engine(target, config, "tested"), tokenizer)) as local:
        said = [_whole(await local.generate(request)) for request in wanted]
        return said, local.engine.stats().num_accepted_tokens


def _whole(deltas: list[StepDelta]) -> tuple[list[int], str, str | None, int | str | None]:
    token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
    return token_ids, "".join(delta.text for delta in deltas), deltas[-1].finish_reason, deltas[-1].stop_reason


@pytest.mark.parametrize("method", METHODS)
async def test_stop_strings_end_an_answer_within_its_guesses_as_without(
    method: Method, target: Path, guessing: Mapping[Method, SpeculativeConfig]
) -> None:
    prompts = [random_tokens(n, seed=n) for n in (3, 9, 20, 31)]
    free, _ = await everything(target, [make_request("f", prompt, max_tokens=60) for prompt in prompts], None)
    wanted = [
        make_request(str(i), prompt, max_tokens=60, stop=(text[17 + i : 20 + i], text[30 : 34 + i]))
        for i, (prompt, (_, text, _, _)) in enumerate(zip(prompts, free, strict=True))
    ]
    plain, _ = await everything(target, wanted, None)
    guessed, num_accepted = await everything(target, wanted, guessing[method])
    assert guessed == plain
    assert all(reason == "stop" and len(tokens) < 60 for tokens, _, reason, _ in plain)
    assert num_accepted > 0 or method in ("mlp_speculator", "lookahead")


@pytest.mark.parametrize("method", METHODS)
async def test_answers_in_a_grammar_are_the_same_with_guesses(
    method: Method, target: Path, guessing: Mapping[Method, SpeculativeConfig]
) -> None:
    sources = [GrammarSource(kind="regex", text=text) for text in ("(ab|cd){12,20}", "[a-f]{20}(x|y)z", "k{30}!")]
    wanted = [
        make_request(f"{i} {temperature}", random_tokens(12, seed=i), seed=i, temperature=temperature, max_tokens=80,
                     ignore_eos=False, constraint=Constraint(source=source))
        for i, source in enumerate(sources) for temperature in (0.0, 1.0)
    ]  # fmt: skip
    plain, _ = await everything(target, wanted, None)
    guessed, num_accepted = await everything(target, wanted, guessing[method])
    assert guessed == plain
    assert all(reason == "stop" for _, _, reason, _ in plain)
    assert num_accepted > 0 or method == "mlp_speculator"
