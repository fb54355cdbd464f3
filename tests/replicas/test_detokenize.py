"""Ids to text: whole characters only, the same as decoding at once, and stop strings wherever tokens break them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from replicas.contract import (
    EngineFacts,
    Fault,
    GenerateRequest,
    RefusedError,
    StepDelta,
    TokenLogprob,
    pack_tokens,
)
from replicas.detokenize import TextEngine
from replicas.engine.loop import BuiltEngine, ThreadedEngine
from replicas.incremental import ByteDetokenizer, Detokenizer, PrefixDetokenizer, Vocabulary
from replicas.local import LocalEngine
from replicas.sim_engine import SimOptions, build_sim
from replicas.sim_model import SimModel
from replicas.stops import StopMatcher
from tests.replicas.engine_kit import EOS, VOCAB_SIZE, engine_config, make_request

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps, the fox runs on and on.\n",
    "Größe, naïve façade; 你好世界，今天天气很好。こんにちは 😀 👩‍👩‍👧 ok\n",
]
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(
            ["the ", "fox", " ", "\n", "你好", "世", "😀", "👩‍👩‍👧", "é", "ö", "�", "🇩🇪", "कि", "dog", "<|end|>"]
        ),
        st.text(max_size=4),
    ),
    max_size=12,
).map("".join)


@cache
def byte_level() -> Tokenizer:
    """Byte-level BPE with special, added and untrained tokens (as SmolLM, Llama 3, Qwen)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_tokens(["<tool call>", "wörld", AddedToken("née", normalized=False)])
    tokenizer.add_special_tokens(["<|im start|>"])
    return tokenizer


@cache
def byte_fallback() -> Tokenizer:
    """SentencePiece-like, as Llama 2 and Mistral: ▁ for spaces, bytes for unknown characters."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz.,é"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("f", "o"), ("fo", "x"), ("▁", "fox")]
    vocab = {piece: i for i, piece in enumerate([*pieces, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


@cache
def metaspace() -> Tokenizer:
    """A decoder that nobody gave a table: the same pieces, without bytes, spaces by the tokenizer's own rule."""
    tokenizer = Tokenizer.from_str(byte_fallback().to_str())
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return tokenizer


@cache
def unusual_bytes() -> Tokenizer:
    """Byte-level BPE behind a decoder that nobody gave a table."""
    tokenizer = Tokenizer.from_str(byte_level().to_str())
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    return tokenizer


def detokenizer_of(tokenizer: Tokenizer, *, skip: bool = True) -> Detokenizer:
    return Vocabulary(tokenizer, skip_special_tokens=skip).detokenizer(tokenizer.encode("a").ids)


def decoded(tokenizer: Tokenizer, ids: Sequence[int], *, skip: bool = True) -> str:
    """At once, behind the same prompt."""
    prompt = tokenizer.encode("a").ids
    whole = tokenizer.decode([*prompt, *ids], skip_special_tokens=skip)
    return whole.removeprefix(tokenizer.decode(prompt, skip_special_tokens=skip))


def test_each_kind_of_tokenizer_gets_its_way() -> None:
    for tokenizer, kind in (
        (byte_level(), ByteDetokenizer),
        (byte_fallback(), ByteDetokenizer),
        (metaspace(), PrefixDetokenizer),
        (unusual_bytes(), PrefixDetokenizer),
    ):
        assert isinstance(detokenizer_of(tokenizer), kind)


@pytest.mark.parametrize("kind", [byte_level, byte_fallback, unusual_bytes])
@given(text=TEXTS, cut=st.integers(0, 8))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_text_is_never_half_a_character_and_ends_as_decoded_at_once(
    kind: Callable[[], Tokenizer], text: str, cut: int
) -> None:
    tokenizer = kind()
    text = text.replace("�", "") if kind is unusual_bytes else text
    ids = tokenizer.encode(text).ids
    ids = ids[: len(ids) - cut]
    detokenizer = detokenizer_of(tokenizer)
    shown = "".join([detokenizer.push((token_id,)) for token_id in ids])
    rest = detokenizer.flush()
    if "�" not in text:
        assert "�" not in shown, "half a character was shown"
    if kind is byte_fallback and cut:  # its decoder gives up too much: see below
        assert decoded(tokenizer, tokenizer.encode(text).ids).startswith(shown) or "�" in text
        return
    assert shown + rest == decoded(tokenizer, ids)
    if kind is not unusual_bytes and "�" not in text:
        assert shown == decoded(tokenizer, ids).rstrip("�"), "a whole character was held back"


