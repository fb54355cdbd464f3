"""Whether a picture can be drawn, asked before the work that it would show."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ops.errors import OperationError


def check_can_plot(path: Path) -> None:
    """Makes the picture's folder. Raises OperationError where no picture could be written to `path`."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise OperationError(f"a plot needs matplotlib: {sys.executable} -m pip install matplotlib") from error
    kinds = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix and path.suffix.removeprefix(".").lower() not in kinds:
        raise OperationError(f"{path}: a plot's name ends in one of {', '.join(f'.{kind}' for kind in sorted(kinds))}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OperationError(f"{path}: {error}") from error
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OperationError(f"{path}: cannot be written")
