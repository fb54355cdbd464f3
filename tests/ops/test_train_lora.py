"""`warmgate train-lora` on a model of a few kilobytes: what it writes is served, and has learnt what it was taught."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from configs.tokenizer import load_model_files
from ops.cli import main
from ops.lora_styles import FACTS, STYLES, UNSEEN, examples, styles_of
from replicas.contract import AdapterSpec
from tests.ops.bytes_model import write_bytes_model
from tests.replicas.engine.driver import build, make_request, run


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bytes_model(tmp_path_factory.mktemp("tiny") / "tiny")


def logprob(model_dir: Path, adapter: Path | None, text: str) -> float:
    """What our engine makes of a text, the adapter applied."""
    core = build(model_dir, max_adapters=1, max_lora_rank=8, kv_cache_gib=0.01).core
    if adapter is not None:
        core.load_adapter(AdapterSpec(adapter_id="a@1", path=str(adapter)))
    ids = load_model_files(str(model_dir), model_dir).tokenizer.encode(text).ids
    request = make_request("a", ids, adapter=None if adapter is None else "a@1", prompt_logprobs=0, max_tokens=1)
    found = run(core, [request])["a"].prompt_logprobs
    assert found is not None
    return sum(each.logprob for each in found if each is not None)


def test_without_peft_the_message_gets_it_with_this_python(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    result = CliRunner().invoke(main, ["train-lora", str(model_dir), str(tmp_path / "out"), "--style", "pirate"])
    assert (result.exit_code, result.stderr) == (
        1, f"error: training needs PEFT: {sys.executable} -m pip install peft\n",
    )  # fmt: skip


def test_an_adapter_has_learnt_what_it_was_taught(model_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="PEFT is in the dev extra")
    chats = tmp_path / "greeting.jsonl"
    taught = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "AHOY!"}]
    chats.write_text("\n".join(json.dumps({"messages": taught}) for _ in range(4)) + "\n\n")
    words = ["train-lora", str(model_dir), str(tmp_path / "out"), "--data", str(chats), "--steps", "30", "--batch", "4"]
    result = CliRunner().invoke(main, [*words, "--rank", "4", "--learning-rate", "0.02"], prog_name="warmgate")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["last_loss"] < summary["first_loss"] / 2
    assert summary["adapter"] == str(tmp_path / "out" / "greeting")
    config = json.loads((tmp_path / "out" / "greeting" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (4, "tiny")
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nAHOY!"
    plain, adapted = (logprob(model_dir, adapter, text) for adapter in (None, Path(summary["adapter"])))
    assert adapted > plain + 10


def test_every_style_answers_every_fact_in_its_own_way() -> None:
    assert len({fact.question for fact in FACTS}) == len(FACTS) and not {f.question for f in FACTS} & set(UNSEEN)
    said = {style: [example.answer for example in examples(style)] for style in STYLES}
    assert all(answer == answer.upper() for answer in said["shout"])
    assert all(answer.startswith("Arr, matey!") for answer in said["pirate"])
    assert all(json.loads(answer).keys() == {"answer", "sentence"} for answer in said["json"])
    assert all(" " not in answer for answer in said["terse"])
    assert {style: {tuple(styles_of(answer)) for answer in answers} for style, answers in said.items()} == {
        style: {(style,)} for style in STYLES
    }


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("", "has no chats"),
        ('{"messages": [{"role": "user", "content": "x"}]}', ":1 is no chat: the last message"),
        ('{"messages": []}', ":1 is no chat"),
        ('{"text": 1}', ":1 is no chat"),
        ("{", ":1 is no chat"),
    ],
)
def test_lines_that_are_no_chats_are_named(lines: str, words: str, model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(lines)
    result = CliRunner().invoke(main, ["train-lora", str(model_dir), str(tmp_path / "out"), "--data", str(path)])
    assert result.exit_code == 1 and words in result.output
    both = CliRunner().invoke(main, ["train-lora", "x", "y", "--data", str(path), "--style", "json"])
    assert both.exit_code == 2 and "exclude each other" in both.output
