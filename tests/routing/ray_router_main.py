"""A private Ray with the example of docs/ray-router.md: prints one JSON object of where requests went.

`python -m tests.routing.ray_router_main EXAMPLE.py`
"""

from __future__ import annotations

import asyncio
import json
import runpy
import sys
from typing import Any

from ops.bench.rivals.private_ray import private_ray

PATIENCE_S = 30.0


def conversation(name: str, num_turns: int) -> dict[str, Any]:
    """A chat of so many long messages; turns of one name begin alike, different names do not."""
    return {"messages": [{"role": "user", "content": f"{name} {turn} " * 200} for turn in range(num_turns)]}


async def replica_of(handle: Any, request: dict[str, Any]) -> str:
    answer = await asyncio.wait_for(_answer(handle, request), PATIENCE_S)
    return str(answer["replica"])


async def _answer(handle: Any, request: dict[str, Any]) -> Any:
    return await handle.chat.remote(request)


async def drive(handle: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    names = [f"conversation {i}" for i in range(8)]
    first = {name: await replica_of(handle, conversation(name, 1)) for name in names}
    found["spread"] = sorted(first.values())
    later = {name: await replica_of(handle, conversation(name, 3)) for name in names}
    found["stayed"] = sum(first[name] == later[name] for name in names)
    tuned = handle.options(multiplexed_model_id="style@1")
    found["with adapter"] = [await replica_of(tuned, conversation(names[0], turns)) for turns in (1, 2, 3)]
    burst = [_answer(handle, conversation(f"burst {i}", 2)) for i in range(30)]
    found["burst"] = [answer["replica"] for answer in await asyncio.wait_for(asyncio.gather(*burst), PATIENCE_S)]
    found["no prompt"] = await replica_of(handle, {"input": "no words of a prompt"})
    return found


async def serve_and_drive(example: str) -> dict[str, Any]:
    """A handle lives on the loop it was first used on, so Serve is shut down on that loop too."""
    from ray import serve

    app = runpy.run_path(example)["app"]
    await asyncio.to_thread(serve.start, proxy_location="Disabled")
    try:
        return await drive(await asyncio.to_thread(serve.run, app, route_prefix=None))
    finally:
        await serve.shutdown_async()


def main(example: str) -> None:
    with private_ray():
        found = asyncio.run(serve_and_drive(example))
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
