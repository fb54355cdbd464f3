"""The compiled kernels, from the cache that engines share, where there is a compiler."""

from __future__ import annotations

import os

import pytest

from configs.runtime import home_dir
from replicas.engine.kernels.build import build, find_compiler
from replicas.engine.kernels.library import Kernels


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    if find_compiler(os.environ) is None:
        pytest.skip("no C++ compiler here")
    return Kernels(build(home_dir(os.environ) / "kernels", os.environ))
