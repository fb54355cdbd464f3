"""`warmgate demo-lora`: eight tenants on one model, each with an adapter of its own that nobody else may use.

train what is missing ─► a profile with a tenant and a key for each ─► serve it ─► everybody asks the same question
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import httpx
import yaml
from rich.console import Console
from rich.table import Table

from ops.errors import OperationError
from ops.lora_styles import STYLES, UNSEEN, styles_of
from replicas.contract import EngineError

MODEL = "smollm2-135m"
RANK, STEPS, LAYERS = 8, 24, 10
START_S = 400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """Which engine, whose adapters (names of styles), and how many fit into a replica at once."""

    engine: Literal["native", "vllm"]
    styles: Sequence[str]
    folder: Path
    slots: int = 4

    def key_of(self, style: str) -> str:
        return f"key-of-{style}"

    def profile(self) -> dict[str, Any]:
        """Two in-house replicas or one of vLLM's; fewer slots than adapters, so that they come and go."""
        engine: dict[str, Any] = {
            "kind": self.engine, "dtype": "float32", "threads": 1, "kv_cache_gib": 0.5, "max_num_seqs": 16,
            "max_adapters": self.slots, "max_lora_rank": RANK,
        }  # fmt: skip
        engine |= {"block_size": 32} if self.engine == "vllm" else {"lora_pool_gib": 0.25}
        tenants: list[dict[str, Any]] = [{"id": style, "keys": [self.key_of(style)]} for style in self.styles]
        return {
            "cluster": f"demo-lora-{os.getpid()}",
            "models": [{"id": MODEL, "source": MODEL, "default_max_tokens": 48}],
            "groups": [
                {"name": "smollm2", "model": MODEL, "replicas": 1 if self.engine == "vllm" else 2, "engine": engine}
            ],
            "tenants": tenants,
            "adapters": [
                {
                    "name": style, "base_model": MODEL, "path": str(self.folder / style), "rank": RANK, "owner": style,
                }
                for style in self.styles
            ],
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Said:
    """A tenant's answer from its adapter. `seconds` from asking to the whole answer."""

    tenant: str
    question: str
    text: str
    replica: str
    seconds: float

    @property
    def is_own(self) -> bool:
        return styles_of(self.text) == [self.tenant]


@click.command("demo-lora", short_help="Eight tenants with an adapter each.")
@click.option("--engine", default="native", show_default=True, type=click.Choice(["native", "vllm"]))
@click.option("--style", "styles", multiple=True, type=click.Choice(sorted(STYLES)), help="Repeatable [default: all].")
@click.option("--folder", type=click.Path(file_okay=False, resolve_path=True, path_type=Path),
              help="Where adapters are, or are put [default: WARMGATE_HOME/adapters/demo].")  # fmt: skip
@click.option("--threads", default=lambda: min(2, os.cpu_count() or 1), show_default="2", type=click.IntRange(min=1),
              help="For training.")  # fmt: skip
@click.option("--stay", is_flag=True, help="Go on serving until Ctrl-C, to try it by hand.")
def demo_lora(engine: Any, styles: tuple[str, ...], folder: Path | None, threads: int, stay: bool) -> None:
    """Train eight small adapters (once; less than a minute each on two cores), serve them to a tenant each, and show
    the tenants talking to their own. Exit code 1 when an answer is not in its tenant's style.

    \b
    warmgate demo-lora
    warmgate demo-lora --engine vllm --stay
    warmgate demo-lora --style pirate --style json
    """
    from configs.runtime import home_dir

    if engine == "vllm":
        from replicas.vllm.versions import check_installed

        try:
            check_installed()
        except EngineError as error:
            raise OperationError(str(error)) from error
    chosen = tuple(dict.fromkeys(styles)) or tuple(sorted(STYLES))
    demo = Demo(engine=engine, styles=chosen, folder=folder or home_dir(os.environ) / "adapters" / "demo")
    console = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 140)
    train_missing(demo, threads)
    try:
        found = asyncio.run(_shown(demo, console, stay))
    except KeyboardInterrupt:
        raise OperationError("stopped") from None
    except httpx.HTTPError as error:
        raise OperationError(f"the gateway did not answer: {error or type(error).__name__}") from error
    click.echo(json.dumps(found))
    click.get_current_context().exit(0 if found["in their own style"] == found["answers"] else 1)


