"""Chat templates: a model's own Jinja template, in a sandbox, with the globals Hugging Face templates count on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gateway.errors import BadRequestError


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's part for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 — jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """Renders messages to the text a model was trained on.

    `special_tokens` are names a template may use (`bos_token`, `eos_token` …) with their text; `wall` is the time of
    day for templates that write the date. Raises ValueError for a template that does not parse.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], wall: Callable[[], float]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda layout: datetime.fromtimestamp(wall()).strftime(layout)
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._reserved = {*self._special_tokens, *environment.globals, "messages", "tools", "documents",
                          "add_generation_prompt"}  # fmt: skip
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ValueError(f"chat template, line {error.lineno}: {error.message}") from error

    def render(
        self,
        messages: list[dict[str, Any]],
        options: Mapping[str, Any],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        generation_prompt: bool,
    ) -> str:
        """The prompt's text. `options` are the client's template variables. Raises BadRequestError when the template
        refuses the messages or cannot digest them."""
        for name in options:
            if name in self._reserved:
                raise BadRequestError(
                    f"'{name}' cannot be set through chat_template_kwargs.", param=f"chat_template_kwargs.{name}"
                )
        try:
            return self._template.render(
                self._special_tokens,
                **options,
                messages=messages,
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=generation_prompt,
            )
        except TemplateError as error:
            raise BadRequestError(f"The model's chat template refused the messages: {error.message}",
                                  param="messages", code="chat_template_error") from error  # fmt: skip
        except Exception as error:  # a template is a program: whatever it trips over is the messages' fault
            raise BadRequestError("The model's chat template cannot render these messages.",
                                  param="messages", code="chat_template_error") from error  # fmt: skip


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:  # fmt: skip
    """Plain JSON: jinja2's own `tojson` escapes for HTML, which models have not been trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
