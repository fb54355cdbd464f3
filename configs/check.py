"""What the schema cannot say about one value alone: checks across sections."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from configs.adapters.place import Remote, Roots, place_of, without_secrets
from configs.catalogue import SIM_BYTES
from configs.errors import ConfigError, KeyPath, show_key
from configs.lora import LoraError, read_lora
from configs.schema import AdapterConfig, AdapterSourceConfig, Config, EngineConfig, GroupConfig, VllmConfig
from configs.tokenizer import find_model
from configs.vllm_check import unfit_for_vllm

LOOPBACK = ("127.0.0.1", "localhost", "::1", "0.0.0.0", "::")


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that must be changed in the profile, and the key to change."""

    key: KeyPath
    reason: str


def problems(config: Config) -> list[Problem]:
    """Everything wrong in a configuration whose single values are all valid. Pure: no file, no network."""
    return [
        *_models(config),
        *_groups(config),
        *_unserved(config),
        *_tenants(config),
        *_adapters(config),
        *_adapter_places(config),
        *_ports(config),
        *_addresses(config),
        *_times(config),
    ]


def missing_models(config: Config, home: Path) -> list[Problem]:
    """Models whose files are not on this machine; each reason names the command that gets them."""
    found = []
    for i, model in enumerate(config.models):
        if model.source == SIM_BYTES:
            continue
        try:
            find_model(model.source, home)
        except ConfigError as error:
            found.append(Problem(("models", i, "source"), error.reason))
    return found


def broken_adapters(config: Config) -> list[Problem]:
    """Adapters whose checkpoints are not on this machine, or cannot be served by any group of their model; those at
    URLs are looked at when they are loaded."""
    found = []
    roots = Roots(tuple(place_of(root) for root in config.adapter_files.roots))
    for i, adapter in enumerate(config.adapters):
        engines = [g.engine for g in config.groups if g.model == adapter.base_model and g.engine.kind != "sim"]
        ranks = [engine.max_lora_rank for engine in engines if engine.max_adapters]
        if not ranks:
            continue
        try:
            place = place_of(adapter.path)
            if isinstance(place, Remote):
                continue
            roots.check(place)
            rank = read_lora(place.path).config.max_rank
        except LoraError as error:
            found.append(Problem(("adapters", i, "path"), str(error)))
            continue
        if rank > adapter.rank:
            found.append(Problem(("adapters", i, "rank"), f"its checkpoint has rank {rank}, got {adapter.rank}"))
        elif rank > max(ranks):
            reason = f"its checkpoint has rank {rank}, beyond engine.max_lora_rank ({max(ranks)})"
            found.append(Problem(("adapters", i, "path"), reason))
    return found


def num_slots(engine: EngineConfig) -> int:
    """LoRA adapters that a replica can have resident."""
    return engine.sim.max_adapters if engine.kind == "sim" else engine.max_adapters


def _repeated(named: Iterable[tuple[KeyPath, str]], what: str) -> Iterator[Problem]:
    first: dict[str, KeyPath] = {}
    for key, name in named:
        if name in first:
            yield Problem(key, f"duplicate {what} {name!r}, first given at {show_key(first[name])}")
        else:
            first[name] = key


def _models(config: Config) -> Iterator[Problem]:
    names: list[tuple[KeyPath, str]] = []
    for i, model in enumerate(config.models):
        names.append((("models", i, "id"), model.id))
        names += [(("models", i, "aliases", j), alias) for j, alias in enumerate(model.aliases)]
    yield from _repeated(names, "model name")


def _unserved(config: Config) -> Iterator[Problem]:
    served = {group.model for group in config.groups}
    for i, model in enumerate(config.models):
        if model.id not in served:
            yield Problem(("models", i, "id"), f"no group serves model {model.id!r}")


