"""Compiled once, kept, shared; refused with the reason."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import product
from string import ascii_lowercase
from typing import cast

import llguidance
import pytest

from configs.grammars.guard import GrammarGuard
from configs.grammars.source import GrammarError, GrammarSource
from replicas.contract import Constraint, RefusedError
from replicas.engine.structured import walk
from replicas.engine.structured.grammar import Grammar
from replicas.engine.structured.store import GrammarStore, StoreOptions, read_tokenizer
from tests.replicas.structured.kit import TOKENIZER, WORDS, CountingGuard, ids, regex


class Stores:
    def __init__(self) -> None:
        self.made: list[GrammarStore] = []

    def __call__(self, guard: CountingGuard, options: StoreOptions | None = None) -> GrammarStore:
        self.made.append(GrammarStore(TOKENIZER, cast(GrammarGuard, guard), options))
        return self.made[-1]


@pytest.fixture
def stores() -> Iterator[Stores]:
    made = Stores()
    yield made
    for store in made.made:
        store.close()


def wants(source: GrammarSource) -> Constraint:
    return Constraint(source=source, param="structured_outputs.regex")


async def test_a_grammar_asked_for_by_many_is_compiled_once(stores: Stores) -> None:
    guard = CountingGuard()
    store = stores(guard)
    together = await asyncio.gather(*(store.get(wants(regex("a+b")), ()) for _ in range(5)))
    later = await store.get(wants(regex("a+b")), ())
    assert len(guard.checked) == 1
    together[0].advance(WORDS.index("a"))
    assert ids(together[0].allowed()) != ids(together[1].allowed()) == ids(later.allowed()), "each goes its own way"


async def test_the_grammar_used_least_recently_makes_room(stores: Stores) -> None:
    guard = CountingGuard()
    store = stores(guard, StoreOptions(max_kept=2))
    for text in ("a", "b", "a", "c", "a", "b"):
        await store.get(wants(regex(text)), ())
    assert [source.text for source in guard.checked] == ["a", "b", "c", "b"]


async def test_tokens_of_an_earlier_attempt_prime_the_grammar(stores: Stores) -> None:
    store = stores(CountingGuard())
    produced = [WORDS.index("ab"), WORDS.index("c")]
    primed, walked = await store.get(wants(regex("abca*b")), produced), await store.get(wants(regex("abca*b")), ())
    assert all(walked.advance(token_id) for token_id in produced)
    assert primed.allowed() == walked.allowed()


async def test_tokens_that_the_grammar_never_allowed_are_refused(stores: Stores) -> None:
    with pytest.raises(RefusedError, match="does not follow its grammar from token 1 on"):
        await stores(CountingGuard()).get(wants(regex("ab")), [WORDS.index("a"), WORDS.index("a")])


async def test_a_refusal_names_the_field_and_is_not_remembered(stores: Stores) -> None:
    store = stores(CountingGuard([GrammarError("it is too much", too_complex=True), GrammarError("it is wrong")]))
    for code, words in (("invalid_grammar", "it is wrong"), ("grammar_too_complex", "it is too much")):
        with pytest.raises(RefusedError, match=f"'structured_outputs.regex': {words}") as caught:
            await store.get(wants(regex("a")), ())
        assert (caught.value.fault.code, caught.value.fault.param) == (code, "structured_outputs.regex")
    assert await store.get(wants(regex("a")), ())


async def test_more_grammars_than_may_wait_are_sent_elsewhere(stores: Stores) -> None:
    store = stores(CountingGuard(), StoreOptions(max_compiling=2))
    first = [asyncio.create_task(store.get(wants(regex(text)), ())) for text in "ab"]
    await asyncio.sleep(0)
    with pytest.raises(RefusedError) as caught:
        await store.get(wants(regex("c")), ())
    assert caught.value.fault.code == "overloaded" and caught.value.fault.retryable
    await asyncio.gather(*first)
    assert await store.get(wants(regex("c")), ())


async def test_who_gives_up_waiting_leaves_the_others_waiting(stores: Stores) -> None:
    store = stores(CountingGuard())
    gone, stays = (asyncio.create_task(store.get(wants(regex("a+")), ())) for _ in range(2))
    await asyncio.sleep(0)
    gone.cancel()
    assert (await stays).allowed() is not None
    assert gone.cancelled()


class Letters:
    """A vocabulary of every three letters, large enough for masks to take their time; then end of sequence."""

    eos_token_id = 26**3
    bos_token_id = None
    tokens = (*("".join(three).encode() for three in product(ascii_lowercase, repeat=3)), b"\xff<eos>")
    special_token_ids = (26**3,)

    def __call__(self, text: bytes) -> list[int]:
        return []


async def test_a_grammar_whose_first_mask_is_too_much_is_refused_before_a_step_pays_for_it(stores: Stores) -> None:
    guard = CountingGuard()
    store = GrammarStore(llguidance.LLTokenizer(llguidance.TokenizerWrapper(Letters())), cast(GrammarGuard, guard))
    stores.made.append(store)
    palindromes = "start: p\np: " + " | ".join(f'"{char}" p "{char}" | "{char}"' for char in ascii_lowercase)
    with pytest.raises(RefusedError, match="Too many items") as caught:
        await store.get(wants(GrammarSource(kind="grammar", text=palindromes)), ())
    assert caught.value.fault.code == "grammar_too_complex"
    assert (await store.get(wants(regex("[a-z]+")), ())).allowed() is not None


def few_states(num_states: int) -> llguidance.LLParserLimits:
    return llguidance.LLParserLimits(max_lexer_states=num_states)


async def test_a_lexer_that_is_full_is_begun_anew_and_nobody_notices(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, a = regex("a[ab]{30}a|b[ab]{30}b|c[ab]{30}c"), WORDS.index("a")
    roomy, guard = stores(CountingGuard()), CountingGuard()
    wanted = [await roomy.get(wants(source), ()) for _ in "abc"]
    monkeypatch.setattr(walk, "LIMITS", few_states(60))  # each way alone needs less, all together need more
    store = stores(guard)
    walked = [await store.get(wants(source), ()) for _ in "abc"]
    for step in range(30):
        for first, grammar, other in zip("abc", walked, wanted, strict=True):
            token_id = a if step else WORDS.index(first)
            assert grammar.allowed() == other.allowed() is not None
            assert grammar.advance(token_id) and other.advance(token_id)
            assert grammar.allowed((a,)) == other.allowed((a,)) is not None
    assert guard.checked == [source]
    resumed = await store.get(wants(source), [a] * 30)
    assert guard.checked == [source, source], "compiled again, for those who come later"
    assert resumed.allowed() == walked[0].allowed()


async def test_a_grammar_that_fills_a_lexer_at_every_step_ends_its_own_answer(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stores(CountingGuard())
    grammar = await store.get(wants(regex("([ab]{1,60}c){1,9}")), ())
    monkeypatch.setattr(walk, "LIMITS", few_states(3))
    grammar._walk._compiled._matcher = grammar._walk._compiled.fresh()
    hopeless = Grammar(walk.Walk(grammar._walk._compiled), "guided_regex", float)
    assert hopeless.allowed() is None
    assert hopeless.fault is not None and hopeless.fault.code == "grammar_too_complex"
    assert grammar.allowed() is not None


async def test_closing_closes_the_guard(stores: Stores) -> None:
    guard = CountingGuard()
    stores(guard).close()
    assert guard.closed


def test_a_tokenizer_that_is_none_means_no_grammars(caplog: pytest.LogCaptureFixture) -> None:
    assert read_tokenizer('{"model": 1}', 10, [1]) is None
    assert "tokenizer cannot be used" in caplog.text
    assert read_tokenizer("{}", 10, []) is None, "without an end of sequence no answer could end"
