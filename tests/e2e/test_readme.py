"""What the README tells people to paste, pasted: only the port is another."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import MODEL, Stack

README = Path(__file__).parents[2] / "README.md"
ADDRESS = "http://127.0.0.1:8000"


def pasted(language: str, beginning: str, url: str) -> str:
    """The one block of a language that begins so, with the stack's address."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if block.startswith(beginning)]
    assert block.count(ADDRESS) == 1, block
    return block.replace(ADDRESS, url)


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.ray
@pytest.mark.model
def test_the_curl_of_the_readme_is_answered(stack: Stack) -> None:
    answer = json.loads(run("bash", "-c", pasted("sh", "curl ", stack.url)))
    (choice,) = answer["choices"]
    assert (answer["object"], answer["model"]) == ("chat.completion", MODEL)
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"].strip()  # sampled: words, but who knows which
    assert choice["finish_reason"] in ("stop", "length")
    assert answer["usage"]["completion_tokens"] > 0


@pytest.mark.ray
@pytest.mark.model
def test_the_openai_client_of_the_readme_prints_a_story(stack: Stack) -> None:
    printed = run(sys.executable, "-c", pasted("python", "from openai import OpenAI\n", stack.url))
    assert len(printed.split()) >= 5, printed


def test_the_readmes_first_requests_name_the_served_model_at_the_default_address() -> None:
    for language, beginning in (("sh", "curl "), ("python", "from openai import OpenAI\n")):
        block = pasted(language, beginning, ADDRESS)
        assert f'"{MODEL}"' in block
        assert re.search(r"temperature\W+0\.2\b", block), "as `warmgate chat`: hotter, a small model talks nonsense"
