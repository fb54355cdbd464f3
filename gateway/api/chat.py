"""POST /v1/chat/completions: messages in, a message out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from msgspec import Meta

from gateway.api.answer import Call, Choice, Identity, Meter, Prompt
from gateway.api.chunks import Chunks, Shape
from gateway.api.generate import Target
from gateway.api.messages import Messages, TemplateOptions, chat_of
from gateway.api.sampling import MAX_LOGPROBS, Count, Logprobs, SamplingFields
from gateway.errors import BadRequestError
from gateway.sse import encode
from gateway.tokens import TokenText
from replicas.contract import StepDelta, TokenLogprob

SHAPE = Shape(
    object_name="chat.completion.chunk",
    before_text=b'"delta":{"content":',
    after_text=b"}",
    no_text=b'"delta":{}',
)
_ROLE = b'"delta":{"role":"assistant","content":"","refusal":null},"logprobs":null,"finish_reason":null'
NO_LOGPROB = -9999.0  # OpenAI's floor; JSON has no infinity


class ChatRequest(SamplingFields, kw_only=True):
    messages: Messages
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def output_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check(self) -> None:
        super().check()
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise BadRequestError(
                "'max_tokens' and 'max_completion_tokens' are two names of one limit; give one of them.",
                param="max_tokens",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise BadRequestError("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")


class ChatRoute:
    """The chat side of `generate.Route`."""

    name = "chat.completions"
    id_prefix = "chatcmpl"

    async def prepare(self, fields: ChatRequest, target: Target) -> Call:
        ids = await target.prompter.chat(chat_of(fields), target.tenant.tenant_id)
        return Call(
            fields=fields,
            model=target.model,
            prompter=target.prompter,
            prompts=(Prompt(ids),),
            logprobs=Logprobs(output=(fields.top_logprobs or 0) if fields.logprobs else None),
            num_generated=fields.num_choices,
            prompt_param="messages",
        )

    def chunks(self, call: Call, identity: Identity, meter: Meter) -> Chunks:
        return ChatChunks(call, identity, meter)

    def whole(self, call: Call, identity: Identity, choices: list[Choice]) -> dict[str, Any]:
        body: dict[str, Any] = {
            "id": identity.answer_id,
            "object": "chat.completion",
            "created": identity.created,
            "model": identity.model,
            "system_fingerprint": identity.fingerprint,
            "choices": [_choice(call, index, choice) for index, choice in enumerate(choices)],
        }
        if call.fields.return_token_ids:
            body["prompt_token_ids"] = call.prompts[0].token_ids()
        return body


class ChatChunks(Chunks):
    """Every choice begins with its role."""

    def __init__(self, call: Call, identity: Identity, meter: Meter) -> None:
        wanted = call.logprobs.output
        self._scores = None if wanted is None else ChatLogprobs(call.prompter.token_text, wanted)
        super().__init__(SHAPE, call, identity, meter)

    def logprobs(self, index: int, delta: StepDelta) -> object | None:
        return self._scores.output(delta.logprobs) if self._scores and delta.logprobs else None

    def opening(self, index: int, delta: StepDelta) -> bytes:
        if self.call.fields.return_token_ids:
            return self.choice(index, _ROLE, b',"prompt_token_ids":' + encode(self.call.prompts[0].token_ids()))
        return self.choice(index, _ROLE)


class ChatLogprobs:
    """OpenAI's `logprobs.content`: every token with exactly `num_top` alternatives."""

    def __init__(self, token_text: TokenText, num_top: int) -> None:
        self._token_text = token_text
        self._num_top = num_top

    def output(self, scored: Sequence[TokenLogprob]) -> dict[str, Any]:
        content = []
        for position in scored:
            entry = self._token(position.token_id, position.logprob)
            entry["top_logprobs"] = [self._token(*top) for top in position.top[: self._num_top]]
            content.append(entry)
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._token_text.label(token_id),
            "logprob": max(logprob, NO_LOGPROB),
            "bytes": list(self._token_text.as_bytes(token_id)),
        }


def _choice(call: Call, index: int, choice: Choice) -> dict[str, Any]:
    wanted = call.logprobs.output
    logprobs = None if wanted is None else ChatLogprobs(call.prompter.token_text, wanted).output(choice.logprobs)
    shown: dict[str, Any] = {
        "index": index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": choice.finish_reason,
    }
    if choice.stop_reason is not None:
        shown["stop_reason"] = choice.stop_reason
    if call.fields.return_token_ids:
        shown["token_ids"] = choice.token_ids
    return shown
