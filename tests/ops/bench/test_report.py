"""What a benchmark leaves behind: the line for machines, the tables for people, its section of the page."""

from __future__ import annotations

import datetime
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from ops.bench.harness import Goal, Sample, Samples
from ops.bench.report import Report, command_line, describe_machine, package_versions, record


def made(num_repeats: int = 5, notes: tuple[str, ...] = ("B is slow",)) -> Report:
    ours: list[Sample] = [{"tok/s": 10.0 + i, "TTFT ms": 5.0} for i in range(num_repeats)]
    theirs: list[Sample] = [{"tok/s": 5.0} for _ in range(num_repeats)]
    samples = Samples({"ours": ours, "their|s": theirs})
    ratios = [
        samples.ratio("tok/s", "ours", "their|s", Goal.at_least(2.0)),
        samples.ratio("tok/s", "their|s", "ours", Goal.at_least(2.0)),
        samples.ratio("tok/s", "ours", "ours"),
    ]
    command = ["warmgate", "bench", "engine", "--model", "a b"]
    day = datetime.date(2026, 11, 21)
    table = (["K", "measured"], [["1", "1.5"], ["2", "1.8"]])
    return Report("engine", "Engine: a test", samples, ratios, {"threads": 1}, notes, [table], command, date=day)


def shown(report: Report, width: int = 200) -> str:
    written = io.StringIO()
    report.show(Console(width=width, file=written))
    return written.getvalue()


def test_json_line_is_one_line_with_everything_that_repeats_and_judges_the_run() -> None:
    line = made().json_line()
    assert "\n" not in line
    found = json.loads(line)
    assert list(found) == [
        *("benchmark", "date", "machine", "versions", "command", "repeats", "sides", "ratios"),
        *("tables", "facts", "notes"),
    ]
    assert found["tables"] == [[{"K": "1", "measured": "1.5"}, {"K": "2", "measured": "1.8"}]]
    assert (found["benchmark"], found["date"], found["repeats"]) == ("engine", "2026-11-21", 5)
    assert found["command"] == "warmgate bench engine --model 'a b'"
    assert found["sides"] == {
        "ours": {
            "tok/s": {"median": 12.0, "low": 10.0, "high": 14.0, "num": 5},
            "TTFT ms": {"median": 5.0, "low": 5.0, "high": 5.0, "num": 5},
        },
        "their|s": {"tok/s": {"median": 5.0, "low": 5.0, "high": 5.0, "num": 5}},
    }
    assert found["ratios"][0] == {
        **{"metric": "tok/s", "side": "ours", "against": "their|s"},
        **{"median": 2.4, "low": 2.0, "high": 2.8, "num": 5},
        **{"goal": "≥ 2", "reached": True},
    }
    assert found["ratios"][1]["reached"] is False
    assert "goal" not in found["ratios"][2] and "reached" not in found["ratios"][2]
    assert (found["facts"], found["notes"]) == ({"threads": 1}, ["B is slow"])


def test_machine_and_versions_say_where_the_figures_come_from() -> None:
    found = json.loads(made().json_line())
    assert found["machine"] == describe_machine()
    assert " cores, " in found["machine"] and "GiB" in found["machine"] and "Python 3." in found["machine"]
    assert found["versions"] == package_versions()
    assert {"torch", "msgspec"} <= set(found["versions"])


def test_side_without_samples_reports_no_figures() -> None:
    report = Report("engine", "t", Samples({"ours": [{"rate": 1.0}], "gone": []}))
    assert report.as_json()["sides"]["gone"] == {}
    assert report.num_repeats == 0
    assert "smoke run" in report.markdown()


def test_tables_show_each_metric_of_each_side_and_whether_goals_were_reached() -> None:
    text = shown(made())
    [rate] = [line for line in text.splitlines() if "tok/s" in line and "÷" not in line]
    assert "12 (10 to 14)" in rate and "5 (5 to 5)" in rate
    verdicts = [line for line in text.splitlines() if "÷" in line]
    assert "reached" in verdicts[0] and "missed" in verdicts[1]
    assert "reached" not in verdicts[2] and "missed" not in verdicts[2]
    assert "• B is slow" in text


def test_brackets_in_a_note_are_shown_as_they_are() -> None:
    assert "• get it: pip install warmgate[vllm]" in shown(made(notes=("get it: pip install warmgate[vllm]",)))


