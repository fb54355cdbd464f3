"""`simulate calibrate` at a real gateway: HTTP, an ingress and sim replicas whose step costs are known."""

from __future__ import annotations

import asyncio
from pathlib import Path

from click.testing import CliRunner

from configs.schema import Config, EngineConfig, GroupConfig, ModelConfig, SimConfig, TenantConfig
from ops.bench.stack import MODEL, Stack
from ops.cli import main
from ops.simulate.calibration import Calibration, load_calibration

COSTS = SimConfig(prefill_tokens_per_s=8000.0, step_base_s=0.006, step_per_sequence_s=0.002, num_blocks=4096)
CONFIG = Config(
    cluster="calibrate",
    models=(ModelConfig(id=MODEL, source="sim:bytes"),),
    groups=(
        GroupConfig(
            name="sim",
            model=MODEL,
            replicas=2,
            engine=EngineConfig(kind="sim", max_num_batched_tokens=256, sim=COSTS),
        ),
    ),
    tenants=(TenantConfig(id="local", anonymous=True),),
)
ATTEMPTS = 4
"""Whatever else the machine does only adds to a time: one quiet moment is enough."""


def measured(port: int, out: Path) -> Calibration:
    words = ["simulate", "calibrate", f"http://127.0.0.1:{port}", "--model", MODEL, "--out", str(out)]
    result = CliRunner().invoke(main, [*words, "--prompt-tokens", "1024", "--max-num-batched-tokens", "256"])
    assert result.exit_code == 0, result.output
    return load_calibration(out)


def is_right(found: Calibration) -> bool:
    return (
        0.85 < found.prefill_tokens_per_s / COSTS.prefill_tokens_per_s < 1.1
        and 0.9 < found.step_base_s / COSTS.step_base_s < 1.5
        and 0.6 < found.step_per_sequence_s / COSTS.step_per_sequence_s < 1.4
        and 0 < found.overhead_s < 0.03
    )


async def test_the_command_finds_the_step_costs_of_replicas_behind_a_gateway(tmp_path: Path) -> None:
    found = []
    async with Stack(CONFIG) as stack:
        for attempt in range(ATTEMPTS):
            found.append(await asyncio.to_thread(measured, stack.port, tmp_path / f"{attempt}.json"))
            if is_right(found[-1]):
                return
    raise AssertionError(found)
