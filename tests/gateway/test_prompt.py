from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel

from configs.tokenizer import ModelFiles
from gateway.errors import BadRequestError
from gateway.prompt import THREAD_ABOVE_CHARS, Chat, Prompter, SegmentCache, cut_tokens
from replicas.contract import pack_tokens, unpack_tokens

pieces = st.one_of(
    st.sampled_from(
        ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_", "start|>", "<", "|>", "\n", " ", "  x ", "1"]
    ),
    st.text(max_size=12),
)
texts = st.lists(pieces, max_size=24).map("".join).filter(lambda text: text.encode("utf-8", "ignore").decode() == text)
many = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def whole(files: ModelFiles, text: str) -> list[int]:
    return list(files.tokenizer.encode(text, add_special_tokens=False).ids)


async def rendered(prompter: Prompter, text: str) -> list[int]:
    return unpack_tokens(await prompter.rendered(text, "tenant")).tolist()


def messages(*turns: str) -> list[dict[str, str]]:
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": turn} for i, turn in enumerate(turns)]


@many
@given(parts=st.lists(texts, min_size=1, max_size=3))
async def test_segments_through_the_cache_equal_the_whole_text_with_bytes(
    sim_files: ModelFiles, parts: list[str]
) -> None:
    prompter = Prompter(sim_files)
    for text in [parts[0], "".join(parts), parts[0]]:
        assert await rendered(prompter, text) == whole(sim_files, text)


@pytest.mark.model
@many
@given(parts=st.lists(texts, min_size=1, max_size=3))
async def test_segments_through_the_cache_equal_the_whole_text_with_smollm2(
    smollm2_files: ModelFiles, parts: list[str]
) -> None:
    prompter = Prompter(smollm2_files)
    for text in [parts[0], "".join(parts), parts[0]]:
        assert await rendered(prompter, text) == whole(smollm2_files, text)


@pytest.mark.model
async def test_growing_chat_tokenises_only_what_is_new(smollm2_files: ModelFiles) -> None:
    seen: dict[str, int] = {"cache": 0, "tokenizer": 0}

    def observe(source: str, num_chars: int) -> None:
        seen[source] += num_chars

    prompter = Prompter(smollm2_files, observe=observe)
    long = "All work and no play makes Jack a dull boy. " * 40
    await prompter.chat(Chat(messages(long), {}), "tenant")
    seen.update(cache=0, tokenizer=0)
    grown = Chat(messages(long, "Indeed.", "Why?"), {})
    ids = await prompter.chat(grown, "tenant")
    assert unpack_tokens(ids).tolist() == whole(smollm2_files, prompter.render(grown))
    assert seen["cache"] > len(long)
    assert seen["tokenizer"] < 200


async def test_one_owner_never_profits_from_what_another_has_sent(sim_files: ModelFiles) -> None:
    sources: list[tuple[str, int]] = []
    prompter = Prompter(sim_files, observe=lambda source, n: sources.append((source, n)))
    text = prompter.render(Chat(messages("secret"), {}))
    for owner in ("a", "b"):
        await prompter.rendered(text, owner)
    assert sources == [("tokenizer", len(text)), ("cache", 0)] * 2


def test_tokens_that_another_token_overlaps_are_not_cut_at() -> None:
    tokenizer = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    plain = {"normalized": False, "special": True}
    tokenizer.add_special_tokens(
        [
            AddedToken("<clean>", **plain),
            AddedToken("<inner>", **plain),
            AddedToken("x<inner>y", **plain),
            AddedToken("<tail>", **plain),
            AddedToken("tail>z", **plain),
            AddedToken("<strips>", rstrip=True, **plain),
            AddedToken("abab", **plain),
        ]
    )
    template = "<clean> <inner> x<inner>y <tail> tail>z <strips> abab"
    assert cut_tokens(tokenizer, template) == ("<clean>",)


def test_cache_stays_within_its_bytes_and_forgets_the_least_recently_used() -> None:
    cache = SegmentCache(max_bytes=4000)
    for i in range(50):
        cache.put("t", f"segment {i}", b"1234")
        cache.get("t", "segment 0")
    assert cache.num_bytes <= 4000
    assert cache.get("t", "segment 0") == b"1234"
    assert cache.get("t", "segment 1") is None
    cache.put("t", "huge" * 1000, b"1234")
    assert cache.get("t", "huge" * 1000) is None


