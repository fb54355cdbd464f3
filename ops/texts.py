"""English text that every Python carries: to measure a model on, and another to calibrate quantisation with.

Evaluation: the language reference as `pydoc_data.topics` holds it (what `help()` shows), some 110,000 tokens.
Calibration: docstrings of the standard library, which are other people's words about other things.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_MIN_CHARACTERS = 200
_PACKAGES = ("argparse.py", "asyncio", "collections", "concurrent", "email", "http", "importlib", "json", "logging")
_MODULES = ("pathlib.py", "random.py", "socket.py", "statistics.py", "subprocess.py", "threading.py", "typing.py")


def evaluation_text() -> str:
    """The topics of Python's language reference, in the order of their names."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def calibration_text() -> str:
    """Docstrings of more than a line or two from the standard library, module by module."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = [text for name in (*_PACKAGES, *_MODULES) for path in _sources(root / name) for text in _docstrings(path)]
    return "\n\n".join(texts)


def _sources(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def _docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= _MIN_CHARACTERS:
                yield text
