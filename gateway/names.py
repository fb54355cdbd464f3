"""What a client's `model` means: a model of the profile, or a LoRA adapter of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from configs.schema import Config, ModelConfig
from gateway.errors import ModelNotFoundError
from gateway.types import Tenant
from routing.adapters import Adapter, Catalogue
from routing.placement import REFERENCE_RANK


@dataclass(frozen=True, slots=True)
class Named:
    """`name` as it was asked for, the base model, and the adapter on it when the name is one's."""

    name: str
    model: ModelConfig
    adapter: Adapter | None = None

    @property
    def shown(self) -> str:
        """What an answer calls its model: an alias's model, an adapter as it was asked for."""
        return self.model.id if self.adapter is None else self.name

    @property
    def adapter_id(self) -> str | None:
        return None if self.adapter is None else self.adapter.adapter_id

    @property
    def adapter_rank(self) -> int:
        """What a load of the adapter grows with; means nothing without one."""
        return REFERENCE_RANK if self.adapter is None else self.adapter.rank


class ModelNames:
    """Resolves names for tenants. A model's own name wins over an adapter's of the same name."""

    def __init__(self, config: Config, catalogue: Callable[[], Catalogue]) -> None:
        self._by_name = {name: model for model in config.models for name in (model.id, *model.aliases)}
        self._models = {model.id: model for model in config.models}
        self._catalogue = catalogue

    def resolve(self, tenant: Tenant, name: str) -> Named:
        """What `name` is to this tenant. Raises ModelNotFoundError, also for what it may not use: to it the one is as
        unknown as the other."""
        model = self._by_name.get(name)
        named = self._adapter(name) if model is None else Named(name, model)
        if named is None or not _may_use(tenant, named):
            raise ModelNotFoundError(
                f"The model {name!r} does not exist or you do not have access to it.", param="model"
            )
        return named

    def listed(self, tenant: Tenant) -> Iterator[Named]:
        """Every name this tenant may ask for: models and their aliases, then adapters."""
        for name, model in self._by_name.items():
            if tenant.allows(model.id):
                yield Named(name, model)
        for adapter in self._catalogue().current():
            base = self._models.get(adapter.base_model)
            if base is not None and adapter.name not in self._by_name:
                named = Named(adapter.name, base, adapter)
                if _may_use(tenant, named):
                    yield named

    def _adapter(self, name: str) -> Named | None:
        adapter = self._catalogue().named(name)
        base = None if adapter is None else self._models.get(adapter.base_model)
        return None if base is None else Named(name, base, adapter)


def _may_use(tenant: Tenant, named: Named) -> bool:
    owner = None if named.adapter is None else named.adapter.owner
    return tenant.allows(named.model.id) and owner in (None, tenant.tenant_id)
