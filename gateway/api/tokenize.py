"""POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from configs.schema import ModelConfig
from gateway.api.exchange import Exchange
from gateway.api.fields import Body, ignored_header
from gateway.api.messages import Messages, ReasoningEffort, TemplateOptions, chat_of
from gateway.api.sampling import TokenId
from gateway.api.speech import Speeches
from gateway.api.tools.declared import ToolChoiceField, Tools, tool_use
from gateway.errors import BadRequestError
from gateway.names import ModelNames
from gateway.prompt import Prompter
from gateway.types import Gateway, Tenant
from replicas.contract import pack_tokens, unpack_tokens


class TokenizePromptRequest(msgspec.Struct, kw_only=True):
    """The plain form; with `messages` in the body it is `TokenizeChatRequest`."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatRequest(msgspec.Struct, kw_only=True):
    messages: Messages
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None
    reasoning_effort: ReasoningEffort | None = None
    tools: Tools | None = None
    tool_choice: ToolChoiceField | None = None
    parallel_tool_calls: bool | None = None
    model: str | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    tokens: Annotated[list[TokenId], Meta(max_length=1_000_000)]
    model: str | None = None


_FIELDS: msgspec.json.Decoder[dict[str, msgspec.Raw]] = msgspec.json.Decoder(dict[str, msgspec.Raw])


class Tokenize:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._names = ModelNames(gateway.config, gateway.catalogue)
        self._prompt = Body(TokenizePromptRequest)
        self._chat = Body(TokenizeChatRequest)
        self._tokens = Body(DetokenizeRequest)
        self._speeches = Speeches()

    async def tokenize(self, exchange: Exchange) -> None:
        tenant = self._gateway.tenants.authenticate(exchange.header(b"authorization"))
        body = await exchange.json_body()
        request, ignored = (self._chat if _has_messages(body) else self._prompt).decode(body)
        exchange.extra_headers += ignored_header(ignored)
        model, prompter = self._named(tenant, request.model)
        if isinstance(request, TokenizeChatRequest):
            chat = chat_of(request, tool_use(request), self._speeches.of(model, prompter))
            packed = await prompter.chat(chat, tenant.tenant_id)
        else:
            special = request.add_special_tokens is not False
            (packed,) = await prompter.texts([request.prompt], add_special_tokens=special)
        tokens = unpack_tokens(packed).tolist()
        facts = self._gateway.dispatcher.facts(model.id)
        answer: dict[str, Any] = {
            "count": len(tokens),
            "max_model_len": facts.max_model_len if facts else None,
            "tokens": tokens,
            "token_strs": [prompter.token_text.label(t) for t in tokens] if request.return_token_strs else None,
        }
        await exchange.send(msgspec.json.encode(answer))

    async def detokenize(self, exchange: Exchange) -> None:
        tenant = self._gateway.tenants.authenticate(exchange.header(b"authorization"))
        request, ignored = self._tokens.decode(await exchange.json_body())
        exchange.extra_headers += ignored_header(ignored)
        _, prompter = self._named(tenant, request.model)
        largest = max(request.tokens, default=0)
        if largest >= prompter.vocab_size:
            raise BadRequestError(
                f"Invalid value for 'tokens': {largest} is not a token; this model has {prompter.vocab_size}.",
                param="tokens",
            )
        text = prompter.decode(pack_tokens(request.tokens), skip_special_tokens=False)
        await exchange.send(msgspec.json.encode({"prompt": text}))

    def _named(self, tenant: Tenant, name: str | None) -> tuple[ModelConfig, Prompter]:
        """The model named, or the only one there is."""
        models = self._gateway.config.models
        if name is None and len(models) > 1:
            raise BadRequestError(
                "Missing required parameter: 'model'.", param="model", code="missing_required_parameter"
            )
        found = self._names.resolve(tenant, models[0].id if name is None else name).model
        return found, self._gateway.prompters[found.id]


def _has_messages(body: bytes) -> bool:
    try:
        return "messages" in _FIELDS.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False  # the full decoding that follows words the complaint
