"""What `warmgate explain` prints, from an explanation at hand."""

from __future__ import annotations

import io
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from rich.console import Console

from gateway.decisions import Explanation, ShownCandidate, ShownDecision
from ops.cli import main
from ops.explain import WIDTH, show
from routing.types import TERMS as ALL_TERMS

TERMS = {"queue": 0.0125, "decode": 0.001, "crowding": 0.002, "prefill": 0.25, "adapter": 0.0, "harm": 0.5}
FOUND = Explanation(
    request_id="wg00000001-0123456789abcdef01234567",
    ingress_id="wg00000001",
    tenant="team [a]",
    model="m",
    adapter="tuned@2",
    decisions=(
        ShownDecision(0, 1, 1_800_000_000.0, "warm", "replica-with-a-long-name-1", "least expected wait", 4096, (
            ShownCandidate("replica-with-a-long-name-0", 128, "absent", 2.5, {**TERMS, "adapter": 1.75}),
            ShownCandidate("replica-with-a-long-name-1", 2048, "resident", 0.7655, TERMS),
            ShownCandidate("[red]", filtered="breaker open", adapter="absent"),
        )),
        ShownDecision(0, 2, 1_800_000_001.0, "warm", None, "no replica can take it", 4096, (
            ShownCandidate("replica-with-a-long-name-1", filtered="failed this request"),
        )),
    ),
    num_left_out=3,
)  # fmt: skip


def printed(**options: object) -> str:
    out = io.StringIO()
    show(FOUND, Console(file=out, width=WIDTH, highlight=False, **options))  # type: ignore[arg-type]
    return out.getvalue()


def test_a_row_a_candidate_a_column_a_term_and_the_winner_marked_first() -> None:
    lines = printed().splitlines()
    assert lines[0] == "wg00000001-0123456789abcdef01234567  model m, adapter tuned@2, tenant team [a]"
    start = next(i for i, line in enumerate(lines) if line.split()[:2] == ["replica", "cached"])
    assert lines[start].split() == ["replica", "cached", "has", "adapter", *TERMS, "cost", "left", "out"]
    assert lines[start + 1].split() == [
        "→", "replica-with-a-long-name-1", "2048", "resident", "12.5", "1.0", "2.0", "250.0", "0.0", "500.0", "765.5",
    ]  # fmt: skip
    assert lines[start + 2].split()[0] == "replica-with-a-long-name-0" and lines[start + 2].split()[-1] == "2500.0"
    assert lines[start + 3].split() == ["[red]", "0", "absent", "breaker", "open"], "no number for what was not weighed"
    assert any("attempt 2" in line and line.endswith("nobody") for line in lines)
    assert lines[-1] == "and 3 decisions more"


def test_a_footnote_tells_what_the_columns_count() -> None:
    text = printed()
    assert "Terms and cost in ms" in text and "docs/policies.md" in text
    assert "x-warmgate-cached-tokens" in text
    assert text.count("Cached: ") == 1, "once below all tables"


def test_nobody_left_out_no_column_for_it() -> None:
    weighed = msgspec.structs.replace(FOUND.decisions[0], candidates=FOUND.decisions[0].candidates[:2])
    out = io.StringIO()
    show(msgspec.structs.replace(FOUND, decisions=(weighed,)), Console(file=out, width=WIDTH, highlight=False))
    assert "has adapter" in out.getvalue() and "left out" not in out.getvalue()


def test_every_term_is_explained_where_the_footnote_says() -> None:
    page = (Path(__file__).parents[2] / "docs" / "policies.md").read_text()
    assert [term for term in ALL_TERMS if f"\n| `{term}` |" not in page] == []


def test_nothing_is_cut_off_and_lines_are_as_long_as_they_need() -> None:
    assert "…" not in printed()
    assert 100 < max(map(len, printed().splitlines())) < 200


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in printed(force_terminal=True) and "\x1b[4" not in printed(force_terminal=True)


def test_no_gateway_comes_with_how_to_start_one() -> None:
    done = CliRunner().invoke(main, ["explain", "x", "--url", "http://127.0.0.1:9"])
    assert (done.exit_code, done.output) == (
        1, "error: no gateway at http://127.0.0.1:9; start one with: warmgate serve\n",
    )  # fmt: skip


@pytest.mark.parametrize("url", ["nonsense", "http://"])
def test_an_address_without_a_gateway_is_one_line(url: str) -> None:
    done = CliRunner().invoke(main, ["explain", "x", "--url", url])
    assert done.exit_code == 1
    assert done.output.startswith("error: no gateway at") and done.output.count("\n") == 1
