"""An adapter's files, on this machine and sound: what gateway and replicas do alike before any engine opens them.

path or URL ─► allowed? ─► fetched, where it is a URL ─► config and header read ─► size, rank, base model ─► digest
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from configs.adapters.cache import AdapterCache, Fetched
from configs.adapters.place import Folder, Place, Remote, Roots, place_of
from configs.adapters.remote import FetchBounds
from configs.catalogue import entry_for, model_dir
from configs.lora import LoraError, LoraFiles, read_lora, same_model
from configs.schema import Config, EngineConfig, ModelConfig

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Fit:
    """What an adapter must be like for a model: trained on one of these `names` (any, where there are none), of at
    most this rank."""

    names: tuple[str, ...]
    max_rank: int

    def check(self, files: LoraFiles) -> None:
        """Raises LoraError."""
        trained_on, rank = files.config.base_model, files.config.max_rank
        if rank > self.max_rank:
            raise LoraError(f"it has rank {rank}, the most is {self.max_rank} (engine.max_lora_rank)")
        if trained_on and self.names and not any(same_model(trained_on, name) for name in self.names):
            known = ", ".join(self.names)
            raise LoraError(
                f"it was trained on {trained_on!r}, which is none of the names of this model "
                f"(engine.lora_base_models): {known}"
            )


def fit_for(model: ModelConfig, engines: Iterable[EngineConfig], home: Path) -> Fit:
    """What any of the engines of a model takes. The sim engine only pretends: it takes adapters of any model."""
    engines = list(engines)
    ranks = [e.sim.max_adapter_rank if e.kind == "sim" else e.max_lora_rank for e in engines]
    if any(engine.kind == "sim" for engine in engines):
        return Fit((), max(ranks))
    folder = model_dir(model.source, home)
    entry = entry_for(folder.name)
    known = () if entry is None else (entry.name, entry.hub_id)
    others = [name for engine in engines for name in engine.lora_base_models]
    return Fit(tuple(dict.fromkeys((model.id, model.source, str(folder), *known, *others))), max(ranks, default=0))


class AdapterFiles:
    """Blocks; every method may take as long as `adapter_files.fetch_timeout_s`. `home`: models and caches."""

    def __init__(self, config: Config, home: Path) -> None:
        limits = config.adapter_files
        self._max_bytes = limits.max_mib * MIB
        self._timeout_s = limits.fetch_timeout_s
        self._roots = Roots(tuple(place_of(root) for root in limits.roots))
        self._sources = tuple(place_of(source.url) for source in config.adapter_sources)
        self._cache = AdapterCache(home / "adapters", int(limits.cache_gib * 1024 * MIB))

    def read(self, path: str, fit: Fit, source: str = "") -> Fetched | None:
        """The checkpoint at a path as it is now; None for a folder that is not this machine's. `source`: the URL of
        the source it is from, which it must lie within.

        Raises LoraError for what cannot be served, UnreachableError.
        """
        place = place_of(path)
        roots = Roots((place_of(source),), "its source") if source else self._roots
        roots.check(place)
        if isinstance(place, Remote):
            fetched = self._cache.fetch(place, self._bounds(roots))
            fit.check(fetched.files)
            return fetched
        if not _is_folder(place):
            return None
        files = self._sound(place, fit)
        return Fetched(files, files.digest())

    def local(self, path: str, digest: str, fit: Fit) -> Path:
        """The folder that an engine may load from: that of the path, or a copy of what is at the URL.

        Raises LoraError, UnreachableError.
        """
        place = place_of(path)
        roots = self._roots_of(place)
        roots.check(place)
        if isinstance(place, Folder):
            return self._sound(place, fit).folder
        files = self._cache.find(digest) or self._cache.fetch(place, self._bounds(roots), digest).files
        fit.check(files)
        return files.folder

    def _sound(self, place: Folder, fit: Fit) -> LoraFiles:
        files = read_lora(place.path)
        if files.num_bytes > self._max_bytes:
            raise LoraError(f"{files.weights} has {files.num_bytes} bytes, the most is {self._max_bytes}")
        fit.check(files)
        return files

    def _bounds(self, roots: Roots) -> FetchBounds:
        return FetchBounds(self._max_bytes, self._timeout_s, roots)

    def _roots_of(self, place: Place) -> Roots:
        """A folder of a source's stays within that source; everything else within the profile's roots."""
        if isinstance(place, Remote):
            for source in self._sources:
                if isinstance(source, Remote) and source.holds(place.url):
                    return Roots((source,), "its source")
        return self._roots


def _is_folder(place: Folder) -> bool:
    """Raises LoraError for a name that no folder can have."""
    try:
        return place.path.is_dir()
    except (OSError, ValueError) as error:
        raise LoraError(f"{place} cannot be looked at: {error}") from error
