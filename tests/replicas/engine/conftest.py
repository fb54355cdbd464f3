"""Tiny models are made once a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from replicas.engine.attention import KvGeometry, SparseDecode, pick_decode
from tests.replicas.engine.tiny import make_tiny

TinyModels = Callable[[str], tuple[Path, PreTrainedModel]]


@pytest.fixture(scope="session", autouse=True)
def _torch_as_in_the_engine() -> None:
    torch.set_num_threads(1)
    geometry = KvGeometry(6, 2, 16, 4, torch.float32, torch.device("cpu"))
    assert pick_decode(geometry, 256) is SparseDecode  # and torch has said its warning about sparse tensors


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """name of a family → its folder and transformers' model."""
    made: dict[str, tuple[Path, PreTrainedModel]] = {}

    def get(name: str) -> tuple[Path, PreTrainedModel]:
        if name not in made:
            folder = tmp_path_factory.mktemp("tiny")
            made[name] = (folder, make_tiny(name, folder))
        return made[name]

    return get
