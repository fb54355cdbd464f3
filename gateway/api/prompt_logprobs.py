"""vLLM's `prompt_logprobs`: for each token of the prompt a mapping from token ids to their logprobs.

Every token of the prompt is computed for them, whatever the prefix cache holds, so they are for administrators; to
score texts there is `echo` with `logprobs`.
"""

from __future__ import annotations

from typing import Any

from gateway.api.answer import Call, Choice
from gateway.api.chat_chunks import NO_LOGPROB
from gateway.tokens import TokenText
from replicas.contract import TokenLogprob


def shown_prompt_logprobs(call: Call, choice: Choice) -> list[dict[str, Any] | None]:
    """As vLLM shows them: the first token has none; a rank that is not known is null."""
    num_top = call.fields.prompt_logprobs or 0
    return [_position(call.prompter.token_text, scored, num_top) for scored in choice.prompt_logprobs]


def _position(token_text: TokenText, scored: TokenLogprob | None, num_top: int) -> dict[str, Any] | None:
    if scored is None:
        return None
    ranked = {token_id: (rank, logprob) for rank, (token_id, logprob) in enumerate(scored.top[:num_top], 1)}
    ranks: dict[int, tuple[int | None, float]] = {scored.token_id: (None, scored.logprob), **ranked}
    return {
        str(token_id): {
            "logprob": max(logprob, NO_LOGPROB),
            "rank": rank,
            "decoded_token": token_text.label(token_id),
        }
        for token_id, (rank, logprob) in ranks.items()
    }
