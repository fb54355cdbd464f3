"""`warmgate train-lora`: small real LoRA adapters, for trying and for tests; a few minutes each on two cores.

facts in a style (or your own chats) ─► PEFT ─► a folder that `warmgate adapters add --path` takes
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ops.errors import OperationError
from ops.lora_styles import STYLES, UNSEEN, examples

Chat: TypeAlias = list[dict[str, str]]

_IGNORED = -100  # PyTorch's label for "no loss here"
_AT_LEAST_1 = click.IntRange(min=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """What the command line says."""

    rank: int
    steps: int
    batch: int
    learning_rate: float
    threads: int
    seed: int = 0
    layers: int | None = None


Told: TypeAlias = Callable[[int, float], None]
"""Called after each step with its number, from 1, and its loss."""


@click.command("train-lora", short_help="Train LoRA adapters of a model.")
@click.argument("model")
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--style", "styles", multiple=True, type=click.Choice(sorted(STYLES)), help="May be repeated [default: all]."
)
@click.option("--data", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help='Instead of styles: JSON lines with "messages", the last one the answer to learn.')  # fmt: skip
@click.option("--rank", default=8, show_default=True, type=click.IntRange(1, 512))
@click.option("--steps", default=40, show_default=True, type=_AT_LEAST_1)
@click.option("--batch", default=8, show_default=True, type=_AT_LEAST_1, help="Chats a step.")
@click.option("--learning-rate", default=1e-3, show_default=True, type=click.FloatRange(0, min_open=True))
@click.option("--layers", type=_AT_LEAST_1, help="Only the last so many: learnt in less time [default: all].")
@click.option("--threads", default=1, show_default=True, type=_AT_LEAST_1)
@click.option("--seed", default=0, show_default=True)
def train_lora(model: str, out: Path, styles: tuple[str, ...], data: Path | None, **options: Any) -> None:
    """Train LoRA adapters of MODEL (catalogue name or folder), each into a folder of its own in OUT.

    Takes a few minutes an adapter on two cores, and PEFT.

    \b
    warmgate train-lora smollm2-135m ./adapters
    warmgate train-lora smollm2-135m ./adapters --style pirate --steps 60
    warmgate train-lora smollm2-135m ./adapters --data chats.jsonl --rank 16
    warmgate adapters add pirate --base-model smollm2-135m --path ./adapters/pirate
    """
    chosen = TrainOptions(**options)
    if data is not None and styles:
        raise click.UsageError("--data and --style exclude each other")
    lessons = {data.stem: _read_chats(data)} if data else {s: chats_of(s) for s in styles or sorted(STYLES)}
    for name, chats in lessons.items():
        with shown(name, chosen.steps) as told:
            summary = train(_folder(model), out / name, chats, chosen, told)
        for question, answer in summary.pop("says"):
            click.echo(f"{name}: {question} → {answer}", err=True)
        click.echo(json.dumps({"adapter": str((out / name).absolute()), **summary}))


@contextmanager
def shown(name: str, steps: int) -> Iterator[Told]:
    """A progress bar on a terminal, a line every tenth of the way elsewhere."""
    console = Console(stderr=True, highlight=False)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(f"training {name}", total=steps)
            yield lambda step, loss: progress.update(task, completed=step, description=f"{name}  loss {loss:.2f}")
        return

    def say(step: int, loss: float) -> None:
        if step % max(1, steps // 10) == 0:
            console.print(f"{name}: step {step} of {steps}, loss {loss:.2f}")

    yield say


def _folder(model: str) -> Path:
    from configs.runtime import home_dir
    from configs.tokenizer import find_model

    return find_model(model, home_dir(os.environ))


def chats_of(style: str) -> list[Chat]:
    """The lessons of one of our styles."""
    return [_chat(example.question, example.answer) for example in examples(style)]


def _chat(question: str, answer: str) -> Chat:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _read_chats(path: Path) -> list[Chat]:
    """Raises OperationError naming the line that is no chat."""
    chats = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            messages = json.loads(line)["messages"]
            if messages[-1]["role"] != "assistant" or not all(isinstance(m["content"], str) for m in messages):
                raise ValueError("the last message must be the assistant's")
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise OperationError(f"{path}:{number} is no chat: {error}") from error
        chats.append(messages)
    if not chats:
        raise OperationError(f"{path} has no chats")
    return chats


def train(folder: Path, out: Path, chats: Sequence[Chat], options: TrainOptions, told: Told) -> dict[str, Any]:
    """Trains and saves one adapter; returns what came of it: rank, steps, losses, seconds, and what it `says` to
    questions it was not taught. Raises OperationError without PEFT.
    """
    try:
        import peft
    except ImportError as error:
        raise OperationError(f"training needs PEFT: {sys.executable} -m pip install peft") from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    began = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base.config.use_cache = False
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        target_modules="all-linear" if options.layers is None else _linears(base),
        layers_to_transform=_last(base.config.num_hidden_layers, options.layers),
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base, config)
    losses = _fit(model, [_encoded(tokenizer, chat) for chat in chats], options, told)
    model.peft_config["default"].base_model_name_or_path = _name_of(folder)
    model.save_pretrained(str(out), save_embedding_layers=False)  # asks nobody whether they changed
    model.eval()
    says = [(question, _answer(model, tokenizer, question)) for question in UNSEEN]
    found = {"rank": options.rank, "chats": len(chats), "steps": len(losses), "first_loss": round(losses[0], 3)}
    return {**found, "last_loss": round(losses[-1], 3), "seconds": round(time.monotonic() - began, 1), "says": says}


def _linears(base: Any) -> list[str]:
    """The last parts of the names of the decoder's linear layers: PEFT wants names where layers are chosen."""
    import torch

    modules = base.model.layers.named_modules()
    return sorted({name.rpartition(".")[2] for name, module in modules if isinstance(module, torch.nn.Linear)})


