"""`warmgate explain`: why a request went where it went, as its gateway tells it."""

from __future__ import annotations

import json
from datetime import datetime
from urllib.parse import quote

import click
import httpx
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gateway.decisions import Explanation, ShownCandidate, ShownDecision
from ops.errors import OperationError

TIMEOUT_S = 10.0
WIDTH = 1000
"""Lines are as long as they need: a term that a narrow window cut off would be no explanation."""

FOOTNOTE = """\
Terms and cost in ms: what each means is in docs/policies.md.
Cached: prompt tokens in whole routing blocks, as the ingress knew them when it decided; the replica's own count, in
smaller blocks, is in the header x-warmgate-cached-tokens."""


class ExplainError(OperationError):
    """The gateway cannot be asked, or does not know."""


@click.command(short_help="Show why a request went where it went.")
@click.argument("request_id")
@click.option("--url", envvar="WARMGATE_URL", help="The gateway [default: the one running here, or port 8000].")
@click.option("--key", envvar="WARMGATE_API_KEY", help="API key [environment: WARMGATE_API_KEY].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def explain(request_id: str, url: str | None, key: str | None, as_json: bool) -> None:
    """Show why a request went where it went: each replica that was weighed, in seconds by term, the winner marked.

    REQUEST_ID is what `x-request-id` said, or the id of the answer; with -0, -1, … for one choice alone. Any gateway
    process of the instance can be asked.

    \b
    warmgate explain chatcmpl-wg5f1c09aa-5bd1c1e0a1b2c3d4e5f60718
    warmgate explain wg5f1c09aa-5bd1c1e0a1b2c3d4e5f60718-0 --json
    """
    from ops.cli import running_url

    raw = fetch(url or running_url(), key, request_id)
    if as_json:
        click.echo(json.dumps(json.loads(raw), indent=2))
        return
    try:
        found = msgspec.json.decode(raw, type=Explanation)
    except msgspec.DecodeError as error:
        raise ExplainError(f"that gateway is of another version: {error}") from error
    show(found, Console(highlight=False, width=WIDTH))


def fetch(url: str, key: str | None, request_id: str) -> bytes:
    """The explanation as JSON. Raises ExplainError."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    path = f"/v1/routing/decisions/{quote(request_id, safe='')}"
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT_S, trust_env=False) as http:
            answer = http.get(path)
    except httpx.ConnectError as error:
        refused = "refused" in str(error)
        advice = "; start one with: warmgate serve" if refused else f": {error}"
        raise ExplainError(f"no gateway at {url}{advice}") from error
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise ExplainError(f"no gateway at {url}: {error or type(error).__name__}") from error
    if answer.status_code != 200:
        raise ExplainError(_refusal(answer))
    return answer.content


def show(found: Explanation, console: Console) -> None:
    """A table a decision: a row a candidate, the winner marked and first, then by cost; a column a term."""
    adapter = f", adapter {found.adapter}" if found.adapter else ""
    console.print(f"{found.request_id}  model {found.model}{adapter}, tenant {found.tenant}", markup=False)
    for decision in found.decisions:
        console.print()
        console.print(_title(decision), markup=False)
        console.print(_table(decision))
    console.print(f"\n{FOOTNOTE}", style="dim")
    if found.num_left_out:
        console.print(f"\nand {found.num_left_out} decisions more")


def _title(decision: ShownDecision) -> str:
    at = datetime.fromtimestamp(decision.time).astimezone().isoformat(" ", "milliseconds")
    winner = "nobody" if decision.replica_id is None else decision.replica_id
    return (
        f"choice {decision.choice}, attempt {decision.attempt}, {at}: {winner}\n"
        f"{decision.num_prompt_tokens} prompt tokens, policy {decision.policy}: {decision.reason or 'no reason given'}"
    )


def _table(decision: ShownDecision) -> Table:
    terms = list(dict.fromkeys(term for candidate in decision.candidates for term in candidate.terms_s))
    with_adapter = any(candidate.adapter is not None for candidate in decision.candidates)
    anybody_left_out = any(candidate.filtered is not None for candidate in decision.candidates)
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    table.add_column("replica", no_wrap=True)
    table.add_column("cached", justify="right", no_wrap=True)
    if with_adapter:
        table.add_column("has adapter", no_wrap=True)
    for term in (*terms, "cost"):
        table.add_column(term, justify="right", no_wrap=True)
    if anybody_left_out:
        table.add_column("left out", no_wrap=True)
    for candidate in _ranked(decision):
        won = candidate.replica_id == decision.replica_id
        cells = ["→" if won else "", candidate.replica_id, str(candidate.matched_tokens)]
        if with_adapter:
            cells.append(candidate.adapter or "")
        cells += _costs(candidate, terms)
        if anybody_left_out:
            cells.append(candidate.filtered or "")
        table.add_row(*map(escape, cells), style="bold" if won else "")
    return table


def _ranked(decision: ShownDecision) -> list[ShownCandidate]:
    return sorted(
        decision.candidates, key=lambda c: (c.replica_id != decision.replica_id, c.filtered is not None, c.cost_s)
    )


def _costs(candidate: ShownCandidate, terms: list[str]) -> list[str]:
    """Milliseconds by term and in all; nothing for one that was not weighed."""
    if candidate.filtered is not None:
        return [""] * (len(terms) + 1)
    return [*(_ms(candidate.terms_s.get(term, 0.0)) for term in terms), _ms(candidate.cost_s)]


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f}"


def _refusal(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"that is no gateway of ours: it answers {answer.status_code}"
