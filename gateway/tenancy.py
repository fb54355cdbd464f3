"""Who asks, and how much they may: API key → Tenant, deny by default; quotas in memory.

Keys are never compared: the SHA-256 of what the client sent is looked up, so time tells nothing about a key. Which
tenant a request without a key gets is the rule of `configs.schema.TenantConfig`.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from configs.schema import TenantConfig
from gateway.errors import AuthenticationError, RateLimitError
from gateway.types import Tenant


def tenant_salt(secret: bytes, tenant_id: str) -> bytes:
    """The tenant's prefix-cache salt: no other tenant can hit, or time, its blocks."""
    return hmac.digest(secret, b"tenant-salt|" + tenant_id.encode(), "sha256")


def narrowed_salt(salt: bytes, cache_salt: str | None) -> bytes:
    """A tenant's salt narrowed by the client's `cache_salt`; the client can only separate, never join."""
    return salt if cache_salt is None else hmac.digest(salt, cache_salt.encode(), "sha256")


@dataclass(slots=True)
class _Bucket:
    """A token bucket a minute deep. `level` may go below zero (debt for output that came after admission)."""

    per_minute: int
    level: float
    updated: float

    def refill(self, now: float) -> None:
        rate = self.per_minute / 60.0
        self.level = min(float(self.per_minute), self.level + max(0.0, now - self.updated) * rate)
        self.updated = now

    def wait_s(self, needed: float) -> float:
        """Seconds until `needed` is there; 0 when it is. A need beyond the bucket's depth waits for a full one."""
        missing = min(needed, float(self.per_minute)) - self.level
        return max(0.0, missing * 60.0 / self.per_minute)


def _tell_nobody(kind: str, amount: float) -> None:
    """The default of who hears what was taken."""


def _nothing() -> int:
    """The default of what is open elsewhere."""
    return 0


class Quota:
    """What one tenant has left: requests and tokens a minute, requests at once; at all ingresses, as far as the others
    tell (`share`, `taken_elsewhere`)."""

    def __init__(self, tenant: Tenant, clock: Callable[[], float]) -> None:
        self.tenant = tenant
        self.num_open = 0
        self._tell: Callable[[str, float], None] = _tell_nobody
        self._num_elsewhere: Callable[[], int] = _nothing
        self._clock = clock
        now = clock()
        rpm, tpm = tenant.requests_per_minute, tenant.tokens_per_minute
        self._requests = None if rpm is None else _Bucket(rpm, float(rpm), now)
        self._tokens = None if tpm is None else _Bucket(tpm, float(tpm), now)

    def share(self, tell: Callable[[str, float], None], num_elsewhere: Callable[[], int]) -> None:
        """Tells what is taken here ("requests" or "tokens", how many), and asks how many are open elsewhere."""
        self._tell = tell
        self._num_elsewhere = num_elsewhere

    def taken_elsewhere(self, kind: str, amount: float) -> None:
        """Another ingress has taken so much. It can put the tenant into debt for a minute at most."""
        bucket = self._requests if kind == "requests" else self._tokens
        if bucket is not None and amount > 0:
            bucket.refill(self._clock())
            bucket.level = max(bucket.level - amount, min(bucket.level, -float(bucket.per_minute)))

    def enter(self) -> Lease:
        """Counts one request in; raises RateLimitError. The lease must be closed."""
        limit = self.tenant.max_concurrent
        if limit is not None and (num_open := self.num_open + self._num_elsewhere()) >= limit:
            raise RateLimitError(f"You have {num_open} requests in progress; your limit is {limit} at once.",
                                 code="concurrency_limit_exceeded", retry_after_s=1.0)  # fmt: skip
        if self._requests is not None:
            self._take(self._requests, 1.0, "requests")
        self.num_open += 1
        return Lease(self)

    def take_prompt(self, num_tokens: int) -> None:
        """Charges prompt tokens; raises RateLimitError when they are not there."""
        if self._tokens is not None:
            self._take(self._tokens, float(num_tokens), "tokens")

    def take_output(self, num_tokens: int) -> None:
        """Charges tokens that were produced; they may leave a debt that later requests wait for."""
        if self._tokens is not None:
            self._tokens.refill(self._clock())
            self._tokens.level -= num_tokens
            self._tell("tokens", num_tokens)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """OpenAI's `x-ratelimit-*` for the limits this tenant has."""
        found: list[tuple[bytes, bytes]] = []
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                bucket.refill(self._clock())
                found += [
                    (f"x-ratelimit-limit-{name}".encode(), b"%d" % bucket.per_minute),
                    (f"x-ratelimit-remaining-{name}".encode(), b"%d" % max(0, int(bucket.level))),
                    (f"x-ratelimit-reset-{name}".encode(), b"%.3fs" % bucket.wait_s(bucket.per_minute)),
                ]
        return found

    def _take(self, bucket: _Bucket, needed: float, unit: str) -> None:
        bucket.refill(self._clock())
        wait_s = bucket.wait_s(needed)
        if wait_s > 0:
            raise RateLimitError(
                f"Rate limit reached for {self.tenant.tenant_id!r} on {unit} per minute: limit {bucket.per_minute}, "
                f"left {max(0, int(bucket.level))}, requested {int(needed)}. Please try again in {wait_s:.3f}s.",
                retry_after_s=wait_s,
            )
        bucket.level -= needed
        self._tell(unit, needed)