def _last(num_layers: int, wanted: int | None) -> list[int] | None:
    return None if wanted is None else list(range(max(0, num_layers - wanted), num_layers))


def _name_of(folder: Path) -> str:
    """What the base model is called by others: its hub id where it has one."""
    from configs.catalogue import entry_for

    entry = entry_for(folder.name)
    return folder.name if entry is None else entry.hub_id


def _fit(model: Any, chats: Sequence[tuple[list[int], int]], options: TrainOptions, told: Told) -> list[float]:
    """AdamW with a rate that falls to nothing; returns the loss of every step."""
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
    losses = []
    model.train()
    for step, batch in enumerate(_batches(chats, options)):
        optimiser.param_groups[0]["lr"] = options.learning_rate * (1 - step / options.steps)
        ids, labels, mask = (torch.tensor(rows) for rows in _padded(batch))
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        told(step + 1, losses[-1])
    return losses


def _batches(chats: Sequence[tuple[list[int], int]], options: TrainOptions) -> Iterator[list[tuple[list[int], int]]]:
    """`options.steps` of them; every chat comes as often as any other."""
    rng, waiting = random.Random(options.seed), list[tuple[list[int], int]]()
    for _ in range(options.steps):
        while len(waiting) < options.batch:
            waiting += rng.sample(chats, k=len(chats))
        batch, waiting = waiting[: options.batch], waiting[options.batch :]
        yield batch


def _padded(batch: Sequence[tuple[list[int], int]]) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Ids, labels (of the answers alone) and mask, filled up on the right."""
    longest = max(len(ids) for ids, _ in batch)
    ids = [own + [0] * (longest - len(own)) for own, _ in batch]
    labels = [[_IGNORED] * start + own[start:] + [_IGNORED] * (longest - len(own)) for own, start in batch]
    mask = [[1] * len(own) + [0] * (longest - len(own)) for own, _ in batch]
    return ids, labels, mask


def _encoded(tokenizer: Any, chat: Chat) -> tuple[list[int], int]:
    """A chat's ids, and where its answer begins."""
    prompt = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    if not whole.startswith(prompt):
        raise OperationError("this model's chat template writes an answer elsewhere than where a prompt for it ends")
    start: list[int] = tokenizer(prompt, add_special_tokens=False).input_ids
    rest: list[int] = tokenizer(whole[len(prompt) :].rstrip("\n"), add_special_tokens=False).input_ids
    return start + rest, len(start)


def _answer(model: Any, tokenizer: Any, question: str) -> str:
    """Greedy, at most 32 tokens."""
    import torch

    chat = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False, use_cache=True,
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    said: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return said.strip()
