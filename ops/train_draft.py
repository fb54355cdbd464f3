"""`warmgate train-draft`: makes what speculative decoding guesses with, out of the model that it is to guess for.

let the model speak (minutes) ─► learn to foresee what it says (minutes) ─► a folder for `engine.speculative.model`
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ops.errors import OperationError

if TYPE_CHECKING:
    from configs.tokenizer import ModelFiles
    from gateway.template import ChatTemplate
    from replicas.engine.loop import BuiltEngine
    from replicas.engine.speculative.training.texts import Text

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_AT_LEAST_1 = click.IntRange(min=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """What the command line says."""

    method: str
    tokens: int
    minutes: float
    layers: int
    draft_vocab: int
    inner: int
    prompts: Path | None
    threads: int
    seed: int


@click.command("train-draft", short_help="Train a drafter for a model.")
@click.argument("model")
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--method", default="mlp_speculator", show_default=True,
              type=click.Choice(["mlp_speculator", "draft_model"]), help="What to train.")  # fmt: skip
@click.option("--tokens", default=60_000, show_default=True, type=click.IntRange(min=1024),
              help="What the model says to learn from.")  # fmt: skip
@click.option("--minutes", default=5.0, show_default=True, type=click.FloatRange(0, min_open=True), help="Of training.")
@click.option("--layers", default=4, show_default=True, type=_AT_LEAST_1, help="draft_model: layers that it keeps.")
@click.option("--draft-vocab", default=8192, show_default=True, type=_AT_LEAST_1, help="Tokens that can be guessed.")
@click.option("--inner", default=1024, show_default=True, type=_AT_LEAST_1, help="mlp_speculator: its inner size.")
@click.option("--prompts", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help='JSON lines with "messages" or "prompt". Default: the model makes them up.')  # fmt: skip
@click.option("--threads", default=1, show_default=True, type=_AT_LEAST_1)
@click.option("--seed", default=0, show_default=True)
def train_draft(model: str, out: Path, **options: Any) -> None:
    """Train a drafter for MODEL (catalogue name or folder) on what MODEL says; write it to OUT.

    \b
    warmgate train-draft smollm2-135m ./head
    warmgate train-draft smollm2-135m ./small --method draft_model --layers 4 --minutes 10
    warmgate serve --set groups.0.engine.speculative.method=mlp_speculator \\
                   --set groups.0.engine.speculative.model=./head
    """
    from configs.runtime import home_dir
    from configs.tokenizer import load_model_files
    from replicas.contract import EngineError

    files = load_model_files(model, home_dir(os.environ))
    if files.path is None:
        raise OperationError(f"{model} has no weights: there is nothing to train on")
    try:
        summary = _train(files, files.path, out, TrainOptions(**options))
    except EngineError as error:
        raise OperationError(str(error)) from error
    click.echo(json.dumps(summary))


def _train(files: ModelFiles, model_dir: Path, out: Path, options: TrainOptions) -> dict[str, Any]:
    from configs.schema import EngineConfig
    from replicas.engine.engine import build_engine
    from replicas.engine.speculative.training.texts import TextPlan, generate

    prompts = _prompts(files, options.prompts)  # first: a mistake in them is told at once
    config = EngineConfig(dtype="float32", threads=options.threads, self_check=False)
    built = build_engine(model_dir, config, "teacher", time.monotonic)
    plan = TextPlan(options.tokens, seed=options.seed)
    texts = generate(built.core, prompts, plan, _say)
    if options.method == "draft_model":
        return _train_model(model_dir, out, texts, options)
    return _train_heads(built, out, texts, options)


def _train_heads(built: BuiltEngine, out: Path, texts: list[Text], options: TrainOptions) -> dict[str, Any]:
    from replicas.engine.runner import TorchRunner
    from replicas.engine.speculative.mlp import MlpSpec, save
    from replicas.engine.speculative.training.heads import HeadPlan, tables, train_heads

    runner = built.core.runner
    assert isinstance(runner, TorchRunner)
    spec = runner.decoder.spec
    sizes = MlpSpec(spec.hidden_size, spec.vocab_size, options.inner, min(options.draft_vocab, spec.vocab_size))
    plan = HeadPlan(seconds=60 * options.minutes, seed=options.seed)
    result = train_heads(texts, *tables(runner.decoder), sizes, plan, progress=_say)
    about = {"agreement": [round(share, 4) for share in result.agreement], "num_batches": result.num_batches}
    save(out, sizes, result.weights, about)
    return {"method": options.method, "out": str(out), **about}


def _train_model(model_dir: Path, out: Path, texts: list[Text], options: TrainOptions) -> dict[str, Any]:
    from replicas.engine.speculative.training.distil import DistilPlan, distil

    plan = DistilPlan(60 * options.minutes, options.layers, options.draft_vocab, seed=options.seed)
    result = distil(model_dir, out, texts, plan, progress=_say)
    for name in _TOKENIZER_FILES:
        if (model_dir / name).is_file():
            shutil.copy(model_dir / name, out / name)
    agreement = {"before": round(result.agreement_before, 4), "after": round(result.agreement, 4)}
    return {"method": options.method, "out": str(out), "agreement": agreement, "num_batches": result.num_batches}


def _prompts(files: ModelFiles, path: Path | None) -> list[list[int]]:
    """Token ids of a file's prompts, or the one beginning after which the model makes up a user's question. Raises
    OperationError for a file that holds none, or anything else."""
    from gateway.errors import BadRequestError
    from gateway.template import ChatTemplate

    template = None
    if files.chat_template is not None:
        names = {"bos_token": files.special.bos_token or "", "eos_token": files.special.eos_token or ""}
        template = ChatTemplate(files.chat_template, names, time.time)
    if path is None:
        if template is None:
            return [[files.special.eos[0] if files.special.bos is None else files.special.bos]]
        whole = template.render([{"role": "user", "content": "\0"}], {}, generation_prompt=False)
        return [files.tokenizer.encode(whole.partition("\0")[0], add_special_tokens=False).ids]
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise OperationError(f"{path} cannot be read: {error}") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompts.append(files.tokenizer.encode(_text(json.loads(line), template), add_special_tokens=False).ids)
        except (ValueError, TypeError, RecursionError, BadRequestError) as error:
            raise OperationError(f"{path}, line {number}: {error}") from error
        if not prompts[-1]:
            raise OperationError(f"{path}, line {number}: the prompt is empty")
    if not prompts:
        raise OperationError(f"{path} has no prompts")
    return prompts


def _text(entry: Any, template: ChatTemplate | None) -> str:
    """The prompt that a line stands for. Raises ValueError, or what the template makes of bad messages."""
    entry = entry if isinstance(entry, dict) else {}
    if template is not None and isinstance(entry.get("messages"), list):
        return template.render(entry["messages"], {}, generation_prompt=True)
    if isinstance(entry.get("prompt"), str):
        return str(entry["prompt"])
    if "messages" in entry and template is None:
        raise ValueError('the model has no chat template for "messages": give a "prompt"')
    raise ValueError('neither "messages" (a list) nor "prompt" (a text)')


def _say(words: str) -> None:
    click.echo(words, err=True)
