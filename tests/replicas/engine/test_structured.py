"""Grammars over real logits: the mask, the sampler, and the native engine on a tiny model with letters for tokens."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.grammars.source import GrammarSource
from configs.schema import EngineConfig
from replicas.contract import Constraint, GenerateRequest, pack_tokens
from replicas.engine.engine import native_engine
from replicas.engine.noise import hash_tokens
from replicas.engine.sampler import Sampler
from replicas.engine.sequence import SamplePoint, Sequence
from replicas.engine.structured import mask
from replicas.engine.structured.mask import few_allowed, forbid
from replicas.local import LocalEngine
from tests.replicas.engine.conftest import TinyModels
from tests.replicas.engine.driver import make_request
from tests.replicas.engine.letters import write_tokenizer
from tests.replicas.structured.kit import EOS, WORDS, grammar_of, ids, regex

LOGITS = torch.randn(EOS + 1, generator=torch.Generator().manual_seed(4)) * 3
SAMPLER = Sampler(hash_tokens(EOS + 1, torch.device("cpu")), (EOS,))


def packed(allowed: set[int], vocab_size: int) -> bytes:
    return sum(1 << token_id for token_id in allowed).to_bytes(-(-vocab_size // 8) + 3, "little")


@pytest.mark.parametrize("vocab_size", [1, 8, 31, 97, 259])
@pytest.mark.parametrize("banned", [(), (0,), (0, 5, 30)])
def test_a_mask_bans_what_is_not_allowed(vocab_size: int, banned: tuple[int, ...]) -> None:
    banned = tuple(token_id for token_id in banned if token_id < vocab_size)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        row = torch.randn(vocab_size, generator=generator)
        allowed = {0} | set(torch.randint(vocab_size, (9,), generator=generator).tolist())
        masked = row.clone()
        forbid(masked, packed(allowed, vocab_size), banned)
        kept = allowed - set(banned) or allowed  # a ban that leaves nothing is none
        for token_id in range(vocab_size):
            assert masked[token_id] == (row[token_id] if token_id in kept else -math.inf)


class Allows:
    """A grammar that always allows the same."""

    complete = False
    fault = None

    def __init__(self, allowed: bytes) -> None:
        self._allowed = allowed

    def allowed(self, path: tuple[int, ...] = ()) -> bytes:
        return self._allowed

    def advance(self, token_id: int) -> bool:
        return True


def sequence(text: str, **sampling: object) -> Sequence:
    """One that has said `a`s so far, in the grammar of `text`."""
    request = make_request("r", [0, 1], **{"ignore_eos": False, "temperature": 1.0, **sampling})
    return Sequence.from_request(request, 0.0, grammar_of(regex(text)))


def draws(seq: Sequence, count: int = 200) -> set[int]:
    rows = LOGITS.expand(count, -1).clone()
    points = [SamplePoint(_with_seed(seq, seed)) for seed in range(count)]
    return {sampled.token_id for sampled in SAMPLER.sample(rows, points)}


def _with_seed(seq: Sequence, seed: int) -> Sequence:
    request = make_request("r", [0, 1], ignore_eos=seq.request.sampling.ignore_eos, temperature=1.0, seed=seed,
                           min_tokens=seq.request.sampling.min_tokens, top_k=seq.request.sampling.top_k,
                           logit_bias=seq.request.sampling.logit_bias)  # fmt: skip
    other = Sequence.from_request(request, 0.0, seq.grammar)
    other.tokens = seq.tokens
    return other


def test_only_what_the_grammar_allows_is_drawn_and_all_of_it_can_be() -> None:
    seq = sequence("(a|b)?c*", logit_bias={i: -LOGITS[i].item() for i in range(EOS)})
    assert seq.grammar is not None
    assert draws(seq) <= ids(seq.grammar.allowed())
    assert draws(seq) >= {WORDS.index("a"), WORDS.index("b")}
    assert seq.take(WORDS.index("b"))
    assert draws(seq) <= {WORDS.index("c"), EOS}


@settings(max_examples=150, deadline=None)
@given(
    st.sets(st.integers(0, EOS), min_size=1),
    st.integers(0, 2**40),
    st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    st.fixed_dictionaries(
        {},
        optional={
            "top_k": st.integers(1, EOS),
            "top_p": st.floats(0.0, 1.0),
            "min_p": st.floats(0.0, 1.0),
            "min_tokens": st.just(5),
            "presence_penalty": st.floats(-2, 2),
            "logit_bias": st.dictionaries(st.integers(0, EOS), st.floats(-9, 9), min_size=1),
        },
    ),
)
def test_a_draw_among_few_tokens_is_the_draw_among_all_with_the_others_banned(
    allowed: set[int], seed: int, temperature: float, sampling: dict[str, Any]
) -> None:
    request = make_request("r", [0, 1], ignore_eos=False, temperature=temperature, seed=seed, **sampling)
    seq = Sequence.from_request(request, 0.0, Allows(packed(allowed, EOS + 1)))
    drawn = []
    for most in (0, mask.MAX_FEW_BYTES):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mask, "MAX_FEW_BYTES", most)
            assert (few_allowed(packed(allowed, EOS + 1), ()) is None) == (most == 0)
            drawn += SAMPLER.sample(LOGITS[None].clone(), [SamplePoint(seq)])
    assert drawn[0] == drawn[1] and drawn[0].token_id in allowed


def test_truncation_keeps_the_best_of_what_is_allowed() -> None:
    seq = sequence("(a|b|x)c", top_k=1)
    assert seq.grammar is not None
    best = max(ids(seq.grammar.allowed()), key=lambda token_id: LOGITS[token_id].item())
    assert draws(seq) == {best} != {int(LOGITS.argmax())}


def test_an_answer_ends_before_min_tokens_only_where_it_must() -> None:
    open_ended, complete = sequence("a*", min_tokens=5), sequence("a", min_tokens=5)
    assert EOS not in draws(open_ended)
    assert complete.take(WORDS.index("a")) and draws(complete) == {EOS}
    assert EOS not in draws(sequence("a*", ignore_eos=True))
    assert EOS in draws(sequence("a*", logit_bias={EOS: 9.0}))


def test_logprobs_are_of_the_raw_distribution() -> None:
    seq = sequence("x+", logprobs=2)
    (sampled,) = SAMPLER.sample(LOGITS[None].clone(), [SamplePoint(seq)])
    raw = torch.log_softmax(LOGITS, dim=-1)
    assert sampled.token_id == WORDS.index("x") and sampled.logprob is not None
    assert sampled.logprob.logprob == pytest.approx(raw[sampled.token_id].item())
    assert [token_id for token_id, _ in sampled.logprob.top] == raw.topk(2).indices.tolist()


def test_what_is_drawn_behind_an_impossible_guess_does_not_matter_and_breaks_nothing() -> None:
    seq = sequence("ab")
    points = [SamplePoint(seq), SamplePoint(seq, (WORDS.index("c"),)), SamplePoint(seq, (WORDS.index("a"),))]
    first, _, behind = SAMPLER.sample(LOGITS.expand(3, -1).clone(), points)
    assert first.token_id in (WORDS.index("a"), WORDS.index("ab")) and behind.token_id == WORDS.index("b")


# The native engine.


@pytest.fixture(scope="module")
def lettered(tiny_model: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokens are characters."""
    folder = tmp_path_factory.mktemp("lettered") / "model"
    shutil.copytree(tiny_model("llama")[0], folder)
    write_tokenizer(folder)
    return folder


