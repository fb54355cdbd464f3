"""SmolLM2-135M in float32 against transformers: 50 prompts of 1 to 2,000 tokens, under every schedule.

The oracle reads each prompt with its answer once, alone: an answer whose every token is the likeliest one after those
before it is the greedy answer. A long prompt gets fewer output tokens: its answer differs from others in what it reads,
not in how often.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from replicas.contract import GenerateRequest
from tests.replicas.engine.driver import Answer, build, make_request, run

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]

LENGTHS = [
    *(1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 15, 16, 17, 19, 23, 24, 29, 31, 32, 33, 37, 41, 47, 48, 53, 61, 63, 64),
    *(65, 70, 79, 90, 96, 111, 127, 128, 129, 150, 180, 200, 255, 256, 257, 400, 513, 777, 1024, 2000),
]
TEXT = (
    "the river town keeps old bread warm near every small lamp while seven quiet boats carry salt and paper across "
    "a cold bright harbour because nobody in winter counts letters before rain begins to fall on green stone"
)
WORDS = TEXT.split()


class Oracle:
    """What transformers gives: the logprobs of the raw distribution at each token of an answer."""

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]]) -> None:
        self._model = model
        self._prompts = prompts
        self._read: dict[tuple[int, ...], torch.Tensor] = {}

    def logprobs(self, number: int, tokens: list[int]) -> torch.Tensor:
        """[len(tokens), vocab] after prompt `number`; read once for all tests, as their answers are the same."""
        key = (number, *tokens)
        if key not in self._read:
            ids = torch.tensor([self._prompts[number] + tokens[:-1]])
            num_threads = torch.get_num_threads()  # which the engine has set to its own
            torch.set_num_threads(os.cpu_count() or 1)
            with torch.inference_mode():
                logits = self._model(ids, logits_to_keep=len(tokens)).logits[0]
            torch.set_num_threads(num_threads)
            self._read[key] = torch.log_softmax(logits.float(), dim=-1)
        return self._read[key]


@pytest.fixture(scope="session")
def model_dir() -> Path:
    home = Path(os.environ.get("WARMGATE_HOME", Path.home() / ".cache" / "warmgate"))
    folder = home / "models" / "smollm2-135m"
    if not (folder / "config.json").is_file():
        pytest.skip(f"SmolLM2 is not in {folder}: `warmgate models pull smollm2-135m` gets it")
    return folder


def prose(rng: random.Random) -> str:
    """Sentences and lists that differ everywhere, so that no two prompts share much."""
    kind = rng.choice(["sentence", "sum", "list"])
    if kind == "sum":
        a, b = rng.randrange(100), rng.randrange(100)
        return f"{a} + {b} = {a + b}. "
    words = rng.choices(WORDS, k=rng.randrange(5, 12))
    return ", ".join(words) + ".\n" if kind == "list" else " ".join(words).capitalize() + ". "


@pytest.fixture(scope="session")
def prompts(model_dir: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    prompts = []
    for seed, length in enumerate(LENGTHS):
        rng, ids = random.Random(seed), list[int]()
        while len(ids) < length:
            ids += tokenizer.encode(prose(rng), add_special_tokens=False).ids
        prompts.append(ids[:length])
    return prompts


def num_output(prompt: list[int]) -> int:
    return 8 if len(prompt) <= 260 else 4


@pytest.fixture(scope="session")
def oracle(model_dir: Path, prompts: list[list[int]]) -> Oracle:
    return Oracle(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval(), prompts)


def requests(prompts: list[list[int]]) -> list[GenerateRequest]:
    return [make_request(str(i), p, max_tokens=num_output(p), logprobs=5) for i, p in enumerate(prompts)]


def check(answers: dict[str, Answer], oracle: Oracle) -> None:
    """Identical tokens; logprobs, the sampled and the five likeliest, within 1e-3."""
    for name, answer in answers.items():
        number = int(name)
        expected = oracle.logprobs(number, answer.tokens)
        assert answer.tokens == expected.argmax(dim=-1).tolist(), f"prompt of {LENGTHS[number]} tokens"
        assert len(answer.tokens) == (8 if LENGTHS[number] <= 260 else 4)
        for given, raw in zip(answer.logprobs, expected, strict=True):
            for token_id, logprob in ((given.token_id, given.logprob), *given.top):
                assert logprob == pytest.approx(raw[token_id].item(), abs=1e-3)


@pytest.mark.slow
def test_greedy_tokens_of_prompts_alone_equal_transformers(
    model_dir: Path, prompts: list[list[int]], oracle: Oracle
) -> None:
    core = build(model_dir, prefix_caching=False, max_num_batched_tokens=2048).core
    for request in requests(prompts):
        check(run(core, [request]), oracle)


@pytest.mark.parametrize("kernels", ["auto", pytest.param("none", marks=pytest.mark.slow)])
def test_greedy_tokens_of_mixed_batches_in_chunks_and_from_the_cache_equal_transformers(
    kernels: str, model_dir: Path, prompts: list[list[int]], oracle: Oracle
) -> None:
    core = build(model_dir, max_num_seqs=16, max_num_batched_tokens=192, kernels=kernels).core
    check(run(core, requests(prompts)), oracle)
    warm = run(core, requests(prompts)[::-1])
    check(warm, oracle)
    # A prompt of whole blocks is found whole; its last token is computed all the same, to have logits.
    whole = [len(p) - 1 if len(p) % 16 == 0 else len(p) // 16 * 16 for p in prompts]
    assert [warm[str(i)].num_cached for i in range(len(prompts))] == whole


@pytest.mark.parametrize(
    ("longest", "num_blocks", "prefix_caching"),
    [
        pytest.param(64, 25, False, marks=pytest.mark.slow),
        pytest.param(64, 25, True, marks=pytest.mark.slow),
        (260, 90, True),
    ],
)
def test_greedy_tokens_of_preempted_requests_equal_transformers(
    longest: int,
    num_blocks: int,
    prefix_caching: bool,
    model_dir: Path,
    prompts: list[list[int]],
    oracle: Oracle,
) -> None:
    chosen = [request for request in requests(prompts) if request.num_prompt_tokens <= longest]
    block_bytes = 30 * 4 * 2 * 3 * 64 * 4
    room = num_blocks * block_bytes / 2**30
    core = build(model_dir, block_size=4, prefix_caching=prefix_caching, kv_cache_gib=room).core
    check(run(core, chosen), oracle)
    assert core.scheduler.num_preemptions > 0


def test_bfloat16_answers_the_capital_of_france(model_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    engine = build(model_dir, dtype="bfloat16", self_check=True)
    request = make_request("a", tokenizer.encode(text).ids, max_tokens=20, ignore_eos=False)
    answer = run(engine.core, [request])["a"]
    assert tokenizer.decode(answer.tokens) == "The capital of France is Paris."
    assert answer.finish_reason == "stop" and engine.facts.self_check.startswith("passed")