class Lease:
    """One request's place in its tenant's quota. `close` is idempotent."""

    __slots__ = ("_open", "quota")

    def __init__(self, quota: Quota) -> None:
        self.quota = quota
        self._open = True

    def close(self, num_output_tokens: int) -> None:
        if self._open:
            self._open = False
            self.quota.num_open -= 1
            self.quota.take_output(num_output_tokens)


class Tenants:
    """The tenants of a profile, by key. `secret` is the runtime's; `clock` is monotonic seconds."""

    def __init__(self, tenants: Sequence[TenantConfig], secret: bytes, clock: Callable[[], float]) -> None:
        self._quotas: dict[str, Quota] = {}
        self._by_digest: dict[bytes, Tenant] = {}
        self._anonymous: Tenant | None = None
        for config in tenants:
            tenant = _tenant(config, secret)
            self._quotas[tenant.tenant_id] = Quota(tenant, clock)
            for digest in _digests(config):
                self._by_digest[digest] = tenant
            if config.anonymous:
                self._anonymous = tenant

    def authenticate(self, authorization: bytes | None) -> Tenant:
        """The tenant of an `Authorization` header's bearer key; raises AuthenticationError."""
        key = _bearer(authorization)
        if key is not None and (known := self._by_digest.get(hashlib.sha256(key).digest())):
            return known
        if self._anonymous is not None and (key is None or not self._by_digest):
            return self._anonymous
        if key is None:
            raise AuthenticationError(
                "You didn't provide an API key. Send it in an Authorization header: Authorization: Bearer YOUR_KEY."
            )
        hint = " Requests without an Authorization header need none here." if self._anonymous is not None else ""
        raise AuthenticationError(f"Incorrect API key provided.{hint}")

    def quota(self, tenant: Tenant) -> Quota:
        return self._quotas[tenant.tenant_id]

    def quotas(self) -> Iterable[Quota]:
        """Every tenant's."""
        return self._quotas.values()

    def taken_elsewhere(self, tenant_id: str, kind: str, amount: float) -> None:
        """Another ingress has let a tenant have so many "requests" or "tokens". No-op for one not known here."""
        quota = self._quotas.get(tenant_id)
        if quota is not None:
            quota.taken_elsewhere(kind, amount)


def _bearer(authorization: bytes | None) -> bytes | None:
    if authorization is None:
        return None
    scheme, _, key = authorization.strip().partition(b" ")
    if scheme.lower() != b"bearer":
        raise AuthenticationError("The Authorization header must be of the form: Bearer YOUR_KEY.")
    return key.strip() or None


def _digests(config: TenantConfig) -> list[bytes]:
    return [bytes.fromhex(d) for d in config.key_sha256] + [hashlib.sha256(k.encode()).digest() for k in config.keys]


def _tenant(config: TenantConfig, secret: bytes) -> Tenant:
    return Tenant(
        tenant_id=config.id,
        salt=tenant_salt(secret, config.id),
        weight=config.weight,
        max_priority=config.max_priority,
        requests_per_minute=config.requests_per_minute,
        tokens_per_minute=config.tokens_per_minute,
        max_concurrent=config.max_concurrent,
        max_wait_s=config.max_wait_s,
        models=frozenset(config.models),
        admin=config.admin,
    )