def test_a_broken_character_does_not_take_whole_ones_with_it() -> None:
    ids = byte_fallback().encode("你好").ids[1:-1]
    assert byte_fallback().decode(ids) == "�" * 5
    detokenizer = detokenizer_of(byte_fallback())
    assert detokenizer.push(ids) + detokenizer.flush() == "你�"


@pytest.mark.parametrize("kind", [byte_level, byte_fallback])
@given(
    ids=st.lists(st.integers(0, 420), max_size=30), skip=st.booleans(), sizes=st.lists(st.integers(1, 5), max_size=30)
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_ids_in_any_order_and_portions_decode_as_at_once(
    kind: Callable[[], Tokenizer], ids: list[int], skip: bool, sizes: list[int]
) -> None:
    tokenizer = kind()
    if kind is byte_fallback:  # its decoder is only well behaved on UTF-8
        ids = [token_id for token_id in ids if not 3 + 128 <= token_id < 3 + 256]
    detokenizer = detokenizer_of(tokenizer, skip=skip)
    shown, start = [], 0
    for size in [*sizes, len(ids)]:
        shown.append(detokenizer.push(ids[start : start + size]))
        start += size
    assert "".join(shown) + detokenizer.flush() == decoded(tokenizer, ids, skip=skip)


@given(ids=st.lists(st.integers(259, 290), max_size=40), skip=st.booleans())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_words_and_spaces_come_as_decoded_at_once_by_the_tokenizer_itself(ids: list[int], skip: bool) -> None:
    detokenizer = detokenizer_of(metaspace(), skip=skip)
    shown = "".join([detokenizer.push((token_id,)) for token_id in ids])
    assert shown + detokenizer.flush() == decoded(metaspace(), ids, skip=skip)


@pytest.mark.parametrize("kind", [byte_fallback, metaspace])
def test_a_word_after_the_prompt_keeps_its_space(kind: Callable[[], Tokenizer]) -> None:
    tokenizer = kind()
    prompt, answer = tokenizer.encode("the fox").ids, tokenizer.encode("a fox").ids[2:]
    assert tokenizer.decode(answer) == "fox", "alone, the space in front is lost"
    detokenizer = Vocabulary(tokenizer, skip_special_tokens=True).detokenizer(prompt)
    assert "".join(detokenizer.push((token_id,)) for token_id in answer) == " fox"


@pytest.mark.parametrize("kind", [byte_level, byte_fallback, unusual_bytes])
def test_endless_invalid_bytes_do_not_pile_up(kind: Callable[[], Tokenizer]) -> None:
    bad = kind().token_to_id("<0xFF>") or kind().token_to_id("ÿ")
    detokenizer = detokenizer_of(kind())
    assert len("".join(detokenizer.push((bad,)) for _ in range(3000))) >= 2990


def test_many_skipped_special_tokens_do_not_pile_up() -> None:
    detokenizer = detokenizer_of(metaspace())
    for _ in range(1000):
        assert detokenizer.push((1,)) == ""
    assert isinstance(detokenizer, PrefixDetokenizer) and len(detokenizer._window) <= 130
    ids = metaspace().encode("the fox").ids
    assert "".join(detokenizer.push((token_id,)) for token_id in ids).strip() == "the fox"


# Stop strings.


def stopped(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """The slow obvious way: the end of the first complete stop string, the longest of those ending there."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return end, max(found, key=len)
    return None


@given(
    pieces=st.lists(st.text("ab\n", max_size=4), max_size=12),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=5), min_size=1, max_size=3),
)
@settings(max_examples=1000, deadline=None, derandomize=True)
def test_stop_strings_are_found_across_pieces_and_no_more_is_held_back_than_needed(
    pieces: list[str], stops: list[str]
) -> None:
    matcher, shown, given_text = StopMatcher(tuple(stops)), "", ""
    for piece in pieces:
        given_text += piece
        expected = stopped(given_text, stops)
        text, stop = matcher.feed(piece)
        shown += text
        if expected is not None:
            end, longest = expected
            assert stop == longest and shown == given_text[: end - len(longest)]
            return
        assert stop is None
        held = max((n for stop in stops for n in range(len(stop)) if given_text.endswith(stop[:n])), default=0)
        assert shown == given_text[: len(given_text) - held]
    assert shown + matcher.flush() == given_text


@given(text=st.text("ab", max_size=12), more=st.text("ab", max_size=12), stop=st.text("ab", min_size=1, max_size=4))
@settings(max_examples=500, deadline=None, derandomize=True)
def test_a_stop_string_complete_before_min_tokens_does_not_count_but_may_begin_there(
    text: str, more: str, stop: str
) -> None:
    matcher = StopMatcher((stop,))
    shown = matcher.skip(text)
    visible, found = matcher.feed(more)
    ends = [end for end in range(len(text) + 1, len(text + more) + 1) if (text + more)[:end].endswith(stop)]
    # One that begins inside another, overlapping one still counts.
    assert (found is not None) == bool(ends)
    if ends:
        assert shown + visible == (text + more)[: ends[0] - len(stop)]


def test_a_very_long_stop_string_costs_the_same_per_character() -> None:
    def seconds(length: int) -> float:
        matcher = StopMatcher(("a" * length + "b",))
        started = time.process_time()
        for _ in range(4000):
            matcher.feed("aaaa")
        return time.process_time() - started

    assert seconds(2000) < 50 * seconds(2) + 0.5


# The engine that wraps another.

FACTS = EngineFacts(
    engine="fake", model="m", vocab_size=VOCAB_SIZE, max_model_len=100, block_size=4, num_blocks=10, max_num_seqs=4,
    max_num_batched_tokens=16,
)  # fmt: skip


class Inner:
    """An engine that says what it is told to."""

    def __init__(self) -> None:
        self.aborted: list[str] = []
        self.submitted: list[GenerateRequest] = []
        self.refuses = False

    async def start(self, sink: Callable[[Sequence[StepDelta]], None]) -> EngineFacts:
        self.say = sink
        return FACTS

    def submit(self, request: GenerateRequest) -> None:
        if self.refuses:
            raise RefusedError(Fault("overloaded", "full"))
        self.submitted.append(request)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)


@cache
def bytes_tokenizer() -> Tokenizer:
    """Ids 0..255 are bytes, then <|im_start|>, <|im_end|> (as `sim:bytes`)."""
    tokenizer = Tokenizer(models.BPE(vocab={_char(byte): byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    return tokenizer


def _char(byte: int) -> str:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return chr(byte) if byte in printable else chr(0x100 + [b for b in range(256) if b not in printable].index(byte))


class Talk:
    """A TextEngine around an `Inner`, with everything that came out."""

    def __init__(self) -> None:
        self.inner = Inner()
        self.engine = TextEngine(self.inner, bytes_tokenizer())  # type: ignore[arg-type]
        self.out: list[StepDelta] = []

    async def open(self, request: GenerateRequest) -> Talk:
        await self.engine.start(self.out.extend)
        self.engine.submit(request)
        return self

    def say(self, text: str | bytes, finish_reason: str | None = None) -> None:
        """One delta with a token per byte."""
        data = text.encode() if isinstance(text, str) else text
        self.inner.say([StepDelta("a", 1, tuple(data), finish_reason=finish_reason)])  # type: ignore[arg-type]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.out)


async def test_text_follows_tokens_and_waits_for_whole_characters() -> None:
    talk = await Talk().open(make_request("a", b"hi"))
    for byte in "a😀é".encode():
        talk.say(bytes([byte]))
    talk.say(b"\xf0\x9f", "length")
    assert [delta.text for delta in talk.out] == ["a", "", "", "", "😀", "", "é", "�"]
    assert [len(delta.token_ids) for delta in talk.out] == [1] * 7 + [2]


async def test_the_end_of_sequence_token_is_delivered_without_text() -> None:
    shown = {"skip_special_tokens": False, "include_stop_str_in_output": True}
    shown = {"skip_special_tokens": False, "include_stop_str_in_output": True}
    for changes, text in (({}, "x"), ({"skip_special_tokens": False}, "x"), (shown, "x<|im_end|>")):
        talk = await Talk().open(make_request("a", b"hi", **changes))
        talk.say("x")
        talk.inner.say([StepDelta("a", 1, (EOS,), finish_reason="stop")])
        assert talk.text == text and talk.out[-1].token_ids == (EOS,)


async def test_special_tokens_in_the_middle_follow_skip_special_tokens() -> None:
    for skip, text in ((True, "xy"), (False, "x<|im_start|>y")):
        talk = await Talk().open(make_request("a", b"hi", skip_special_tokens=skip))
        talk.inner.say([StepDelta("a", 1, (120, 256, 121), finish_reason="length")])
        assert talk.text == text


async def test_a_stop_string_cuts_exactly_and_aborts_the_inner_request() -> None:
    talk = await Talk().open(make_request("a", b"hi", stop=("END", "\n\n"), max_tokens=99))
    for char in "so E":
        talk.say(char)
    assert talk.text == "so "
    talk.inner.say([StepDelta("a", 1, tuple(b"NDxyz"), logprobs=tuple(TokenLogprob(b, -1.0) for b in b"NDxyz"))])
    last = talk.out[-1]
    assert talk.text == "so " and (last.finish_reason, last.stop_reason) == ("stop", "END")
    assert last.token_ids == tuple(b"ND") and last.logprobs is not None and len(last.logprobs) == 2
    assert talk.inner.aborted == ["a"]
    talk.say("more")
    talk.inner.say([StepDelta("a", 1, finish_reason="abort")])
    assert talk.out[-1] is last, "what the inner engine says after the stop is dropped"


async def test_the_stop_string_is_shown_when_asked_for() -> None:
    talk = await Talk().open(make_request("a", b"hi", stop=("END",), include_stop_str_in_output=True))
    talk.say("ab E")
    talk.say("NDx")
    assert talk.text == "ab END" and talk.out[-1].stop_reason == "END"


async def test_text_held_back_for_a_stop_string_comes_when_it_was_none() -> None:
    talk = await Talk().open(make_request("a", b"hi", stop=("END",)))
    talk.say("E")
    talk.say("N")
    talk.say("x")
    talk.say("E", "length")
    assert [delta.text for delta in talk.out] == ["", "", "ENx", "E"]
    assert talk.out[-1].finish_reason == "length" and talk.inner.aborted == []


async def test_a_stop_string_completed_by_the_last_token_wins_over_length() -> None:
    talk = await Talk().open(make_request("a", b"hi", stop=("END",)))
    talk.say("xEND", "length")
    assert (talk.text, talk.out[-1].finish_reason, talk.out[-1].stop_reason) == ("x", "stop", "END")
    assert talk.inner.aborted == [], "the inner request had ended"


async def test_stop_strings_wait_for_min_tokens() -> None:
    talk = await Talk().open(make_request("a", b"hi", stop=("b",), min_tokens=3, max_tokens=9))
    for char in "ababab":
        talk.say(char)
        if talk.inner.aborted:
            break
    assert talk.text == "aba" and len(talk.out) == 4


@pytest.mark.parametrize("done", range(1, 9))
async def test_a_resumed_request_gives_exactly_the_rest_of_the_text(done: int) -> None:
    answer = "aEé😀".encode() + b"ENDx"
    first = await Talk().open(make_request("a", b"hi", stop=("END", "é😁")))
    for byte in answer[:done]:
        first.say(bytes([byte]))
    second = await Talk().open(make_request("a", b"hi", stop=("END", "é😁"), produced=pack_tokens(list(answer[:done]))))
    for byte in answer[done:]:
        if not second.inner.aborted:
            second.say(bytes([byte]))
    assert first.text + second.text == "aEé😀"
    assert second.out[-1].stop_reason == "END"


async def test_an_error_keeps_its_fault_and_what_was_held_back() -> None:
    talk = await Talk().open(make_request("a", b"hi", stop=("END",)))
    talk.say("xEN")
    talk.inner.say([StepDelta("a", 1, finish_reason="error", fault=Fault("engine_dead", "gone"))])
    assert talk.text == "xEN" and talk.out[-1].fault == Fault("engine_dead", "gone")


async def test_a_refused_request_leaves_nothing_behind() -> None:
    talk = Talk()
    talk.inner.refuses = True
    with pytest.raises(RefusedError):
        await talk.open(make_request("a", b"hi"))
    talk.inner.refuses = False
    talk.engine.submit(make_request("a", b"hi"))
    talk.say("x", "length")
    assert talk.text == "x"


async def test_stop_strings_on_a_real_engine_end_requests_and_free_their_blocks() -> None:
    config = engine_config(step_base_s=0.0002, step_per_sequence_s=0.0, num_blocks=400)
    model = SimModel(VOCAB_SIZE, (EOS,), tuple(range(97, 123)))
    engine = ThreadedEngine(lambda: build_sim(config, model, "sim", SimOptions(model.alphabet)))
    requests = [make_request(f"r{i}", [i, i, i], max_tokens=60, stop=("a", "xyz", "q"), seed=i) for i in range(30)]
    async with LocalEngine(TextEngine(engine, bytes_tokenizer())) as local:
        for request in requests:
            deltas = await local.generate(request)
            text = "".join(delta.text for delta in deltas)
            naive = bytes(model.generate([*memoryview(request.prompt).cast("I")], request.sampling)).decode()
            end = stopped(naive, request.sampling.stop)
            assert [delta.finish_reason is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]
            if end is None:
                assert (text, deltas[-1].finish_reason) == (naive, "length")
            else:
                assert text == naive[: end[0] - len(end[1])] and deltas[-1].stop_reason == end[1]
        await local.engine.drain()
        assert local.engine.stats().num_free_blocks == 400


def test_built_engines_are_the_factory_type() -> None:
    model = SimModel(VOCAB_SIZE, (EOS,), (97, 98))
    assert isinstance(build_sim(engine_config(), model, "m", SimOptions((97,))), BuiltEngine)