def _groups(config: Config) -> Iterator[Problem]:
    yield from _repeated(((("groups", i, "name"), g.name) for i, g in enumerate(config.groups)), "group name")
    models = {model.id: model for model in config.models}
    for i, group in enumerate(config.groups):
        model, engine = models.get(group.model), group.engine
        if model is None:
            known = ", ".join(models)
            yield Problem(("groups", i, "model"), f"no model {group.model!r} in this profile; there is: {known}")
            continue
        if engine.kind in ("native", "vllm") and model.source == SIM_BYTES:
            reason = f"{SIM_BYTES} has no weights: needs engine.kind sim, not {engine.kind}"
            yield Problem(("groups", i, "engine"), reason)
        if engine.kind == "vllm":
            yield from (Problem(("groups", i, "engine", *key), reason) for key, reason in unfit_for_vllm(engine))
        yield from (Problem(("groups", i, "engine", *key), reason) for key, reason in _upstream(group))
        if engine.kind != "vllm" and engine.vllm != VllmConfig():
            yield Problem(("groups", i, "engine", "vllm"), f"only engine.kind vllm looks at it, not {engine.kind}")
        if engine.max_num_batched_tokens < engine.max_num_seqs:
            reason = f"must be at least max_num_seqs ({engine.max_num_seqs}), got {engine.max_num_batched_tokens}"
            yield Problem(("groups", i, "engine", "max_num_batched_tokens"), reason)
        if engine.speculative is not None:
            yield from _speculative(("groups", i, "engine", "speculative"), engine)
        if model.route_block_tokens % engine.block_size:
            reason = f"must divide the model's route_block_tokens ({model.route_block_tokens}), got {engine.block_size}"
            yield Problem(("groups", i, "engine", "block_size"), reason)


def _upstream(group: GroupConfig) -> Iterator[tuple[KeyPath, str]]:
    """(key within the engine, reason)."""
    engine, upstream = group.engine, group.engine.upstream
    if engine.kind != "openai":
        if upstream is not None:
            yield ("upstream",), f"only engine.kind openai looks at it, not {engine.kind}"
        return
    if upstream is None:
        yield ("kind",), "openai needs engine.upstream.url, the server's address"
        return
    url = urlsplit(upstream.url)
    if url.scheme not in ("http", "https") or not url.hostname or _port_of(upstream.url) == 0:
        yield ("upstream", "url"), f"expected http://host:port or https://…, got {without_password(upstream.url)!r}"
    if group.replicas != 1:
        yield ("upstream", "url"), f"a server is one replica: a group for each, instead of replicas: {group.replicas}"
    if engine.max_adapters:
        yield ("max_adapters",), "adapters of a foreign server are its own"


def _speculative(key: KeyPath, engine: EngineConfig) -> Iterator[Problem]:
    config = engine.speculative
    assert config is not None
    takes_model = config.method in ("draft_model", "mlp_speculator")
    if takes_model and config.model is None and engine.kind in ("native", "vllm"):
        yield Problem(key, f"method {config.method} needs a model")
    if not takes_model and config.model is not None:
        yield Problem((*key, "model"), f"method {config.method} takes no model")
    if config.prompt_lookup_min > config.prompt_lookup_max:
        reason = f"must be at most prompt_lookup_max ({config.prompt_lookup_max}), got {config.prompt_lookup_min}"
        yield Problem((*key, "prompt_lookup_min"), reason)


def _tenants(config: Config) -> Iterator[Problem]:
    yield from _repeated(((("tenants", i, "id"), t.id) for i, t in enumerate(config.tenants)), "tenant id")
    digests: list[tuple[KeyPath, str]] = []
    anonymous: list[tuple[KeyPath, str]] = []
    ids = {model.id for model in config.models}
    for i, tenant in enumerate(config.tenants):
        for j, key in enumerate(tenant.keys):
            digests.append((("tenants", i, "keys", j), hashlib.sha256(key.encode()).hexdigest()))
        digests += [(("tenants", i, "key_sha256", j), digest) for j, digest in enumerate(tenant.key_sha256)]
        if tenant.anonymous:
            anonymous.append((("tenants", i, "anonymous"), "anonymous"))
            if tenant.admin:
                reason = f"tenant {tenant.id!r} is anonymous: everybody would be an administrator"
                yield Problem(("tenants", i, "admin"), reason)
        elif not tenant.keys and not tenant.key_sha256:
            yield Problem(("tenants", i), f"tenant {tenant.id!r} has no key and is not anonymous: nobody could use it")
        for j, name in enumerate(tenant.models):
            if name not in ids:
                named = config.model_named(name)
                reason = (
                    f"no model {name!r} in this profile" if named is None else f"an alias; write its id {named.id!r}"
                )
                yield Problem(("tenants", i, "models", j), reason)
    seen: dict[str, KeyPath] = {}
    for where, digest in digests:  # not through _repeated: a key must not be printed
        if digest in seen:
            yield Problem(where, f"the same key as {show_key(seen[digest])}")
        seen.setdefault(digest, where)
    for where, _ in anonymous[1:]:
        yield Problem(where, f"only one tenant can be anonymous, and {show_key(anonymous[0][0])} is")