def text_of(tokens: list[int]) -> str:
    return "".join(chr(0x21 + token_id - 3) for token_id in tokens if token_id >= 3)


async def said(local: LocalEngine, request: GenerateRequest) -> str:
    deltas = await local.generate(request)
    assert deltas[-1].finish_reason == "stop", deltas[-1]
    return text_of([token_id for delta in deltas for token_id in delta.token_ids])


def asks(name: str, source: GrammarSource, **changes: object) -> GenerateRequest:
    settings = {"max_tokens": 150, "ignore_eos": False, "temperature": 1.0, "constraint": Constraint(source=source)}
    return make_request(name, [5, 9, 20, 31], **{**settings, **changes})


JSON = GrammarSource(
    kind="json",
    text=json.dumps({"type": "object", "properties": {"n": {"type": "integer"}, "k": {"enum": ["u", "v"]}},
                     "required": ["n", "k"], "additionalProperties": False}),
    whitespace="",
)  # fmt: skip


async def test_a_model_of_random_weights_speaks_json_and_resumes_it(lettered: Path) -> None:
    config = EngineConfig(self_check=False, max_num_seqs=4, kv_cache_gib=0.01)
    async with LocalEngine(native_engine(lettered, config, "tested")) as local:
        assert local.facts is not None and local.facts.structured
        for seed in range(3):
            text = await said(local, asks(f"r{seed}", JSON, seed=seed))
            value = json.loads(text)
            assert set(value) == {"n", "k"} and isinstance(value["n"], int) and value["k"] in ("u", "v")
            assert re.fullmatch("(xy|z){2,4}", await said(local, asks("x", regex("(xy|z){2,4}"), seed=seed)))
            produced = pack_tokens([ord(char) - 0x21 + 3 for char in text[:5]])
            rest = await said(local, asks("again", JSON, seed=seed, produced=produced))
            assert text[:5] + rest == text


async def test_a_model_without_a_tokenizer_follows_no_grammar(tiny_model: TinyModels) -> None:
    config = EngineConfig(self_check=False, kv_cache_gib=0.01)
    async with LocalEngine(native_engine(tiny_model("llama")[0], config, "tested")) as local:
        assert local.facts is not None and not local.facts.structured
