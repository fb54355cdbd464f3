"""What tests of the gateway share: tokenizers, a Valkey, a cluster of sim replicas and ingresses."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.tokenizer import ModelFiles, load_model_files
from tests.gateway.kv_cluster import Cluster
from tests.routing.conftest import Valkey


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


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    folder = Path(tempfile.mkdtemp(prefix="wg-test-"))
    server = Valkey(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder)


@pytest.fixture
async def cluster(valkey: Valkey) -> AsyncIterator[Cluster]:
    cluster = Cluster(valkey)
    try:
        yield cluster
    finally:
        with contextlib.suppress(AssertionError):
            valkey.signal(signal.SIGCONT)
        await cluster.close()
