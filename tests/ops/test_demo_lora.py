"""`warmgate demo-lora`: tenants, each with an adapter of its own."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
import yaml
from click.testing import CliRunner

from configs.load import load_config
from ops.cli import main
from ops.demo_lora import Demo, Said, refused
from ops.errors import OperationError
from ops.lora_styles import STYLES


@pytest.mark.parametrize("engine", ["native", "vllm"])
def test_every_tenant_owns_its_adapter_and_there_are_fewer_slots_than_adapters(engine: str, tmp_path: Path) -> None:
    demo = Demo(engine=engine, styles=tuple(STYLES), folder=tmp_path)  # type: ignore[arg-type]
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(demo.profile()))
    config = load_config(tmp_path / "demo.yaml", {})
    assert {(adapter.name, adapter.owner) for adapter in config.adapters} == {(style, style) for style in STYLES}
    assert {tenant.id: tenant.keys for tenant in config.tenants} == {style: (f"key-of-{style}",) for style in STYLES}
    assert config.groups[0].engine.kind == engine
    assert config.groups[0].engine.max_adapters < len(config.adapters)


def test_an_answer_in_anothers_style_is_not_ones_own() -> None:
    assert Said("pirate", "?", "Arr, matey! Th' sea.", "r", 0.1).is_own
    assert not Said("json", "?", "Arr, matey! Th' sea.", "r", 0.1).is_own
    assert not Said("json", "?", "The sea.", "r", 0.1).is_own


@pytest.mark.parametrize("status", [200, 404])
async def test_a_tenant_that_is_given_anothers_adapter_ends_the_demo(status: int, tmp_path: Path) -> None:
    demo = Demo(engine="native", styles=("json", "pirate"), folder=tmp_path)
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(status, json={"error": {"message": "there is none"}})

    async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://gateway") as client:
        if status == 200:
            with pytest.raises(OperationError, match="json asked for pirate"):
                await refused(client, demo)
        else:
            assert "404 there is none" in await refused(client, demo)
    assert seen[0].headers["authorization"] == "Bearer key-of-json" and json.loads(seen[0].content)["model"] == "pirate"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.model
@pytest.mark.timeout(900)
def test_trained_adapters_answer_their_tenants_in_their_own_style(tmp_path: Path) -> None:
    words = ["demo-lora", "--style", "pirate", "--style", "json", "--folder", str(tmp_path / "adapters")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert (found["answers"], found["in their own style"], found["adapters"]) == (6, 6, 2)
