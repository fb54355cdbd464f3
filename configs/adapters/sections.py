"""The parts of a profile that are about LoRA adapters: single ones, places full of them, bounds on their files."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from configs.section import ModelId, Name, NotNegative, Positive, PositiveF, Section


class AdapterConfig(Section, frozen=True):
    """A LoRA adapter that clients name like a model; of several versions of one name the last counts.

    `owner`: the one tenant that may use it; without one, every tenant that may use `base_model`. `pinned`: replicas
    load it when they start, and keep it.
    """

    name: ModelId
    base_model: ModelId
    version: Name = "1"
    path: str = ""
    rank: Annotated[int, Meta(ge=1, le=512)] = 8
    owner: Name | None = None
    num_bytes: NotNegative = 0
    pinned: bool = False


class AdapterSourceConfig(Section, frozen=True):
    """A place whose every sub-folder is an adapter of `base_model`, named like the folder: `file:///folder`, or
    `s3://bucket/prefix` and its like.

    It is looked at every `poll_s`; a look that takes longer than `timeout_s` has failed. Of more than `max_adapters`
    folders the first by name count. `owner` and `pinned`: as of `AdapterConfig`, for each of them.
    """

    url: str
    base_model: ModelId
    owner: Name | None = None
    pinned: bool = False
    poll_s: PositiveF = 10.0
    timeout_s: PositiveF = 30.0
    max_adapters: Annotated[int, Meta(ge=1, le=10_000)] = 1000


class AdapterFilesConfig(Section, frozen=True):
    """Bounds on the files of adapters, wherever they come from.

    `roots`: with any, a path must lie within one of them after its links are resolved; folders of this machine, or
    URLs. What comes from a URL is kept in a cache of `cache_gib` on each machine; fetching may take `fetch_timeout_s`.
    """

    roots: tuple[str, ...] = ()
    max_mib: Positive = 2048
    cache_gib: PositiveF = 20.0
    fetch_timeout_s: PositiveF = 300.0