def _adapters(config: Config) -> Iterator[Problem]:
    versions = [((("adapters", i)), f"{a.name}@{a.version}") for i, a in enumerate(config.adapters)]
    yield from _repeated(versions, "adapter version")
    for i, adapter in enumerate(config.adapters):
        named = config.model_named(adapter.name)
        if named is not None:
            yield Problem(("adapters", i, "name"), f"{adapter.name!r} is a name of model {named.id!r}")
        yield from _belongs(config, ("adapters", i), adapter)


def _belongs(config: Config, key: KeyPath, adapters: AdapterConfig | AdapterSourceConfig) -> Iterator[Problem]:
    """Whose adapters they are, and of which model."""
    ids = {model.id for model in config.models}
    if adapters.base_model not in ids:
        known = ", ".join(sorted(ids))
        yield Problem((*key, "base_model"), f"no model {adapters.base_model!r} in this profile; there is: {known}")
    elif not any(group.model == adapters.base_model and num_slots(group.engine) for group in config.groups):
        yield Problem((*key, "base_model"), f"no group of model {adapters.base_model!r} has adapter slots")
    if adapters.owner is not None and all(tenant.id != adapters.owner for tenant in config.tenants):
        yield Problem((*key, "owner"), f"no tenant {adapters.owner!r} in this profile")


def _adapter_places(config: Config) -> Iterator[Problem]:
    """Sources and roots: what their URLs mean, not what is there."""
    sources = config.adapter_sources
    urls = ((("adapter_sources", i, "url"), without_secrets(s.url.rstrip("/"))) for i, s in enumerate(sources))
    yield from _repeated(urls, "source")
    for i, source in enumerate(sources):
        yield from _belongs(config, ("adapter_sources", i), source)
        try:
            place = place_of(source.url)
        except LoraError as error:
            yield Problem(("adapter_sources", i, "url"), str(error))
            continue
        if not isinstance(place, Remote):
            yield Problem(("adapter_sources", i, "url"), f"expected a URL, of this folder file://{place}")
        elif place.url != source.url:
            yield Problem(("adapter_sources", i, "url"), f"write it as {place.url}")
    for i, root in enumerate(config.adapter_files.roots):
        try:
            place_of(root)
        except LoraError as error:
            yield Problem(("adapter_files", "roots", i), str(error))


def _ports(config: Config) -> Iterator[Problem]:
    ports: list[tuple[KeyPath, str]] = [(("http", "port"), str(config.http.port))]
    url = urlsplit(config.redis.url)
    if url.hostname in LOOPBACK and url.scheme in ("redis", "rediss"):
        ports.append((("redis", "url"), str(_port_of(config.redis.url) or 6379)))
    yield from _repeated(ports, "port")


def _addresses(config: Config) -> Iterator[Problem]:
    url = config.redis.url
    if url != "embedded" and urlsplit(url).scheme not in ("redis", "rediss", "unix"):
        yield Problem(
            ("redis", "url"), f"expected embedded, redis://…, rediss://… or unix://…, got {without_password(url)!r}"
        )
    elif _port_of(url) == 0:
        yield Problem(("redis", "url"), f"the port must be 1 to 65535, got {without_password(url)!r}")


def without_password(url: str) -> str:
    """A URL fit to be shown."""
    if "@" not in url:
        return url
    scheme, _, rest = url.partition("://")
    return f"{scheme}://***@{rest.rpartition('@')[2]}"


def _port_of(url: str) -> int | None:
    """The port in a URL; 0 when it is not a port."""
    try:
        return urlsplit(url).port
    except ValueError:
        return 0


def _times(config: Config) -> Iterator[Problem]:
    channel = config.channel
    if channel.dead_after_s < 2 * channel.heartbeat_s:
        reason = f"must be at least twice heartbeat_s ({channel.heartbeat_s}), got {channel.dead_after_s}"
        yield Problem(("channel", "dead_after_s"), reason)
