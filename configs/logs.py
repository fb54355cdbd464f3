"""How much the project's own loggers say."""

from __future__ import annotations

import logging

LOGGERS = ("warmgate", "gateway", "replicas", "routing")


def set_log_level(level: str) -> None:
    """Applies `telemetry.log_level` in this process; other libraries' loggers stay as they are."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(level.upper())
