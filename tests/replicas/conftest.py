"""Fixtures of the channel tests, and what holds for all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.replicas.channel_kit import Pair, Replica, serving


@pytest.fixture(autouse=True)
def no_drafter_fails(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """An engine goes on when its drafter fails: a test must not. Those that mean it clear the log."""
    yield
    assert not [record for record in caplog.get_records("call") if "drafter failed" in record.getMessage()]


@pytest.fixture(params=["unix", "tcp"])
async def pair(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Pair]:
    endpoint = f"unix://{tmp_path}/r.sock" if request.param == "unix" else "tcp://127.0.0.1:0"
    async with serving(endpoint) as pair:
        yield pair


@pytest.fixture
async def unix(tmp_path: Path) -> AsyncIterator[Pair]:
    async with serving(f"unix://{tmp_path}/r.sock") as pair:
        yield pair


@pytest.fixture
async def replica(tmp_path: Path) -> AsyncIterator[Replica]:
    replica = Replica(tmp_path / "r.sock")
    await replica.server.start([replica.endpoint])
    yield replica
    await replica.server.close()
    await asyncio.sleep(0.01)  # links that a test left behind hear of the end
