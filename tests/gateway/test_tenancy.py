from __future__ import annotations

import hashlib

import pytest

from configs.schema import TenantConfig
from gateway.errors import AuthenticationError, RateLimitError
from gateway.tenancy import Tenants, narrowed_salt
from tests.gateway.scripted import Clock

DIGEST = hashlib.sha256(b"sk-hashed").hexdigest()
KEYED = (TenantConfig(id="a", keys=("sk-a",)), TenantConfig(id="b", key_sha256=(DIGEST,)))


def tenants(*configs: TenantConfig, clock: Clock | None = None) -> Tenants:
    return Tenants(configs, b"secret", clock or Clock())


@pytest.mark.parametrize(("key", "tenant_id"), [(b"Bearer sk-a", "a"), (b"bearer  sk-hashed ", "b")])
def test_key_leads_to_its_tenant(key: bytes, tenant_id: str) -> None:
    assert tenants(*KEYED).authenticate(key).tenant_id == tenant_id


@pytest.mark.parametrize(
    "sent", [None, b"Bearer ", b"Bearer sk-b", b"Bearer " + DIGEST.encode(), b"Basic c2stYQ==", b""]
)
def test_whoever_has_no_known_key_is_refused(sent: bytes | None) -> None:
    with pytest.raises(AuthenticationError) as caught:
        tenants(*KEYED).authenticate(sent)
    assert caught.value.status == 401


def test_anonymous_takes_any_key_only_while_no_tenant_has_one() -> None:
    guest = TenantConfig(id="guest", anonymous=True)
    assert tenants(guest).authenticate(b"Bearer anything").tenant_id == "guest"
    assert tenants(guest).authenticate(None).tenant_id == "guest"
    assert tenants(guest, *KEYED).authenticate(None).tenant_id == "guest"
    with pytest.raises(AuthenticationError):
        tenants(guest, *KEYED).authenticate(b"Bearer anything")


def test_salts_separate_tenants_and_secrets_and_cache_salts() -> None:
    a, b = (tenants(*KEYED).authenticate(key) for key in (b"Bearer sk-a", b"Bearer sk-hashed"))
    other = Tenants(KEYED, b"another secret", Clock()).authenticate(b"Bearer sk-a")
    salts = {
        a.salt,
        b.salt,
        other.salt,
        narrowed_salt(a.salt, "x"),
        narrowed_salt(b.salt, "x"),
        narrowed_salt(a.salt, "y"),
    }
    assert len(salts) == 6
    assert narrowed_salt(a.salt, None) == a.salt


def test_requests_a_minute_refill_with_time() -> None:
    clock = Clock()
    known = tenants(TenantConfig(id="a", anonymous=True, requests_per_minute=2), clock=clock)
    quota = known.quota(known.authenticate(None))
    quota.enter(), quota.enter()
    with pytest.raises(RateLimitError) as caught:
        quota.enter()
    assert caught.value.headers() == {"retry-after": "30", "retry-after-ms": "30000"}
    headers = dict(quota.headers())
    assert headers[b"x-ratelimit-limit-requests"] == b"2"
    assert headers[b"x-ratelimit-remaining-requests"] == b"0"
    assert headers[b"x-ratelimit-reset-requests"] == b"60.000s"
    clock.now += 30
    quota.enter()


def test_output_tokens_leave_a_debt_that_later_prompts_wait_for() -> None:
    clock = Clock()
    known = tenants(TenantConfig(id="a", anonymous=True, tokens_per_minute=600), clock=clock)
    quota = known.quota(known.authenticate(None))
    lease = quota.enter()
    quota.take_prompt(100)
    lease.close(700)
    lease.close(700)
    assert dict(quota.headers())[b"x-ratelimit-remaining-tokens"] == b"0"
    with pytest.raises(RateLimitError) as caught:
        quota.take_prompt(10)
    assert caught.value.retry_after_s == pytest.approx(21.0)
    clock.now += 21.01
    quota.take_prompt(10)


def test_prompt_larger_than_the_bucket_runs_when_the_bucket_is_full() -> None:
    clock = Clock()
    known = tenants(TenantConfig(id="a", anonymous=True, tokens_per_minute=60), clock=clock)
    quota = known.quota(known.authenticate(None))
    quota.take_prompt(500)
    with pytest.raises(RateLimitError):
        quota.take_prompt(1)


def test_requests_at_once_are_bounded_until_their_leases_close() -> None:
    known = tenants(TenantConfig(id="a", anonymous=True, max_concurrent=1))
    quota = known.quota(known.authenticate(None))
    lease = quota.enter()
    with pytest.raises(RateLimitError) as caught:
        quota.enter()
    assert caught.value.code == "concurrency_limit_exceeded"
    lease.close(0)
    lease.close(0)
    quota.enter()
    assert quota.num_open == 1
