"""Constrained answers in the sim engine: real scheduler, step loop, text and stop strings."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from typing import Any, Literal

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.grammars.guard import GrammarGuard
from configs.grammars.source import GrammarSource
from configs.schema import SpeculativeConfig
from replicas.contract import EngineStats, RefusedError, pack_tokens
from tests.replicas.structured.kit import engine, regex, request, say, schema

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", 7]}, "maxItems": 4},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
LONG = regex("[a-z]{40}(-[a-z]{5})*")


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from(["a", "b", "id", "x y", 'q"t', "ü"])
    leaves: st.SearchStrategy[dict[str, Any]] = st.one_of(
        st.just({"type": "integer"}),
        st.just({"type": "number"}),
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 9)),
        st.builds(lambda n: {"type": "integer", "minimum": n, "maximum": n + 50}, st.integers(-60, 60)),
        st.builds(lambda values: {"enum": values}, st.lists(st.text('ab"\\\n', max_size=4), min_size=1, unique=True)),
        st.just({"type": "string", "pattern": "^[a-f]{2,4}$"}),
        st.just({"const": {"k": [1, None]}}),
    )

    def composed(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        objects = st.builds(
            lambda parts, some: {
                "type": "object",
                "properties": parts,
                "required": sorted(parts)[:some],
                "additionalProperties": False,
            },
            st.dictionaries(names, inner, max_size=3),
            st.integers(0, 3),
        )
        arrays = st.builds(
            lambda item, low: {"type": "array", "items": item, "minItems": low, "maxItems": low + 2},
            inner,
            st.integers(0, 2),
        )
        unions = st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts})
        return objects | arrays | unions

    return st.recursive(leaves, composed, max_leaves=6)


async def test_random_schemas_always_give_json_that_validates() -> None:
    async with engine(max_model_len=4096) as local:
        loop = asyncio.get_running_loop()

        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
        @given(schemas(), st.integers(0, 2**40), st.sampled_from([0.0, 1.0]))
        def examine(described: dict[str, Any], seed: int, temperature: float) -> None:
            asking = say(local, "r", schema(**described), max_tokens=3000, seed=seed, temperature=temperature)
            said = asyncio.run_coroutine_threadsafe(asking, loop).result(60)
            assert said.last.finish_reason == "stop", (said.last, said.text[:300])
            jsonschema.validate(json.loads(said.text), described)

        await asyncio.to_thread(examine)


async def test_random_regular_expressions_are_matched_whole() -> None:
    async with engine() as local:
        loop = asyncio.get_running_loop()
        pieces = st.sampled_from(["[a-z]{2,5}", "(yes|no)", r"\d+", "x?y*", "é{1,2}", r"[^\s]{3}", "(a(b|c))+", "-"])

        @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(pieces, min_size=1, max_size=4).map("".join), st.integers(0, 2**40))
        def examine(pattern: str, seed: int) -> None:
            said = asyncio.run_coroutine_threadsafe(say(local, "r", regex(pattern), seed=seed), loop).result(60)
            if said.last.finish_reason == "stop":
                assert re.fullmatch(pattern, said.text), (pattern, said.text)
            else:
                assert "+" in pattern or "*" in pattern, "it could have ended"

        await asyncio.to_thread(examine)


@pytest.mark.parametrize(
    ("source", "pattern"),
    [
        (GrammarSource(kind="choice", text='["red wine", "white\\nwine", "\\u007f", "\\"q\\""]'),
         '(red wine|white\nwine|\x7f|"q")'),
        (GrammarSource(kind="grammar", text='root ::= "x" [0-9]+ ("," [0-9])?'), r"x\d+(,\d)?"),
        (GrammarSource(kind="grammar", text='start: "n=" NUM\nNUM: /[1-9]{2}/'), "n=[1-9]{2}"),
        (GrammarSource(kind="json", text='{"type":"array","items":{"type":"null"},"maxItems":2}', whitespace=""),
         r"\[(null(,null)?)?\]"),
        (GrammarSource(kind="regex", text="[xy]{2}", preface='preface: "t:" /[a-c]{1,3}/ "\\n"'),
         "t:[a-c]{1,3}\n[xy]{2}"),
    ],
)  # fmt: skip
async def test_every_kind_of_grammar_is_followed(source: GrammarSource, pattern: str) -> None:
    async with engine() as local:
        for seed in range(4):
            said = await say(local, "r", source, seed=seed)
            assert said.last.finish_reason == "stop" and re.fullmatch(pattern, said.text), said.text


async def test_a_structural_tag_leaves_the_text_around_it_free() -> None:
    tag = {
        "triggers": ["~"],
        "structures": [{"begin": "~{", "schema": {"type": "object", "properties": {}, "additionalProperties": False},
                        "end": "}"}],
    }  # fmt: skip
    async with engine() as local:
        texts = [
            (await say(local, f"r{seed}", GrammarSource(kind="structural_tag", text=json.dumps(tag)), seed=seed)).text
            for seed in range(4)
        ]
    assert any("~" in text for text in texts), "the model says ~ now and then"
    for text in texts:
        assert all(rest.startswith("{{") for rest in text.split("~")[1:] if len(rest) > 1), text


async def test_neighbours_in_a_batch_do_not_notice_one_another() -> None:
    wanted = [None, schema(**PERSON), regex("[a-z]{5}"), None, GrammarSource(kind="choice", text='["yes","no"]')]
    async with engine() as local:
        alone = [(await say(local, f"a{i}", source, seed=i, max_tokens=120)) for i, source in enumerate(wanted)]
        together = await asyncio.gather(
            *(say(local, f"b{i}", source, seed=i, max_tokens=120) for i, source in enumerate(wanted))
        )
    assert [said.tokens for said in together] == [said.tokens for said in alone]
    jsonschema.validate(json.loads(together[1].text), PERSON)


async def test_the_end_of_a_grammar_is_the_end_of_the_answer() -> None:
    async with engine() as local:
        said = await say(local, "r", regex("ab"))
        assert (said.text, said.last.finish_reason, said.last.stop_reason) == ("ab", "stop", None)
        assert len(said.tokens) == 2, "no end of sequence is drawn where nothing else can follow"
        exact = await say(local, "r", regex("ab"), max_tokens=2)
        assert (exact.text, exact.last.finish_reason) == ("ab", "stop")
        short = await say(local, "r", regex("abc"), max_tokens=2)
        assert (short.text, short.last.finish_reason) == ("ab", "length")


async def test_min_tokens_and_ignore_eos_hold_as_long_as_the_grammar_can_go_on() -> None:
    async with engine() as local:
        for seed in range(5):
            said = await say(local, "r", regex("[ab]{1,9}"), min_tokens=6, seed=seed)
            assert 6 <= len(said.text) <= 9
            assert len((await say(local, "r", regex("[ab]{1,9}"), ignore_eos=True, seed=seed)).text) == 9
            assert (await say(local, "r", regex("ab"), min_tokens=20, seed=seed)).text == "ab"


async def test_stop_strings_still_end_an_answer() -> None:
    async with engine() as local:
        whole = (await say(local, "r", LONG)).text
        said = await say(local, "r", LONG, stop=(whole[10:13],))
        assert said.text == whole[: whole.index(whole[10:13])]
        assert said.last.stop_reason == whole[10:13]


async def test_logprobs_are_those_of_the_model_not_of_the_grammar() -> None:
    async with engine() as local:
        said = await say(local, "r", regex("é+"), max_tokens=4, logprobs=3)
    (first, *_) = [position for delta in said.deltas for position in delta.logprobs or ()]
    assert first.token_id == "é".encode()[0] and first.token_id not in {token_id for token_id, _ in first.top}
    assert len(first.top) == 3 and first.logprob < first.top[-1][1]


async def test_an_answer_resumed_elsewhere_goes_on_as_it_would_have() -> None:
    for source in (LONG, schema(**PERSON)):
        async with engine() as first:
            whole = await say(first, "r", source, temperature=1.0)
        for cut in (1, 7, len(whole.tokens) - 1, len(whole.tokens)):
            async with engine() as second:
                rest = await say(second, "r", source, temperature=1.0, produced=pack_tokens(whole.tokens[:cut]))
            assert rest.tokens == whole.tokens[cut:] and rest.last.finish_reason == whole.last.finish_reason


async def test_a_preempted_answer_ends_as_if_nothing_had_happened() -> None:
    async def ask(**changes: Any) -> tuple[list[list[int]], int]:
        async with engine(block_size=4, max_num_seqs=4, **changes) as local:
            said = await asyncio.gather(*(say(local, f"r{i}", LONG, seed=i, max_tokens=60) for i in range(4)))
            return [each.tokens for each in said], local.engine.stats().num_preemptions

    roomy, none = await ask()
    tight, some = await ask(num_blocks=30)
    assert none == 0 < some
    assert tight == roomy


@pytest.mark.parametrize("method", ["draft_model", "ngram"])
async def test_speculation_changes_nothing(method: Literal["draft_model", "ngram"]) -> None:
    async def ask(**changes: Any) -> tuple[list[list[int]], EngineStats]:
        async with engine(**changes) as local:
            numbers = schema(type="array", items={"type": "number"}, minItems=3, maxItems=9)
            wanted = [LONG, schema(**PERSON), numbers, regex("[ -~]{150}"), regex("(abc-){60}")]
            said = [await say(local, f"r{i}", source, seed=i, temperature=0.0) for i, source in enumerate(wanted)]
            return [each.tokens for each in said], local.engine.stats()

    guessing = SpeculativeConfig(method=method, model="sim:bytes", num_speculative_tokens=4, adaptive=False)
    guessed, stats = await ask(speculative=guessing, draft_acceptance=0.7)
    plain, _ = await ask()
    assert guessed == plain
    assert stats.num_drafts > 50 and stats.num_accepted_tokens > 50


async def test_a_grammar_that_is_wrong_hurts_its_own_request_alone() -> None:
    async with engine() as local:
        fine, wrong, deep = await asyncio.gather(
            say(local, "fine", LONG), say(local, "wrong", schema(type="objekt")), say(local, "deep", chain(1500))
        )
        assert fine.last.finish_reason == "stop"
        assert wrong.last.fault is not None and wrong.last.fault.code == "invalid_grammar"
        assert "objekt" in wrong.last.fault.message and wrong.last.fault.param == "response_format"
        assert deep.last.fault is not None and deep.last.fault.code == "grammar_too_complex"
        assert (await say(local, "again", LONG)).text == fine.text


def chain(length: int) -> GrammarSource:
    """References that overflow the compiler's stack."""
    defs: dict[str, Any] = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(length)}
    return schema(**{"$ref": "#/$defs/d0", "$defs": {**defs, f"d{length}": {"type": "integer"}}})


