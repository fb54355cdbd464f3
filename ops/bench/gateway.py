"""`warmgate bench gateway`: CPU per request and per streamed chunk of the front-end, beside vllm-router.

Each side streams the same load twice a visit, answers of 1 and of 64 tokens; the difference gives the CPU per chunk,
the rest of the short run the CPU per request. CPU is the operating system's, of the front-end's processes alone, by
role. Ours stands before sim replicas, vllm-router before the mock upstream (which also renders prompts for it).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Protocol

import httpx
import msgspec

from ops.bench.cpu import CpuMeter
from ops.bench.harness import BenchError, Goal, Notice, Plan, Ratio, Sample, Samples, alternate
from ops.bench.load import load_process
from ops.bench.load_spec import Closed, LoadResult, LoadSpec
from ops.bench.ray_sides import RayHandle, served
from ops.bench.report import Report
from ops.bench.rivals.venvs import RivalVenv
from ops.bench.stack import MODEL, Stack, sim_profile

SHORT, LONG = 1, 64
ALL_ROLES = "chunks a CPU-second, all roles"
PACE_S = 0.010


@dataclass(frozen=True, slots=True)
class Size:
    """How much load a visit is: `concurrency` streams at once, requests in all."""

    num_requests: int = 1024
    concurrency: int = 64


@dataclass(frozen=True, slots=True)
class Front:
    """A front-end that runs: where it listens, and whose CPU counts."""

    port: int
    model: str
    roles: Mapping[str, Sequence[int]]


class Opening(Protocol):
    """Starts a front-end, ends it when the context closes."""

    def __call__(self) -> AbstractAsyncContextManager[Front]: ...


@dataclass(slots=True)
class FrontSide:
    """One front-end under load. A `harness.Side`."""

    name: str
    opening: Opening
    size: Size
    _front: Front | None = None
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def start(self) -> None:
        self._front = await self._stack.enter_async_context(self.opening())

    async def sample(self) -> Sample:
        assert self._front is not None
        short, _ = await self._load(SHORT)
        long, result = await self._load(LONG)
        num = self.size.num_requests
        sample: dict[str, float] = {}
        for role in self._front.roles:
            per_chunk_s = (long[role] - short[role]) / num / (LONG - SHORT)
            sample[f"{role} µs a chunk"] = 1e6 * per_chunk_s
            sample[f"{role} µs a request"] = 1e6 * (short[role] / num - per_chunk_s * SHORT)
        sample[ALL_ROLES] = num * LONG / sum(long.values())
        if result.ttft.p50 is not None and result.ttft.p99 is not None:
            sample["TTFT p50 ms"] = 1000 * result.ttft.p50
            sample["TTFT p99 ms"] = 1000 * result.ttft.p99
        return sample

    async def stop(self) -> None:
        await self._stack.aclose()

    async def _load(self, num_tokens: int) -> tuple[dict[str, float], LoadResult]:
        front = self._front
        assert front is not None
        spec = LoadSpec(
            host="127.0.0.1",
            port=front.port,
            model=front.model,
            arrivals=Closed(self.size.concurrency),
            num_requests=self.size.num_requests,
            num_tokens=num_tokens,
            extra={"ignore_eos": True},
        )
        meter = CpuMeter(front.roles)
        async with load_process(spec) as load:
            before = meter.read()
            await load.go()
            used = meter.read().since(before)
            result = await load.result()
        if result.num_rejected:
            raise BenchError(f"{result.num_rejected} of {result.num_requests} requests were refused: {result.faults}")
        return used, result


@contextlib.asynccontextmanager
async def warmgate(step_s: float) -> AsyncIterator[Front]:
    """Our ingress alone, before one sim replica."""
    async with Stack(sim_profile(step_s, 1)) as stack:
        yield Front(stack.port, MODEL, stack.roles)


@contextlib.asynccontextmanager
async def warmgate_haproxy(step_s: float) -> AsyncIterator[Front]:
    """`warmgate serve`: HAProxy, Ray Serve, our ingress, one sim replica."""
    async with served(sim_profile(step_s, 1)) as (port, roles):
        yield Front(port, MODEL, roles)


@contextlib.asynccontextmanager
async def vllm_router(step_s: float) -> AsyncIterator[Front]:
    """vllm-router before the mock upstream."""
    pipe = asyncio.subprocess.PIPE
    behaviour = msgspec.json.encode({"model": MODEL, "stop_after": 10_000, "chunk_interval_s": step_s}).decode()
    mock = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "ops.bench.mock_vllm", "--behaviour", behaviour, stdout=pipe
    )
    try:
        assert mock.stdout is not None
        upstream = msgspec.json.decode(await mock.stdout.readline())["url"]
        async with router_before(upstream) as (port, pid):
            yield Front(port, MODEL, {"ingress": [pid], "replicas": [mock.pid]})
    finally:
        if mock.returncode is None:
            mock.kill()
            await mock.wait()


@contextlib.asynccontextmanager
async def router_before(upstream: str) -> AsyncIterator[tuple[int, int]]:
    """vllm-router before a server: its port and its pid. Raises RivalError where it is not installed."""
    program = str(RivalVenv.named("vllm-router").require().program("vllm-router"))
    port = free_port()
    router = await asyncio.create_subprocess_exec(
        *(program, "--worker-urls", upstream, "--host", "127.0.0.1", "--port", str(port)),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port()), "--log-level", "warning"),
        stdout=asyncio.subprocess.DEVNULL,
    )
    try:
        await answers(f"http://127.0.0.1:{port}/health")
        yield port, router.pid
    finally:
        if router.returncode is None:
            router.kill()
            await router.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def answers(url: str, limit_s: float = 30.0) -> None:
    """Returns when a server answers 200 there. Raises TimeoutError."""
    async with httpx.AsyncClient() as client, asyncio.timeout(limit_s):
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(url)).status_code == 200:
                    return
            await asyncio.sleep(0.1)


SIDES = ("warmgate", "vllm-router", "warmgate + HAProxy", "ray handle")


def sides(wanted: Sequence[str], size: Size) -> tuple[list[FrontSide], list[str]]:
    """Every wanted side, paced and unpaced, and a note for each that cannot run here."""
    openings = {"warmgate": warmgate, "vllm-router": vllm_router, "warmgate + HAProxy": warmgate_haproxy}
    notes = []
    if "vllm-router" in wanted and not RivalVenv.named("vllm-router").installed:
        notes.append("vllm-router is not installed here: python -m ops.bench.rivals install vllm-router")
        wanted = [name for name in wanted if name != "vllm-router"]
    found = []
    for name, opening in openings.items():
        if name in wanted:
            for pace, step_s in (("paced", PACE_S), ("unpaced", 0.0)):
                open_it = lambda opening=opening, step_s=step_s: opening(step_s)  # noqa: E731
                found.append(FrontSide(f"{name}, {pace}", open_it, size))
    return found, notes


async def run(wanted: Sequence[str], size: Size, plan: Plan, notice: Notice) -> Report:
    """Measures; raises BenchError when an answer is wrong."""
    fronts, notes = sides(wanted, size)
    handles = [RayHandle(size.concurrency, ALL_ROLES)] if "ray handle" in wanted else []
    samples = await alternate([*fronts, *handles], plan, notice)
    facts = {
        "streams at once": size.concurrency,
        "requests a visit": 2 * size.num_requests,
        "paced": f"every stream gets a token each {1000 * PACE_S:.0f} ms",
    }
    title = "Gateway: CPU a request and a streamed chunk, 64 streams"
    return Report("gateway", title, samples, ratios(samples), facts, notes)


def ratios(samples: Samples) -> list[Ratio]:
    """Ours against vllm-router (ingress role, or ingress and proxy), and against a Ray handle's stream."""
    found: list[Ratio] = []
    for pace in ("paced", "unpaced"):
        ours, theirs, proxied = f"warmgate, {pace}", f"vllm-router, {pace}", f"warmgate + HAProxy, {pace}"
        if samples.comparable(ours, theirs):
            found.append(samples.ratio("ingress µs a chunk", ours, theirs, Goal.at_most(0.75)))
            found.append(samples.ratio("ingress µs a request", ours, theirs, Goal.at_most(2.5)))
        if samples.comparable(proxied, theirs):
            both = _with_proxy(samples, proxied)
            ratio = both.ratio("ingress µs a chunk", proxied, theirs, Goal.at_most(1.25))
            found.append(replace(ratio, metric="ingress + HAProxy µs a chunk"))
        if samples.comparable(ours, "ray handle"):
            found.append(samples.ratio(ALL_ROLES, ours, "ray handle", Goal.at_least(5.0)))
    return found


def _with_proxy(samples: Samples, side: str) -> Samples:
    """The same samples with the proxy's CPU added to that side's ingress."""
    summed: list[Sample] = [
        {**sample, "ingress µs a chunk": sample["ingress µs a chunk"] + sample["haproxy µs a chunk"]}
        for sample in samples.by_side[side]
    ]
    return Samples({**samples.by_side, side: summed})
