"""Explanations, whichever ingress is asked: a request's id names the ingress that has them.

GET ─► own log ─► found
          └─ another ingress's id, or a name that only its ingress knows ─► ask it (`routing.questions`) ─► its log
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeAlias

import msgspec

from gateway.decisions import Asked, DecisionLog, Explanation, parse
from gateway.errors import DecisionNotFoundError, UnavailableError
from routing.store import StoreError

RETRY_S = 1.0

MAX_ID = 256
"""No id of ours, and none of a client's that is kept, is longer."""

Ask: TypeAlias = Callable[[str | None, bytes], Awaitable[bytes | None]]
"""Puts a question to the ingress of that id (None: to whoever knows), returns its answer; None when nobody answered.

Raises StoreError when it cannot be put.
"""


class _Question(msgspec.Struct, array_like=True):
    asked: str
    tenant: str


class _Answer(msgspec.Struct, array_like=True):
    """`explanation` is None when the ingress that should know does not."""

    explanation: Explanation | None


_question = msgspec.msgpack.Decoder(_Question)
_answer = msgspec.msgpack.Decoder(_Answer)


class Explainer:
    """Finds the decisions about a tenant's request, here or at another ingress."""

    def __init__(self, log: DecisionLog, ask: Ask) -> None:
        self.log = log
        self._ask = ask

    async def explain(self, asked_id: str, tenant: str) -> Explanation:
        """Raises DecisionNotFoundError, saying why; UnavailableError when another ingress should be asked and the
        registry is down."""
        asked = parse(asked_id)
        found = self.log.find(asked, tenant)
        if found is not None:
            return found
        if asked.ingress_id == self.log.ingress_id or len(asked_id) > MAX_ID:
            raise _unknown(asked_id)
        try:
            raw = await self._ask(asked.ingress_id, msgspec.msgpack.encode(_Question(asked_id, tenant)))
        except StoreError as error:
            message = "Another ingress has this decision, and the registry it is asked through does not answer."
            raise UnavailableError(message, code="ingress_unreachable", retry_after_s=RETRY_S) from error
        return _understood(raw, asked_id, asked, tenant)

    def answer(self, raw: bytes) -> bytes | None:
        """What this ingress says to another's question; None: nothing. Raises ValueError for what is no question."""
        question = _question.decode(raw)
        asked = parse(question.asked)
        found = self.log.find(asked, question.tenant)
        if found is None and asked.ingress_id != self.log.ingress_id:
            return None
        return msgspec.msgpack.encode(_Answer(found))


def _understood(raw: bytes | None, asked_id: str, asked: Asked, tenant: str) -> Explanation:
    """The explanation in another ingress's answer."""
    if raw is None:
        if asked.ingress_id is None:
            raise _unknown(asked_id)
        raise DecisionNotFoundError(
            f"Ingress {asked.ingress_id}, which decided about request {asked_id!r}, does not answer: "
            "it is gone, and its decisions with it."
        )
    try:
        found = _answer.decode(raw).explanation
    except ValueError:  # somebody else writes there
        found = None
    if found is None or found.tenant != tenant:
        raise _unknown(asked_id)
    return found


def _unknown(asked_id: str) -> DecisionNotFoundError:
    return DecisionNotFoundError(
        f"No routing decision is known for request {asked_id[:MAX_ID]!r}: none of yours has this id, it was refused "
        "before it was routed, or it is too long ago."
    )
