"""Messages as clients send them → a chat as templates take it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Protocol, TypeAlias

import msgspec
from msgspec import Meta

from gateway.api.speech import Speech
from gateway.api.tools.declared import ToolUse
from gateway.api.tools.prompting import in_words
from gateway.errors import BadRequestError, UnsupportedError
from gateway.prompt import Chat

Role: TypeAlias = Literal["developer", "system", "user", "assistant", "tool"]
TemplateValue: TypeAlias = str | bool | int | float | None


class ContentPart(msgspec.Struct, kw_only=True):
    """A part of a message. Only text can be taken; fields of other types are not looked at."""

    type: str
    text: str | None = None
    refusal: str | None = None


class PastFunction(msgspec.Struct, kw_only=True):
    name: str
    arguments: str | dict[str, Any] | None = None


class PastCall(msgspec.Struct, kw_only=True):
    """A call that an earlier answer made."""

    id: str | None = None
    type: str | None = None
    function: PastFunction | None = None


class ChatMessage(msgspec.Struct, kw_only=True):
    role: Role
    content: str | Annotated[list[ContentPart], Meta(min_length=1)] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[PastCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


Messages: TypeAlias = Annotated[list[ChatMessage], Meta(min_length=1, max_length=4096)]
ReasoningEffort: TypeAlias = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
"""OpenAI's words for how long to think. Templates that know them tell the model."""

TemplateOptions: TypeAlias = Annotated[dict[str, TemplateValue], Meta(max_length=32)]


class HasMessages(Protocol):
    """Fields that say how messages become a prompt; every route that takes messages has them."""

    messages: list[ChatMessage]
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    add_special_tokens: bool | None
    chat_template_kwargs: dict[str, TemplateValue] | None
    reasoning_effort: ReasoningEffort | None


def chat_of(fields: HasMessages, use: ToolUse | None = None, speech: Speech | None = None) -> Chat:
    """What to render: tools through the template, or in words where it knows of none. Raises BadRequestError."""
    continues = bool(fields.continue_final_message)
    if continues and fields.add_generation_prompt:
        raise BadRequestError(
            "'continue_final_message' and 'add_generation_prompt' exclude each other.", param="continue_final_message"
        )
    effort: dict[str, TemplateValue] = (
        {} if fields.reasoning_effort is None else {"reasoning_effort": fields.reasoning_effort}
    )
    messages = [_for_template(i, message) for i, message in enumerate(fields.messages)]
    tools = () if use is None else use.shown
    if speech is not None and speech.tools is not None and not speech.template_takes_tools:
        messages, tools = in_words(messages, tools, speech.tools), ()
    elif speech is not None and speech.text_arguments:
        messages = [_with_text_arguments(message) for message in messages]
    return Chat(
        messages=messages,
        options=effort | (fields.chat_template_kwargs or {}),
        tools=tools,
        add_generation_prompt=not continues and fields.add_generation_prompt is not False,
        continue_final_message=continues,
        add_special_tokens=bool(fields.add_special_tokens),
    )


def _for_template(index: int, message: ChatMessage) -> dict[str, Any]:
    """A message as templates know it: `developer` is what newer clients call `system`."""
    content = _text(index, message)
    if content is None and not (message.role == "assistant" and message.tool_calls):
        param = f"messages[{index}].content"
        raise BadRequestError(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    shown: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": content}
    for name in ("name", "tool_call_id"):
        value = getattr(message, name)
        if value is not None:
            shown[name] = value
    thought = message.reasoning_content if message.reasoning is None else message.reasoning
    if thought is not None:
        shown["reasoning_content"] = shown["reasoning"] = thought
    if message.tool_calls:
        shown["tool_calls"] = [_call(f"messages[{index}].tool_calls[{i}]", c) for i, c in enumerate(message.tool_calls)]
        shown["content"] = content or ""  # templates add it to other text
    return shown


def _call(where: str, call: PastCall) -> dict[str, Any]:
    """A call as templates take it: its arguments as an object, not as a string of JSON."""
    if call.function is None:
        param = f"{where}.function"
        raise BadRequestError(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    arguments = call.function.arguments
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments or "{}", type=dict[str, Any])
        except msgspec.MsgspecError:
            param = f"{where}.function.arguments"
            raise BadRequestError(f"Invalid value for '{param}': it is no JSON object.", param=param,
                                  code="invalid_value") from None  # fmt: skip
    shown = {"type": "function", "function": {"name": call.function.name, "arguments": arguments or {}}}
    return shown if call.id is None else {"id": call.id, **shown}


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """For templates that add the arguments to other text, such as DeepSeek V3's."""
    if "tool_calls" not in message:
        return message
    calls = [
        {
            **call,
            "function": {**call["function"], "arguments": msgspec.json.encode(call["function"]["arguments"]).decode()},
        }
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _text(index: int, message: ChatMessage) -> str | None:
    """Parts are joined by a newline, as vLLM joins them."""
    content = message.content
    if content is None:
        return message.refusal
    if isinstance(content, str):
        return content
    texts = []
    for at, part in enumerate(content):
        text = part.text if part.type == "text" else part.refusal if part.type == "refusal" else None
        if part.type not in ("text", "refusal"):
            raise UnsupportedError(
                f"messages[{index}] has a content part of type '{part.type[:40]}'; this model takes text only.",
                param=f"messages[{index}].content[{at}].type",
            )
        if text is None:
            param = f"messages[{index}].content[{at}].{part.type}"
            raise BadRequestError(
                f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter"
            )
        texts.append(text)
    return "\n".join(texts)
