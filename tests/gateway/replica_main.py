"""A replica as a process of its own, so that tests can kill it.

`python -m tests.gateway.replica_main config.json runtime.json replica_id`; SIGTERM drains it, as Serve does.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import msgspec

from configs.runtime import Runtime
from configs.schema import Config
from replicas.host import ReplicaHost


async def main(config: Config, runtime: Runtime, replica_id: str) -> None:
    told_to_stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told_to_stop.set)
    host = ReplicaHost(config, config.groups[0], runtime, replica_id)
    await host.start()
    await told_to_stop.wait()
    await host.drain()
    await host.close()


def path_from(kind: type, value: object) -> object:
    """What msgspec does not know by itself."""
    assert kind is Path, f"{kind=} {value=}"
    return Path(str(value))


if __name__ == "__main__":
    config_path, runtime_path, own_id = sys.argv[1:]
    asyncio.run(
        main(
            msgspec.json.decode(Path(config_path).read_bytes(), type=Config),
            msgspec.json.decode(Path(runtime_path).read_bytes(), type=Runtime, dec_hook=path_from),
            own_id,
        )
    )
