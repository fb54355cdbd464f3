"""A replica as a process of its own, so that tests can kill it: `python -m tests.gateway.replica_main {runtime} …`."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

from configs.schema import EngineConfig, SimConfig
from configs.tokenizer import load_model_files
from replicas.channel import ChannelServer
from replicas.detokenize import TextEngine
from replicas.sim_engine import sim_engine
from routing.registry import Announcement, Member
from routing.store import Store


async def main(redis_url: str, run_dir: str, replica_id: str, step_s: str) -> None:
    files = load_model_files("sim:bytes", Path(run_dir))
    config = EngineConfig(kind="sim", max_num_seqs=8, sim=SimConfig(step_base_s=float(step_s)))
    engine = TextEngine(sim_engine(config, files.vocab_size, files.special.eos, "m"), files.tokenizer)
    server = ChannelServer(engine, replica_id, b"s" * 32)
    endpoint = f"unix://{run_dir}/{replica_id}.sock"
    await server.start([endpoint])
    member = Member(replica_id=replica_id, group="g", model="m", endpoint=endpoint, epoch=time.time_ns(), host_id="h",
                    pid=os.getpid(), started_at=time.time())  # fmt: skip
    Announcement(Store(redis_url, "test"), member).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
