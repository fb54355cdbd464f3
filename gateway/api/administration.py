"""What the routes for administrators share."""

from __future__ import annotations

from gateway.adapter_admin import AdapterAdmin
from gateway.api.exchange import Exchange
from gateway.errors import AdminRequiredError, RegistryUnavailableError
from gateway.types import Gateway, Tenant


def administrator(gateway: Gateway, exchange: Exchange, refusal: str) -> Tenant:
    """Who asks. Raises AdminRequiredError with `refusal` for everybody else."""
    tenant = gateway.tenants.authenticate(exchange.header(b"authorization"))
    if not tenant.admin:
        raise AdminRequiredError(refusal)
    return tenant


def adapter_admin(gateway: Gateway) -> AdapterAdmin:
    """Raises RegistryUnavailableError where there is none."""
    if gateway.adapters is None:
        raise RegistryUnavailableError("This gateway has no registry of adapters.")
    return gateway.adapters
