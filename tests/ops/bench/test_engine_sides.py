"""`bench engine` apart from its engines: what is asked, how answers are compared, what a burst reports."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from ops.bench.contestants.wire import Burst
from ops.bench.engine import REFERENCE, Contestant, Workload, agreements, section
from ops.bench.harness import BenchError

PLAIN = Workload(Path("model"), levels=(1, 4, 16), num_prompt_tokens=12)


def side(name: str, *answers: list[int], workload: Workload = PLAIN) -> Contestant:
    """A contestant that has made one visit and answered so."""
    return Contestant(name, (), workload, 1, answers=[list(answers)])


def test_prompts_are_the_same_for_every_side_and_new_at_every_visit() -> None:
    assert PLAIN.prompts(1, 4) == PLAIN.prompts(1, 4)
    drawn = [tuple(p) for visit, level in itertools.product((1, 2), (1, 4, 16)) for p in PLAIN.prompts(visit, level)]
    assert len(set(drawn)) == len(drawn) == 42


def test_shared_prefix_is_alike_in_all_prompts_and_the_rest_is_not() -> None:
    workload = Workload(Path("model"), num_prompt_tokens=12, shared_prefix=8)
    prompts = workload.prompts(1, 4) + workload.prompts(2, 4)
    assert {len(prompt) for prompt in prompts} == {12}
    assert len({tuple(prompt[:8]) for prompt in prompts}) == 1
    assert len({tuple(prompt[8:]) for prompt in prompts}) == 8


def test_shared_prefix_longer_than_the_prompt_is_cut_to_it() -> None:
    assert {len(p) for p in Workload(Path("model"), num_prompt_tokens=12, shared_prefix=99).prompts(1, 2)} == {12}


@pytest.mark.parametrize(("levels", "expected"), [((1, 4, 16, 32), 4), ((1, 2), 2), ((8, 16), 8)])
def test_answers_are_compared_at_a_level_that_every_side_runs(levels: tuple[int, ...], expected: int) -> None:
    assert Workload(Path("model"), levels=levels).reference_level == expected


def test_agreement_is_the_share_of_tokens_before_the_first_that_differs() -> None:
    reference = side(REFERENCE, [1, 2, 3, 4], [5, 6, 7, 8])
    assert agreements([side("ours", [1, 2, 3, 4], [5, 6, 0, 8]), reference], PLAIN) == {"ours": 0.75}


def test_side_that_answers_nonsense_in_float32_ends_the_measurement() -> None:
    nonsense = side("fast", [9, 2, 3, 4])
    with pytest.raises(BenchError, match=r"\{'fast': 0.0\}"):
        agreements([side(REFERENCE, [1, 2, 3, 4]), nonsense], PLAIN)


def test_agreement_in_bfloat16_is_reported_and_ends_nothing() -> None:
    workload = Workload(Path("model"), dtype="bfloat16")
    assert agreements([side(REFERENCE, [1, 2]), side("rounded", [3, 2])], workload) == {"rounded": 0.0}


def test_without_the_reference_nothing_is_compared() -> None:
    assert agreements([side("ours", [1])], PLAIN) == {}


def test_unusual_settings_get_a_section_of_their_own() -> None:
    folder = Path("model")
    settings = (PLAIN, Workload(folder, dtype="bfloat16", threads=2), Workload(folder, shared_prefix=64))
    assert [section(workload) for workload in settings] == ["engine", "engine-bfloat16-2-threads", "engine-shared-64"]


def test_burst_reports_times_from_its_start_and_refuses_a_short_answer() -> None:
    burst = Burst([[1], [2]], max_tokens=3)
    for at_s, token_id in ((0.5, 7), (1.0, 8), (1.5, 9)):
        burst.came(0, [token_id], at_s)
    burst.came(1, [4, 5], 2.0)
    with pytest.raises(ValueError, match=r"asked for 3 tokens each, got \[3, 2\]"):
        burst.result()
    burst.came(1, (6,), 3.0)
    assert burst.result() == {
        "wall_s": 3.0,
        "num_tokens": 6,
        "tokens": [[7, 8, 9], [4, 5, 6]],
        "ttft_s": [0.5, 2.0],
        "tpot_s": [0.5, 0.5],
    }
