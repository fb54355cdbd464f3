"""POST /v1/chat/completions: messages in, a message out."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from msgspec import Meta

from gateway.api.answer import Call, Choice, Identity, Meter, Prompt
from gateway.api.chat_chunks import ChatChunks, ChatLogprobs, ReadChunks
from gateway.api.chunks import Chunks
from gateway.api.generate import Target
from gateway.api.messages import Messages, ReasoningEffort, TemplateOptions, chat_of
from gateway.api.prompt_logprobs import shown_prompt_logprobs
from gateway.api.read_message import message_of
from gateway.api.sampling import MAX_LOGPROBS, Count, Logprobs, SamplingFields
from gateway.api.speech import Reading, Speech, Speeches
from gateway.api.tools.declared import ToolChoiceField, Tools, ToolUse, tool_use
from gateway.errors import BadRequestError, UnsupportedError
from gateway.prompt import Chat


class ChatRequest(SamplingFields, kw_only=True):
    messages: Messages
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None
    reasoning_effort: ReasoningEffort | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoiceField | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None

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

    def __init__(self) -> None:
        self._speeches = Speeches()

    async def prepare(self, fields: ChatRequest, target: Target) -> Call:
        speech, use = self._speeches.of(target.model, target.prompter), tool_use(fields)
        if use is not None and speech.tools is None:
            raise UnsupportedError("This model calls no tools.", param="tools")
        chat = chat_of(fields, use, speech)
        text = target.prompter.render(chat)
        reading = _reading(fields, use, target, speech, chat, text)
        asked = fields.constraint()
        return Call(
            fields=fields,
            model=target.model,
            prompter=target.prompter,
            prompts=(Prompt(await target.prompter.chat_ids(text, chat, target.tenant.tenant_id)),),
            logprobs=Logprobs((fields.top_logprobs or 0) if fields.logprobs else None, fields.prompt_logprobs),
            num_generated=fields.num_choices,
            prompt_param="messages",
            constraint=asked if reading is None else reading.constrained(asked),
            reading=reading,
        )

    def chunks(self, call: Call, identity: Identity, meter: Meter) -> Chunks:
        if call.reading is None:
            return ChatChunks(call, identity, meter)
        return ReadChunks(call, call.reading, identity, meter)

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
        if call.fields.prompt_logprobs is not None:
            body["prompt_logprobs"] = shown_prompt_logprobs(call, choices[0])
        return body


def _reading(
    fields: ChatRequest, use: ToolUse | None, target: Target, speech: Speech, chat: Chat, prompt: str
) -> Reading | None:
    """None for text that is only text."""
    stage = None
    if speech.reasoning is not None:
        stage = speech.reasoning.stage(prompt, continues=chat.continue_final_message)
    if use is None and stage in (None, "after"):
        return None
    new_id = partial(speech.call_id, target.random)
    return Reading(speech, use, stage, new_id, show_thoughts=fields.include_reasoning is not False)


def _choice(call: Call, index: int, choice: Choice) -> dict[str, Any]:
    wanted = call.logprobs.output
    logprobs = None if wanted is None else ChatLogprobs(call.prompter.token_text, wanted).output(choice.logprobs)
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    finish_reason = choice.finish_reason
    if call.reading is not None:
        message, num_calls = message_of(call.reading, choice.text)
        finish_reason = call.reading.finish_reason(finish_reason, num_calls)
    shown: dict[str, Any] = {
        "index": index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
    }
    if choice.stop_reason is not None:
        shown["stop_reason"] = choice.stop_reason
    if call.fields.return_token_ids:
        shown["token_ids"] = choice.token_ids
    return shown
