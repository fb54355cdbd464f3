"""The formats by name, and which one a chat template speaks."""

from __future__ import annotations

import re

from gateway.api.harmony import HarmonyTools
from gateway.api.tools.format import ToolFormat
from gateway.api.tools.glm import GlmFormat
from gateway.api.tools.json_format import JsonFormat
from gateway.api.tools.json_reader import JsonMarks
from gateway.api.tools.mistral import MistralFormat
from gateway.api.tools.named import DEEPSEEK_V3, DEEPSEEK_V31, KIMI_K2
from gateway.api.tools.pythonic import LFM2, LLAMA4_PYTHONIC, OLMO3, PYTHONIC
from gateway.api.tools.qwen_xml import QwenXmlFormat

_HERMES = JsonFormat(JsonMarks(("<tool_call>",), "</tool_call>"))
_LISTED = JsonFormat(JsonMarks(("<tool_calls>",), "</tool_calls>"), listed=True, pad="")

TOOL_FORMATS: dict[str, ToolFormat] = {
    "hermes": _HERMES,
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v31": DEEPSEEK_V31,
    "ernie45": _HERMES,
    "glm45": GlmFormat(),
    "glm47": GlmFormat(),
    "granite4": _HERMES,
    "kimi_k2": KIMI_K2,
    "longcat": JsonFormat(JsonMarks(("<longcat_tool_call>",), "</longcat_tool_call>")),
    "qwen3_coder": QwenXmlFormat(),
    "qwen3_xml": QwenXmlFormat(),
    "llama3_json": JsonFormat(arguments_key="parameters"),
    "llama4_json": JsonFormat(arguments_key="parameters"),
    "mistral": MistralFormat(),
    "openai": HarmonyTools(),
    "granite": JsonFormat(JsonMarks(("<|tool_call|>", "<tool_call>")), listed=True, pad=""),
    "internlm": JsonFormat(JsonMarks(("<|action_start|><|plugin|>",), "<|action_end|>"), arguments_key="parameters"),
    "hunyuan_a13b": _LISTED,
    "jamba": _LISTED,
    "lfm2": LFM2,
    "llama4_pythonic": LLAMA4_PYTHONIC,
    "olmo3": OLMO3,
    "pythonic": PYTHONIC,
    "phi4_mini_json": JsonFormat(JsonMarks(("functools",)), listed=True, pad=""),
    "smollm2": JsonFormat(JsonMarks(("<tool_call>",), "</tool_call>"), listed=True, pad=""),
    "json": JsonFormat(),
}
"""By vLLM's names, where it has them."""


def tool_format(name: str, template: str) -> ToolFormat:
    """The format of a name; `auto` is what the template speaks, `hermes` where it speaks of none. Raises KeyError."""
    found = detect_tools(template) if name == "auto" else name
    if found == "mistral" and "[ARGS]" in template:
        return MistralFormat(listed=False, args_marker="[ARGS]")
    return TOOL_FORMATS[found]


def detect_tools(template: str) -> str:
    """The name of the format that a chat template teaches."""
    if "<｜tool▁calls▁begin｜>" in template:
        return "deepseek_v3" if "```json" in template else "deepseek_v31"
    for mark, name in _SIGNS:
        if mark in template:
            return name
    return "hermes"


_SIGNS = (
    ("<|channel|>", "openai"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|tool_calls_section_begin|>", "kimi_k2"),
    ("<longcat_tool_call>", "longcat"),
    ("<|tool_call_start|>", "lfm2"),
    ("<function_calls>", "olmo3"),
    ("<function=", "qwen3_coder"),
    ("<arg_key>", "glm45"),
    ("<tool_calls>", "jamba"),
    ("<|tool_call|>", "granite"),
    ("<|plugin|>", "internlm"),
    ("functools", "phi4_mini_json"),
    ("<tool_call>", "hermes"),
    ("<|python_tag|>", "llama3_json"),
    ("ipython", "llama3_json"),
)


def takes_tools(template: str) -> bool:
    """Whether a chat template does something with tools at all."""
    return re.search(r"\btools\b", template) is not None