async def test_others_go_on_while_a_grammar_is_being_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    trying, others, check = threading.Event(), threading.Event(), GrammarGuard.check

    def takes_long(guard: GrammarGuard, source: GrammarSource) -> str:
        trying.set()
        assert others.wait(60)
        return check(guard, source)

    monkeypatch.setattr(GrammarGuard, "check", takes_long)
    async with engine() as local:
        ended: list[str] = []

        async def ask(name: str, source: GrammarSource | None) -> None:
            await say(local, name, source, max_tokens=200)
            ended.append(name)

        slow = asyncio.create_task(ask("slow", schema(type="integer")))
        try:
            assert await asyncio.to_thread(trying.wait, 30)
            await asyncio.gather(*(ask(f"r{i}", None) for i in range(8)))
            assert "slow" not in ended
        finally:
            others.set()
        await slow


async def test_the_load_counts_who_waits_for_a_grammar() -> None:
    async with engine() as local:
        asking = [asyncio.create_task(say(local, f"r{i}", regex(f"[ab]{{{i + 1}}}"))) for i in range(3)]
        await asyncio.sleep(0)
        load = local.engine.stats()
        assert (load.num_waiting, load.num_unseen, load.num_waiting_tokens) == (3, 3, 3 * len(b"hello"))
        await asyncio.gather(*asking)
        load = local.engine.stats()
        assert (load.num_waiting, load.num_unseen, load.num_waiting_tokens) == (0, 0, 0)


async def test_a_request_is_aborted_while_its_grammar_is_compiled() -> None:
    async with engine() as local:
        stream = local.stream(request("r", LONG))
        asking = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        local.engine.abort("r")
        assert (await asking).finish_reason == "abort"
        await stream.aclose()
        assert (await say(local, "r", LONG)).last.finish_reason == "stop"


async def test_closing_ends_requests_whose_grammars_are_being_compiled() -> None:
    async with engine() as local:
        asking = asyncio.create_task(say(local, "r", schema(type="integer", multipleOf=999_983)))
        await asyncio.sleep(0)
    said = await asking
    assert said.last.fault is not None and said.last.fault.code == "engine_dead"


@pytest.mark.parametrize("changes", [{"tokenizer": False}, {"structured": False}])
async def test_an_engine_without_grammars_says_so(changes: dict[str, bool]) -> None:
    async with engine(**changes) as local:
        assert local.facts is not None and not local.facts.structured
        with pytest.raises(RefusedError, match="cannot make its answers follow a grammar") as caught:
            await say(local, "r", LONG)
        assert caught.value.fault.param == "response_format"
        assert (await say(local, "r", None)).last.finish_reason == "length"
