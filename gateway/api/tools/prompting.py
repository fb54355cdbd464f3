"""Telling a model of its tools when its chat template knows nothing of any: in words, before the conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gateway.api.tools.format import ToolFormat

_EXAMPLE = ("function_name", {"argument": "value"})


def in_words(
    messages: Sequence[dict[str, Any]], shown: Sequence[Mapping[str, Any]], form: ToolFormat
) -> list[dict[str, Any]]:
    """The messages with the tools, if any, in the system message, calls as the model would have written them, and
    results as something the user says."""
    told = [_plain(message, form) for message in messages]
    if not shown:
        return told
    words = _instructions(shown, form)
    if told and told[0]["role"] == "system":
        first = {**told[0], "content": f"{told[0]['content']}\n\n{words}"}
        return [first, *told[1:]]
    return [{"role": "system", "content": words}, *told]


def _instructions(shown: Sequence[Mapping[str, Any]], form: ToolFormat) -> str:
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in shown)
    return (
        "There are functions you can call. Each line between <tools> and </tools> describes one, with a JSON schema "
        f"of its arguments:\n<tools>\n{functions}\n</tools>\nA call is written like this, and nothing else with it:\n"
        f"{form.spelled([_EXAMPLE])}\nWhere no function helps, answer in words."
    )


def _plain(message: dict[str, Any], form: ToolFormat) -> dict[str, Any]:
    content = message.get("content") or ""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not calls:
        return message
    spelled = form.spelled([(call["function"]["name"], call["function"]["arguments"]) for call in calls])
    return {"role": message["role"], "content": f"{content}\n{spelled}" if content else spelled}
