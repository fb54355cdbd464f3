"""`warmgate serve --upstream URL …`: a profile made for servers that run already."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from configs.errors import ConfigError
from configs.tokenizer import load_model_files
from ops.errors import OperationError

TIMEOUT_S = 10.0
_HEAD = """\
# Made by `warmgate serve --upstream`: edit a copy of it to go on from here (docs/profiles.md).
"""


@dataclass(frozen=True, slots=True)
class Served:
    """A model that servers have: its id there, where its own files may be found, and its longest context."""

    model: str
    root: str
    max_model_len: int | None


def make_profile(urls: Sequence[str], source: str | None, home: Path) -> Path:
    """Writes a profile with a group for each server; asks them what they serve. `source`: the model's tokenizer and
    chat template: a catalogue name, hub id or folder, if not what the servers say. Raises OperationError."""
    urls = [url.rstrip("/").removesuffix("/v1") for url in urls]  # what clients call base_url ends in it
    if len(set(urls)) < len(urls):
        raise OperationError(f"--upstream names a server twice: {' '.join(urls)}")
    found = [asked(url) for url in urls]
    other = next((served.model for served in found if served.model != found[0].model), None)
    if other is not None:
        raise OperationError(f"the servers have different models, {found[0].model} and {other}: write a profile")
    profile = profile_of(urls, found[0], _source(found[0], source, home))
    digest = hashlib.sha256(" ".join(urls).encode()).hexdigest()[:8]
    path = home / "profiles" / f"upstream-{digest}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_HEAD + yaml.safe_dump(profile, sort_keys=False))
    return path


def profile_of(urls: Sequence[str], served: Served, source: str) -> dict[str, Any]:
    """The profile as a tree."""
    engine: dict[str, Any] = {"kind": "openai", "max_num_seqs": 256, "max_num_batched_tokens": 2048}
    if served.max_model_len is not None:
        engine["max_model_len"] = served.max_model_len
    return {
        "cluster": "upstream",
        "models": [{"id": served.model, "source": source}],
        "groups": [
            {"name": f"upstream-{i}", "model": served.model, "engine": engine | {"upstream": {"url": url}}}
            for i, url in enumerate(urls)
        ],
        "tenants": [{"id": "local", "anonymous": True}],
    }


def asked(url: str) -> Served:
    """What a server says it serves. Raises OperationError."""
    try:
        reply = httpx.get(f"{url}/v1/models", timeout=TIMEOUT_S, trust_env=False)
        if reply.status_code in (401, 403):
            key = "it wants a key: write a profile, with engine.upstream.api_key_env (docs/profiles.md)"
            raise OperationError(f"{url}/v1/models answered {reply.status_code}: {key}")
        if reply.status_code != httpx.codes.OK:
            raise OperationError(f"{url}/v1/models answered {reply.status_code}: no OpenAI-compatible server?")
        card: dict[str, Any] = reply.json()["data"][0]
        name, longest = str(card["id"]), card.get("max_model_len")
        return Served(name, str(card.get("root") or name), longest if isinstance(longest, int) else None)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise OperationError(f"{url}/v1/models: {error or type(error).__name__}") from error
    except ValueError as error:
        raise OperationError(f"{url}/v1/models answered no JSON: no OpenAI-compatible server?") from error
    except (KeyError, IndexError, TypeError) as error:
        raise OperationError(f"{url}/v1/models lists no model") from error


def _source(served: Served, wanted: str | None, home: Path) -> str:
    for source in (wanted,) if wanted is not None else (served.root, served.model):
        try:
            load_model_files(source, home)
        except ConfigError as error:
            reason = error.reason
        else:
            return source
    raise OperationError(
        f"the gateway needs the tokenizer and chat template of {wanted or served.model}: {reason}; "
        "`--model` takes a catalogue name, hub id or folder"
    )