def table_rows(markdown: str) -> list[list[str]]:
    """The cells of every table line; a `\\|` is no border."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    rows = [line.replace("\\|", "\0").strip("|").split("|") for line in lines]
    return [[cell.strip().replace("\0", "|") for cell in row] for row in rows]


def test_markdown_has_a_table_of_figures_one_of_ratios_and_others() -> None:
    section = made().markdown()
    assert section.startswith("## Engine: a test\n\n2026-11-21, ")
    assert "```\nwarmgate bench engine --model 'a b'\n```" in section
    assert table_rows(section) == [
        ["median (lowest to highest)", "ours", "their|s"],
        ["---", "---", "---"],
        ["tok/s", "12 (10 to 14)", "5 (5 to 5)"],
        ["TTFT ms", "5 (5 to 5)", ""],
        ["ratio", "metric", "measured", "goal", ""],
        ["---", "---", "---", "---", "---"],
        ["ours ÷ their|s", "tok/s", "2.4 (2 to 2.8)", "≥ 2", "reached"],
        ["their|s ÷ ours", "tok/s", "0.4167 (0.3571 to 0.5)", "≥ 2", "missed"],
        ["ours ÷ ours", "tok/s", "1 (1 to 1)", "", ""],
        ["K", "measured"],
        ["---", "---"],
        ["1", "1.5"],
        ["2", "1.8"],
    ]
    assert "- B is slow" in section
    assert section.endswith('`{"threads":1}`')


@pytest.mark.parametrize(("num_repeats", "smoke"), [(4, True), (5, False)])
def test_markdown_says_when_there_were_too_few_repeats(num_repeats: int, smoke: bool) -> None:
    assert ("Fewer than 5 repeats" in made(num_repeats).markdown()) is smoke


def test_recording_starts_a_page_and_appends_what_it_does_not_have(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "benchmarks.md"
    record(page, "kv", "## KV\n\none")
    record(page, "engine", "## Engine\n\ntwo")
    assert page.read_text() == (
        "# Benchmarks\n\n<!-- bench:kv -->\n## KV\n\none\n<!-- /bench:kv -->\n\n"
        "<!-- bench:engine -->\n## Engine\n\ntwo\n<!-- /bench:engine -->\n"
    )


def test_recording_again_replaces_the_section_in_place_and_keeps_the_rest(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    for name in ("kv", "engine", "gateway"):
        record(page, name, f"old {name}")
    page.write_text(page.read_text().replace("# Benchmarks\n", "# Benchmarks\n\nBy hand.\n") + "\nAn end by hand.\n")
    before = page.read_text()
    record(page, "engine", r"new \1 \g<0> engine")
    assert page.read_text() == before.replace("old engine", r"new \1 \g<0> engine")


def test_recorded_section_is_what_the_report_says(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    record(page, "engine", made().markdown())
    record(page, "engine", made().markdown())
    assert page.read_text().count("## Engine: a test") == 1
    assert made().markdown() in page.read_text()


def test_the_command_of_a_report_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text("")
    words = command_line([str(tmp_path / "cli.py"), "bench", "routing", "--trace", str(trace), "--load", "0.5"])
    assert words == ["warmgate", "bench", "routing", "--trace", "trace.jsonl", "--load", "0.5"]
    assert command_line(["cli.py", "bench", "--head", str(tmp_path)]) == ["warmgate", "bench", "--head", tmp_path.name]


def test_a_report_may_be_one_table() -> None:
    report = Report("t", "Title", Samples({}), tables=[(["K", "measured"], [["1", "1.5"]])], repeats=5)
    assert json.loads(report.json_line())["repeats"] == 5
    assert "| K | measured |\n| --- | --- |\n| 1 | 1.5 |" in report.markdown()
    assert "smoke" not in report.markdown() and "median" not in report.markdown()
    assert "measured" in shown(report) and "median" not in shown(report)


def test_the_command_that_repeats_a_run_holds_nobodys_keys() -> None:
    words = [
        "warmgate",
        "tune",
        "--set",
        "tenants=[{id: a, keys: [sk-secret]}]",
        "--set",
        "tenants.0.keys=[sk-x]",
        "--minutes",
        "3",
    ]
    shown = command_line(words)
    assert shown == ["warmgate", "tune", "--set", "tenants=…", "--set", "tenants.0.keys=…", "--minutes", "3"]
