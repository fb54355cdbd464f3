"""`warmgate adapters`: the shared catalogue of LoRA adapters, where gateway and replicas read it."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import click
import msgspec

from configs.adapters.cache import AdapterCache
from configs.adapters.files import MIB
from configs.adapters.place import Remote, Roots, is_url, place_of
from configs.adapters.remote import FetchBounds
from configs.adapters.sections import AdapterFilesConfig
from configs.lora import LoraError, lora_folder, read_lora
from configs.runtime import home_dir
from ops.errors import OperationError
from ops.instance import Instance, find_instances
from routing.adapter_sources import SourceBoard
from routing.adapters import Adapter, AdapterConflictError, AdapterRegistry, Catalogue
from routing.store import Store, StoreError, StoreOptions

T = TypeVar("T")
R = TypeVar("R")
TIMEOUT_S = 2.0


class AdapterError(OperationError):
    """The catalogue cannot be reached, or refuses what was asked."""


@click.group(short_help="List, add and remove LoRA adapters.")
@click.option("--redis", envvar="WARMGATE_REDIS__URL", help="Its address [default: that of the instance running here].")
@click.option("--cluster", envvar="WARMGATE_CLUSTER", help="Its cluster [default: that of the instance running here].")
@click.pass_context
def adapters(context: click.Context, redis: str | None, cluster: str | None) -> None:
    """List, add and remove the LoRA adapters that clients can name as models.

    Their model's group needs `engine.max_adapters`, as the profile multi-lora has it. `warmgate train-lora` makes a few
    to try.

    \b
    warmgate adapters add summariser --base-model sim --version 2 --path /adapters/summariser --rank 16
    warmgate adapters list
    warmgate adapters sources
    warmgate adapters remove summariser@1
    """
    context.obj = (redis, cluster)


@adapters.command("list", short_help="List every version of every adapter.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
@click.pass_obj
def adapters_list(place: tuple[str | None, str | None], as_json: bool) -> None:
    """List every version of every adapter that was added; `*` marks the one that its name means."""
    entries = _with(place, AdapterRegistry.read, AdapterRegistry)
    catalogue = Catalogue(entries.values())
    if as_json:
        rows = [_row(adapter, catalogue) for adapter in catalogue]
        click.echo(json.dumps(rows, indent=2))
        return
    if not len(catalogue):
        click.echo("no adapters were added: see warmgate adapters add --help")
        return
    width = max(len(adapter.adapter_id) for adapter in catalogue)
    for adapter in catalogue:
        mark = "*" if catalogue.named(adapter.name) == adapter else " "
        about = f"rank {adapter.rank:<4} owner {adapter.owner or 'all'}  {adapter.path}"
        about += "  (of a source)" if adapter.source else ""
        click.echo(f"{mark} {adapter.adapter_id:<{width}}  {adapter.base_model}  {about}".rstrip())


@adapters.command("sources", short_help="Show the places that are watched for adapters.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
@click.pass_obj
def adapters_sources(place: tuple[str | None, str | None], as_json: bool) -> None:
    """Show each of the profile's adapter_sources as it was last seen: its adapters, and folders that are none."""
    found = _with(place, SourceBoard.statuses, SourceBoard)
    if as_json:
        click.echo(json.dumps([msgspec.structs.asdict(status) for status in found.values()], indent=2))
        return
    if not found:
        click.echo("no source was looked at: a profile names them under adapter_sources")
    for status in found.values():
        when = datetime.fromtimestamp(status.looked_at).isoformat(" ", "seconds") if status.looked_at else "never"
        adapters = "1 adapter" if status.num_adapters == 1 else f"{status.num_adapters} adapters"
        click.echo(f"{status.url}  {status.base_model}  {adapters}, seen {when}")
        if status.num_waiting:
            folders = "1 folder is" if status.num_waiting == 1 else f"{status.num_waiting} folders are"
            click.echo(f"  {folders} still changing, or looked at again")
        if status.error:
            click.echo(f"  cannot be read: {status.error}")
        for name, why in sorted(status.failed.items()):
            click.echo(f"  {name}: {why}")


