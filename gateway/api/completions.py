"""POST /v1/completions: a prompt, or a list of them, as text or token ids; with `echo` also a way to score text."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Annotated, Any, TypeAlias

from msgspec import Meta

from gateway.api.answer import Call, Choice, Identity, Meter, Prompt
from gateway.api.chat_chunks import NO_LOGPROB
from gateway.api.chunks import Chunks, Shape
from gateway.api.generate import Target
from gateway.api.prompt_logprobs import shown_prompt_logprobs
from gateway.api.sampling import Logprobs, SamplingFields, TokenId
from gateway.errors import BadRequestError
from gateway.sse import encode, json_text, one_line
from gateway.tokens import TokenText
from replicas.contract import StepDelta, TokenLogprob, pack_tokens

MAX_COMPLETION_LOGPROBS = 5  # OpenAI's bound; chat has its own

SHAPE = Shape(object_name="text_completion", before_text=b'"text":', after_text=b"", no_text=b'"text":""')

PromptField: TypeAlias = (
    str | Annotated[list[str | TokenId | Annotated[list[TokenId], Meta(min_length=1)]], Meta(min_length=1)]
)


class CompletionRequest(SamplingFields, kw_only=True):
    prompt: PromptField
    best_of: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_COMPLETION_LOGPROBS)] | None = None
    add_special_tokens: bool | None = None

    @property
    def num_generated(self) -> int:
        return self.best_of or self.num_choices  # 0 and null ask for no ranking

    def check(self) -> None:
        super().check()
        if self.num_generated < self.num_choices:
            raise BadRequestError(
                f"'best_of' ({self.best_of}) must not be smaller than 'n' ({self.num_choices}).", param="best_of"
            )
        if self.stream and self.num_generated > self.num_choices:
            raise BadRequestError("'best_of' cannot be streamed: the best is known only at the end.", param="best_of")


class CompletionRoute:
    """The completions side of `generate.Route`."""

    name = "completions"
    id_prefix = "cmpl"

    async def prepare(self, fields: CompletionRequest, target: Target) -> Call:
        output = fields.logprobs
        if output is None and fields.num_generated > fields.num_choices:
            output = 0  # best_of ranks by them
        return Call(
            fields=fields,
            model=target.model,
            prompter=target.prompter,
            prompts=tuple(await _prompts(fields, target)),
            logprobs=Logprobs(output, _num_prompt_logprobs(fields)),
            num_generated=fields.num_generated,
            prompt_param="prompt",
            constraint=fields.constraint(),
        )

    def chunks(self, call: Call, identity: Identity, meter: Meter) -> Chunks:
        return CompletionChunks(call, identity, meter)

    def whole(self, call: Call, identity: Identity, choices: list[Choice]) -> dict[str, Any]:
        return {
            "id": identity.answer_id,
            "object": "text_completion",
            "created": identity.created,
            "model": identity.model,
            "system_fingerprint": identity.fingerprint,
            "choices": [_choice(call, index, choice) for index, choice in enumerate(choices)],
        }


class CompletionChunks(Chunks):
    """With `echo` a choice begins with its prompt: text and, if asked for, logprobs."""

    def __init__(self, call: Call, identity: Identity, meter: Meter) -> None:
        num_scored = 0 if call.logprobs.output is None else len(call.prompts) * call.num_generated
        self._scores = [CompletionLogprobs(call) for _ in range(num_scored)]
        super().__init__(SHAPE, call, identity, meter)

    def logprobs(self, index: int, delta: StepDelta) -> object | None:
        return self._scores[index].output(delta.logprobs) if self._scores and delta.logprobs else None

    def opening(self, index: int, delta: StepDelta) -> bytes:
        prompt = self.call.prompts[index // self.call.num_generated]
        logprobs, extra = b"null", b""
        if delta.prompt_logprobs:
            logprobs = one_line(encode(self._scores[index].prompt(prompt, delta.prompt_logprobs)))
        if self.call.fields.return_token_ids:
            extra = b',"prompt_token_ids":' + encode(prompt.token_ids())
        if not (prompt.echo or extra or delta.prompt_logprobs):
            return b""
        middle = b'"text":%s,"logprobs":%s,"finish_reason":null' % (json_text(prompt.echo), logprobs)
        return self.choice(index, middle, extra)


class CompletionLogprobs:
    """The completions API's four parallel lists. `text_offset` counts characters of the text as returned, echo
    included; a token that is half a character starts where that character does."""

    def __init__(self, call: Call) -> None:
        self._token_text: TokenText = call.prompter.token_text
        self._skip_special = call.skip_special_tokens
        self._num_top = call.logprobs.output or 0
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def prompt(self, prompt: Prompt, scored: Sequence[TokenLogprob | None]) -> dict[str, Any]:
        """Lists of the prompt's tokens; the first has no logprob."""
        lists = _no_lists()
        for token_id, position in zip(prompt.token_ids(), scored, strict=True):
            self._append(lists, token_id, position)
            special = self._token_text.is_special(token_id)
            # Special tokens that the tokenizer added are not in the text; those the client wrote are.
            if not special or prompt.echo.startswith(self._token_text.label(token_id), self._offset):
                self._advance(token_id)
        return lists

    def output(self, scored: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Lists of output tokens that follow those given before."""
        lists = _no_lists()
        for position in scored:
            self._append(lists, position.token_id, position)
            if not (self._skip_special and self._token_text.is_special(position.token_id)):
                self._advance(position.token_id)
        return lists

    def _append(self, lists: dict[str, Any], token_id: int, position: TokenLogprob | None) -> None:
        lists["tokens"].append(self._label(token_id))
        lists["text_offset"].append(self._offset)
        if position is None:
            lists["token_logprobs"].append(None)
            lists["top_logprobs"].append(None)
            return
        logprob = max(position.logprob, NO_LOGPROB)
        top: dict[str, float] = {}
        for other_id, other in position.top[: self._num_top]:
            top.setdefault(self._label(other_id), max(other, NO_LOGPROB))
        top.setdefault(self._label(token_id), logprob)
        lists["token_logprobs"].append(logprob)
        lists["top_logprobs"].append(top)

    def _advance(self, token_id: int) -> None:
        self._offset += len(self._utf8.decode(self._token_text.as_bytes(token_id)))

    def _label(self, token_id: int) -> str:
        label = self._token_text.label(token_id)
        return label if self._token_text.is_text(token_id) else f"bytes:{label}"


def _no_lists() -> dict[str, Any]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _num_prompt_logprobs(fields: CompletionRequest) -> int | None:
    asked = [n for n in (fields.logprobs if fields.echo else None, fields.prompt_logprobs) if n is not None]
    return max(asked, default=None)


async def _prompts(fields: CompletionRequest, target: Target) -> list[Prompt]:
    """The prompts in the order given. Raises BadRequestError for an id that is no token."""
    given = [fields.prompt] if isinstance(fields.prompt, str) else fields.prompt
    if all(isinstance(item, str) for item in given):
        texts = [item for item in given if isinstance(item, str)]
        special = fields.add_special_tokens is not False
        ids = await target.prompter.texts(texts, add_special_tokens=special)
        return [Prompt(packed, text if fields.echo else "") for packed, text in zip(ids, texts, strict=True)]
    if all(isinstance(item, int) for item in given):
        return [_from_ids(fields, target, [item for item in given if isinstance(item, int)])]
    if not all(isinstance(item, list) for item in given):
        raise BadRequestError(
            "Invalid value for 'prompt': give strings, token ids, or lists of token ids, not a mixture.",
            param="prompt",
            code="invalid_type",
        )
    return [_from_ids(fields, target, item) for item in given if isinstance(item, list)]


def _from_ids(fields: CompletionRequest, target: Target, token_ids: list[int]) -> Prompt:
    if (largest := max(token_ids)) >= target.facts.vocab_size:
        raise BadRequestError(
            f"Invalid value for 'prompt': {largest} is not a token; this model has {target.facts.vocab_size}.",
            param="prompt",
        )
    packed = pack_tokens(token_ids)
    if not fields.echo:
        return Prompt(packed)
    return Prompt(packed, target.prompter.decode(packed, skip_special_tokens=fields.skip_special_tokens is not False))


def _choice(call: Call, index: int, choice: Choice) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "index": index,
        "text": choice.prompt.echo + choice.text,
        "logprobs": _logprobs(call, choice),
        "finish_reason": choice.finish_reason,
    }
    if choice.stop_reason is not None:
        shown["stop_reason"] = choice.stop_reason
    if call.fields.return_token_ids:
        shown["token_ids"] = choice.token_ids
        shown["prompt_token_ids"] = choice.prompt.token_ids()
    if call.fields.prompt_logprobs is not None:
        shown["prompt_logprobs"] = shown_prompt_logprobs(call, choice)
    return shown


def _logprobs(call: Call, choice: Choice) -> dict[str, Any] | None:
    if not isinstance(call.fields, CompletionRequest) or call.fields.logprobs is None:
        return None
    writer = CompletionLogprobs(call)
    echoed = choice.prompt_logprobs if call.fields.echo else ()
    lists = writer.prompt(choice.prompt, echoed) if echoed else _no_lists()
    for name, values in writer.output(choice.logprobs).items():
        lists[name] += values
    return lists
