"""Tokenizers that tests of the HTTP face share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.tokenizer import ModelFiles, load_model_files


@pytest.fixture(scope="session")
def sim_files() -> ModelFiles:
    return load_model_files("sim:bytes", Path())


@pytest.fixture(scope="session")
def smollm2_files() -> ModelFiles:
    home = Path(os.environ.get("WARMGATE_HOME", "~/.cache/warmgate")).expanduser()
    try:
        return load_model_files("smollm2-135m", home)
    except ConfigError as error:
        pytest.skip(str(error))