def train_missing(demo: Demo, threads: int) -> None:
    """Trains those that are not in the folder yet; each appears there when it is whole. Raises OperationError."""
    missing = [style for style in demo.styles if not (demo.folder / style / "adapter_config.json").is_file()]
    half = [style for style in missing if (demo.folder / style).exists()]
    if half:
        raise OperationError(f"{demo.folder / half[0]} is there and is no adapter: move it away")
    if not missing:
        return
    from configs.runtime import home_dir
    from configs.tokenizer import find_model
    from ops.train_lora import TrainOptions, chats_of, shown, train

    model = find_model(MODEL, home_dir(os.environ))
    options = TrainOptions(rank=RANK, steps=STEPS, batch=8, learning_rate=2e-3, threads=threads, layers=LAYERS)
    demo.folder.mkdir(parents=True, exist_ok=True)
    for i, style in enumerate(missing, 1):
        with (
            tempfile.TemporaryDirectory(dir=demo.folder, prefix=".") as aside,
            shown(f"{style} ({i} of {len(missing)})", STEPS) as told,
        ):
            train(model, Path(aside) / style, chats_of(style), options, told)
            (Path(aside) / style).rename(demo.folder / style)


async def _shown(demo: Demo, console: Console, stay: bool) -> dict[str, Any]:
    async with _served(demo, console) as port:
        base = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=base, timeout=120, trust_env=False) as client:
            rounds = [
                await asyncio.gather(*(ask(client, demo, style, question) for style in demo.styles))
                for question in UNSEEN
            ]
            said = [each for answers in rounds for each in answers]
            refusal = await refused(client, demo)
        console.print(_table(said))
        console.print(f"\n{refusal}", markup=False)
        if stay:
            await _stay(console, base, demo)
    return {
        "engine": demo.engine,
        "adapters": len(demo.styles),
        "slots a replica": demo.slots,
        "answers": len(said),
        "in their own style": sum(each.is_own for each in said),
        "replicas": sorted({each.replica for each in said}),
    }


async def ask(client: httpx.AsyncClient, demo: Demo, tenant: str, question: str) -> Said:
    """One question of a tenant to its own adapter, with its own key. Raises OperationError."""
    began = time.perf_counter()
    body = {"model": tenant, "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 48}
    headers = {"authorization": f"Bearer {demo.key_of(tenant)}"}
    answer = await client.post("/v1/chat/completions", json=body, headers=headers)
    if answer.status_code != 200:
        raise OperationError(f"{tenant} was answered {answer.status_code}: {answer.text}")
    text = str(answer.json()["choices"][0]["message"]["content"])
    return Said(tenant, question, text, answer.headers["x-warmgate-replica"], time.perf_counter() - began)


async def refused(client: httpx.AsyncClient, demo: Demo) -> str:
    """What happens to a tenant that asks for another's adapter. Raises OperationError if it is answered."""
    one, other = demo.styles[0], demo.styles[-1]
    if one == other:
        return "with one tenant there is nobody else's adapter to ask for"
    body = {"model": other, "prompt": "hello", "max_tokens": 1}
    answer = await client.post("/v1/completions", json=body, headers={"authorization": f"Bearer {demo.key_of(one)}"})
    if answer.status_code != 404:
        raise OperationError(f"{one} asked for {other}, which is not its own, and was answered {answer.status_code}")
    return f"{one} asks for {other}: 404 {answer.json()['error']['message']}"


def _table(said: Sequence[Said]) -> Table:
    table = Table(title="every tenant asks its own adapter", title_justify="left")
    for column in ("tenant, model", "question", "answer", "replica", "seconds"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    for each in said:
        mark = "" if each.is_own else "  (not in its style)"
        table.add_row(each.tenant, each.question, each.text.strip() + mark, each.replica, f"{each.seconds:.2f}")
    return table


async def _stay(console: Console, base: str, demo: Demo) -> None:
    console.print(f"\nserving on {base}/v1 until Ctrl-C; every model has the key key-of-MODEL:", markup=False)
    style = demo.styles[0]
    line = f'  warmgate chat --url {base} --key {demo.key_of(style)} --model {style} "{UNSEEN[0]}"'
    console.print(line, markup=False, soft_wrap=True)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()


@contextlib.asynccontextmanager
async def _served(demo: Demo, console: Console) -> AsyncIterator[int]:
    """`warmgate serve` of the demo's profile, its start shown; its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with tempfile.TemporaryDirectory(prefix="wg-demo-") as folder:
        profile = Path(folder) / "demo-lora.yaml"
        profile.write_text(yaml.safe_dump(demo.profile(), sort_keys=False))
        command = (sys.executable, "-m", "ops.cli", "serve", str(profile), "--port", str(port))
        process = await asyncio.create_subprocess_exec(*command, stdout=sys.stderr, start_new_session=True)
        try:
            await _ready(port, process)
            yield port
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), 90)
            if process.returncode is None:
                process.kill()
                await process.wait()


async def _ready(port: int, process: asyncio.subprocess.Process) -> None:
    """Raises OperationError when it ends instead, or takes too long."""
    async with httpx.AsyncClient(trust_env=False) as client:
        end = time.monotonic() + START_S
        while process.returncode is None and time.monotonic() < end:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(f"http://127.0.0.1:{port}/ready")).status_code == 200:
                    return
            await asyncio.sleep(0.5)
    raise OperationError("the gateway did not start: see above")
