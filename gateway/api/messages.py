"""Messages as clients send them → a chat as templates take it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Protocol, TypeAlias

import msgspec
from msgspec import Meta

from gateway.errors import BadRequestError, UnsupportedError
from gateway.prompt import Chat

Role: TypeAlias = Literal["developer", "system", "user", "assistant", "tool"]
TemplateValue: TypeAlias = str | bool | int | float | None


class ContentPart(msgspec.Struct, kw_only=True):
    """A part of a message. Only text can be taken; fields of other types are not looked at."""

    type: str
    text: str | None = None
    refusal: str | None = None


class ChatMessage(msgspec.Struct, kw_only=True):
    role: Role
    content: str | Annotated[list[ContentPart], Meta(min_length=1)] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


Messages: TypeAlias = Annotated[list[ChatMessage], Meta(min_length=1, max_length=4096)]
TemplateOptions: TypeAlias = Annotated[dict[str, TemplateValue], Meta(max_length=32)]


class HasMessages(Protocol):
    """Fields that say how messages become a prompt; every route that takes messages has them."""

    messages: list[ChatMessage]
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    add_special_tokens: bool | None
    chat_template_kwargs: dict[str, TemplateValue] | None


def chat_of(fields: HasMessages) -> Chat:
    """What to render. Raises BadRequestError."""
    continues = bool(fields.continue_final_message)
    if continues and fields.add_generation_prompt:
        raise BadRequestError(
            "'continue_final_message' and 'add_generation_prompt' exclude each other.", param="continue_final_message"
        )
    return Chat(
        messages=[_for_template(i, message) for i, message in enumerate(fields.messages)],
        options=fields.chat_template_kwargs or {},
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
    for name in ("name", "tool_calls", "tool_call_id", "reasoning_content"):
        value = getattr(message, name)
        if value is not None:
            shown[name] = value
    return shown


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
