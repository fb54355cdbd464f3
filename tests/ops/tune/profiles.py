"""Profiles of one group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from configs.document import write_text


def write_profile(path: Path, engine: dict[str, Any], *, source: str = "sim:bytes", **more: Any) -> Path:
    group: dict[str, Any] = {"name": "one", "model": "m", "engine": engine}
    group |= {name: more.pop(name) for name in ("resources", "replicas") if name in more}
    tree = {
        "cluster": "tuned",
        "models": [{"id": "m", "source": source}],
        "groups": [group],
        "tenants": [{"id": "local", "anonymous": True}],
        **more,
    }
    path.write_text(write_text(tree))
    return path
