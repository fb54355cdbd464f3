"""docs/profiles.md names every key of the schema."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from configs.schema import Config, Section

PAGE = Path(__file__).parents[2] / "docs" / "profiles.md"


def keys(section: type[Section], path: str = "") -> Iterator[str]:
    for field in msgspec.structs.fields(section):
        if not (path and _sections(field.type)):
            yield f"{path}{field.encode_name}"
        for inner in _sections(field.type):
            yield from keys(inner, f"{path}{field.encode_name}.")


def _sections(annotation: object) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for part in getattr(annotation, "__args__", ()) for found in _sections(part)]


@pytest.mark.parametrize("key", sorted(set(keys(Config))))
def test_every_key_of_the_schema_is_documented(key: str) -> None:
    assert f"{key.rsplit('.', 1)[-1]}`" in PAGE.read_text(), key


def test_the_walk_over_the_schema_reaches_nested_keys() -> None:
    assert "groups.engine.sim.step_base_s" in set(keys(Config))