async def test_long_text_is_tokenised_in_a_thread_with_the_same_ids(sim_files: ModelFiles) -> None:
    prompter = Prompter(sim_files)
    text = "é" * (THREAD_ABOVE_CHARS + 1)
    (ids,) = await prompter.texts([text], add_special_tokens=True)
    assert ids == pack_tokens(list(text.encode()))
    assert await rendered(prompter, text) == list(text.encode())


def template(files: ModelFiles, source: str) -> Prompter:
    return Prompter(replace(files, chat_template=source), wall=lambda: 0.0)


def test_templates_have_the_usual_globals(sim_files: ModelFiles) -> None:
    source = (
        "{{ bos_token }}{{ strftime_now('%Y') }}{{ messages | tojson }}{% for m in messages %}{% if loop.index > 1 %}"
        "{% break %}{% endif %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ mood }}"
    )
    files = replace(sim_files, special=replace(sim_files.special, bos_token="<s>"))
    text = template(files, source).render(Chat(messages("<é>", "no"), {"mood": "calm"}))
    expected = '[{"role": "user", "content": "<é>"}, {"role": "assistant", "content": "no"}]'
    assert text == f"<s>{1970 if '1970' in text else 1969}{expected}<é>calm"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + 1 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ missing.field.deeper }}",
    ],
)
def test_a_template_that_fails_is_the_messages_fault(sim_files: ModelFiles, source: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        template(sim_files, source).render(Chat(messages("hi"), {}))
    assert caught.value.param == "messages"
    assert caught.value.code == "chat_template_error"


def test_what_a_template_refuses_is_told(sim_files: ModelFiles) -> None:
    with pytest.raises(BadRequestError, match="roles must alternate"):
        template(sim_files, "{{ raise_exception('roles must alternate') }}").render(Chat(messages("hi"), {}))


@pytest.mark.parametrize("name", ["messages", "raise_exception", "add_generation_prompt", "range"])
def test_template_variables_of_ours_cannot_be_set(sim_files: ModelFiles, name: str) -> None:
    with pytest.raises(BadRequestError, match=name):
        Prompter(sim_files).render(Chat(messages("hi"), {name: "x"}))


def test_template_that_does_not_parse_is_a_value_error(sim_files: ModelFiles) -> None:
    with pytest.raises(ValueError, match="line 1"):
        template(sim_files, "{% for %}")


def test_model_without_template_says_so(sim_files: ModelFiles) -> None:
    with pytest.raises(BadRequestError, match="no chat template"):
        Prompter(replace(sim_files, chat_template=None)).render(Chat(messages("hi"), {}))


@pytest.mark.parametrize(("final", "kept"), [("The answer is", "The answer is"), ("So: ", "So: "), (" a b", "a b")])
def test_final_message_is_continued_right_after_its_text(sim_files: ModelFiles, final: str, kept: str) -> None:
    chat = Chat(messages("q", final), {}, add_generation_prompt=False, continue_final_message=True)
    assert Prompter(sim_files).render(chat).endswith(kept)


def test_an_empty_final_message_cannot_be_continued(sim_files: ModelFiles) -> None:
    chat = Chat(messages("q", " "), {}, add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(BadRequestError, match="continue_final_message"):
        Prompter(sim_files).render(chat)


@many
@given(text=texts)
def test_bytes_of_tokens_spell_the_text_with_bytes(sim_files: ModelFiles, text: str) -> None:
    token_text = Prompter(sim_files).token_text
    assert b"".join(map(token_text.as_bytes, whole(sim_files, text))) == text.encode()


@pytest.mark.model
@many
@given(text=texts)
def test_bytes_of_tokens_spell_what_smollm2_decodes(smollm2_files: ModelFiles, text: str) -> None:
    ids = whole(smollm2_files, text)  # not always the text: its vocabulary lacks some control characters
    spelt = b"".join(map(Prompter(smollm2_files).token_text.as_bytes, ids))
    assert spelt.decode(errors="replace") == smollm2_files.tokenizer.decode(ids, skip_special_tokens=False)


def test_half_a_character_is_labelled_by_its_bytes(sim_files: ModelFiles) -> None:
    token_text = Prompter(sim_files).token_text
    assert token_text.label(0xE2) == "\\xe2"
    assert token_text.label(ord("a")) == "a"
    assert token_text.as_bytes(10**6) == b""