@adapters.command("add", short_help="Add a version of NAME and make it the current one.")
@click.argument("name")
@click.option("--base-model", required=True, help="The id of the model it was trained on.")
@click.option("--version", default="1", show_default=True, help="Names these weights for ever.")
@click.option("--path", default="", help="The checkpoint's folder on the replicas' machines, or its URL.")
@click.option("--rank", type=click.IntRange(1, 512), help="[default: the checkpoint's where it is here too, else 8]")
@click.option("--owner", help="The one tenant that may use it [default: all].")
@click.option("--pinned", is_flag=True, help="Replicas keep it once they have it; they load it when they start.")
@click.option("--num-bytes", type=click.IntRange(min=0), help="Size on disk, for information [default: likewise].")
@click.pass_obj
def adapters_add(place: tuple[str | None, str | None], /, path: str, **fields: object) -> None:
    """Add a version of NAME and make it the current one; requests find it within a second.

    A version that was added before becomes current again: that is how to roll back. A checkpoint that is on this
    machine, or at a URL (s3://…), is looked at first; its weights are checked by the replica that loads them. For an
    instance on this machine it must be here.
    """
    found, path = _looked_at(path)
    if not _is_given(place):
        _check_here(_running(place), str(fields["base_model"]), path)
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        adapter = msgspec.convert({**found, **given, "path": path}, Adapter)
    except msgspec.ValidationError as error:
        raise click.UsageError(str(error)) from error
    _with(place, lambda registry: registry.add(adapter), AdapterRegistry)
    click.echo(f"{adapter.name} is {adapter.adapter_id} now")


@adapters.command("remove")
@click.argument("name")
@click.pass_obj
def adapters_remove(place: tuple[str | None, str | None], name: str) -> None:
    """Remove NAME with all its versions, or one NAME@VERSION. Requests under way end as they would have."""
    gone = _with(place, lambda registry: registry.remove(name), AdapterRegistry)
    for adapter in gone:
        click.echo(f"{adapter.adapter_id} is removed")


def _looked_at(path: str) -> tuple[dict[str, object], str]:
    """What a checkpoint says of itself, and its absolute path; nothing, and the path as it is, where it is not here.

    Raises AdapterError for one that cannot be served.
    """
    try:
        if is_url(path):
            return _fetched(path)
        folder = lora_folder(path)
        if not path or not folder.is_dir():
            return {}, path
        files = read_lora(folder)
        found = {"rank": files.config.max_rank, "num_bytes": files.num_bytes, "digest": files.digest()}
        return found, str(folder.absolute())
    except (LoraError, OSError) as error:
        raise AdapterError(str(error)) from error


def _fetched(path: str) -> tuple[dict[str, object], str]:
    """What a checkpoint at a URL says of itself, and the URL. Raises LoraError, OSError."""
    place = place_of(path)
    assert isinstance(place, Remote), "it is a URL"
    limits = AdapterFilesConfig()
    cache = AdapterCache(home_dir(os.environ) / "adapters", int(limits.cache_gib * 1024 * MIB))
    found = cache.fetch(place, FetchBounds(limits.max_mib * MIB, limits.fetch_timeout_s, Roots()))
    files = found.files
    return {"rank": files.config.max_rank, "num_bytes": files.num_bytes, "digest": found.digest}, place.url


def _row(adapter: Adapter, catalogue: Catalogue) -> dict[str, object]:
    return {**msgspec.structs.asdict(adapter), "current": catalogue.named(adapter.name) == adapter}


def _with(place: tuple[str | None, str | None], work: Callable[[R], Awaitable[T]], kind: Callable[[Store], R]) -> T:
    """Runs `work` on the registry meant, of a `kind`. Raises AdapterError."""

    async def run() -> T:
        store = Store(*_found(place), StoreOptions(timeout_s=TIMEOUT_S))
        try:
            return await work(kind(store))
        finally:
            await store.close()

    try:
        return asyncio.run(run())
    except (StoreError, AdapterConflictError, ValueError) as error:
        raise AdapterError(str(error)) from error


def _is_given(place: tuple[str | None, str | None]) -> bool:
    """Whether the registry's address was given; else it is that of an instance on this machine."""
    return place[0] is not None and place[0] != "embedded"


def _found(place: tuple[str | None, str | None]) -> tuple[str, str]:
    """The URL and cluster meant: those given, else those of the one instance that runs here."""
    redis, cluster = place
    if redis is not None and _is_given(place):
        return redis, cluster or "warmgate"
    running = _running(place)
    return running.redis_url, running.cluster


def _running(place: tuple[str | None, str | None]) -> Instance:
    """The one instance that is meant. Raises AdapterError."""
    cluster = place[1]
    running = [i for i in find_instances(Path(tempfile.gettempdir())) if i.redis_url and cluster in (None, i.cluster)]
    if not running:
        raise AdapterError("no instance is running on this machine: start one, or give --redis and --cluster")
    if len(running) > 1:
        clusters = ", ".join(instance.cluster for instance in running)
        raise AdapterError(f"several run here: choose one, as in warmgate adapters --cluster NAME list: {clusters}")
    return running[0]


def _check_here(instance: Instance, base_model: str, path: str) -> None:
    """Raises AdapterError where replicas on this machine could never load it."""
    name = instance.instance
    if base_model not in instance.models:
        raise AdapterError(f"{name} serves no model {base_model!r}; it serves {', '.join(instance.models)}")
    if path and not is_url(path) and base_model in instance.local_models and not Path(path).is_dir():
        raise AdapterError(f"there is no folder {Path(path).absolute()}, and the replicas of {name} run here")
