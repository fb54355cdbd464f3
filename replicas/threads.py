"""How many threads the numeric libraries of a replica's process may start: said before any of them is loaded."""

from __future__ import annotations

from configs.schema import EngineConfig

_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def thread_environment(engine: EngineConfig) -> dict[str, str]:
    """Variables of a replica's process."""
    return {**{name: str(engine.threads) for name in _VARIABLES}, "TOKENIZERS_PARALLELISM": "false"}
