"""Every error a client can see: one tree, one table, OpenAI's body.

    {"error": {"message": str, "type": str, "param": str | null, "code": str | null}}

Before the first byte it travels as a status; after it as an SSE `error` event (`gateway.sse`), never as silence.
"""

from __future__ import annotations

from math import ceil
from typing import Any

from replicas.contract import Fault


class ApiError(Exception):
    """Root. Subclasses fix `status` and `type`; `code` and `param` may be given per raise.

    `retry_after_s` becomes `Retry-After` (whole seconds, rounded up, at least 1) and `retry-after-ms`.
    """

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        if self.retry_after_s is None:
            return {}
        return {
            "retry-after": str(max(1, ceil(self.retry_after_s))),
            "retry-after-ms": str(max(1, ceil(self.retry_after_s * 1000))),
        }


class BadRequestError(ApiError):
    status, type = 400, "invalid_request_error"


class ContextLengthError(BadRequestError):
    code = "context_length_exceeded"


class AdapterNotLoadableError(BadRequestError):
    code = "adapter_not_loadable"


class UnsupportedError(BadRequestError):
    code = "unsupported_parameter"


class InvalidGrammarError(BadRequestError):
    code = "invalid_grammar"


class GrammarTooComplexError(BadRequestError):
    code = "grammar_too_complex"


class AuthenticationError(ApiError):
    status, type, code = 401, "authentication_error", "invalid_api_key"


class AdminRequiredError(ApiError):
    status, type, code = 403, "permission_error", "admin_required"


class NotFoundError(ApiError):
    status, type, code = 404, "not_found_error", "unknown_url"


class ModelNotFoundError(NotFoundError):
    code = "model_not_found"


class DecisionNotFoundError(NotFoundError):
    code = "decision_not_found"


class MethodNotAllowedError(ApiError):
    status, type, code = 405, "invalid_request_error", "method_not_allowed"


class PayloadTooLargeError(ApiError):
    status, type, code = 413, "invalid_request_error", "payload_too_large"


class UnsupportedMediaTypeError(ApiError):
    status, type, code = 415, "invalid_request_error", "unsupported_media_type"


class RateLimitError(ApiError):
    """The tenant's own quota."""

    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"


class QueueFullError(ApiError):
    """The gateway's bounds."""

    status, type, code = 429, "overloaded_error", "queue_full"


class AdapterSlotsBusyError(ApiError):
    """An adapter would have to wait beyond the request's deadline for others to leave their slots."""

    status, type, code = 429, "overloaded_error", "adapter_slots_busy"


class UnavailableError(ApiError):
    """Nobody can serve this now: no replica, draining, all breakers open."""

    status, type, code = 503, "service_unavailable_error", "no_replica_available"


class RegistryUnavailableError(UnavailableError):
    """Redis, which the ingresses share what they know through, does not answer."""

    code = "registry_unavailable"


class AdapterLoadingError(UnavailableError):
    """An adapter is being loaded, and will be there after the request's deadline. `waited_s`: how long the request
    waited for it."""

    code = "adapter_loading"
    waited_s = 0.0


class AdapterUnreachableError(UnavailableError):
    """Where an adapter's files should be cannot be read now."""

    code = "adapter_unreachable"


class ReplicaLostError(ApiError):
    """A replica died after it had begun to answer."""

    status, type, code = 502, "server_error", "replica_lost"


class DeadlineError(ApiError):
    status, type, code = 504, "timeout_error", "deadline_exceeded"


class InternalError(ApiError):
    code = "internal_error"


_BY_FAULT: dict[str, type[ApiError]] = {
    "context_length_exceeded": ContextLengthError,
    "unsupported_parameter": UnsupportedError,
    "adapter_not_found": ModelNotFoundError,
    "adapter_loading": AdapterLoadingError,
    "adapter_slots_busy": AdapterSlotsBusyError,
    "adapter_unreachable": AdapterUnreachableError,
    "invalid_grammar": InvalidGrammarError,
    "grammar_too_complex": GrammarTooComplexError,
    "overloaded": QueueFullError,
    "draining": UnavailableError,
    "deadline_exceeded": DeadlineError,
    "engine_dead": ReplicaLostError,
    "upstream_lost": ReplicaLostError,
    "internal": InternalError,
}


def from_fault(fault: Fault) -> ApiError:
    """The client's view of an engine's fault."""
    cls = _BY_FAULT.get(fault.code, InternalError)
    retry_after_s = fault.retry_after_s
    if retry_after_s is None and cls.status in (429, 503):
        retry_after_s = 1.0
    return cls(fault.message, param=fault.param, retry_after_s=retry_after_s)
