"""Profiles: three layers, and every mistake one line that names its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.document import read_file
from configs.errors import ConfigError
from configs.load import PROFILES, load_config, load_profile, setting, shipped_profiles

GOOD = """\
models:
  - id: sim
    source: sim:bytes
groups:
  - name: a
    model: sim
    engine: {kind: sim}
tenants:
  - id: local
    anonymous: true
http:
  port: 8000
"""


@pytest.fixture()
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "p.yaml"
    path.write_text(GOOD)
    return path


def error_of(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, {})
    return str(caught.value).replace(str(path), "p.yaml")


def swapped(old: str, new: str) -> str:
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new)


BAD_PROFILES = {
    "unknown key": (
        swapped("  port: 8000", "  prot: 8000"),
        "p.yaml:12: http.prot: unknown key; did you mean 'port'?",
    ),
    "unknown section": (
        GOOD + "routng:\n  policy: random\n",
        "p.yaml:13: routng: unknown key; did you mean 'routing'?",
    ),
    "unknown key in a list": (
        swapped("    anonymous: true", "    anonymus: true"),
        "p.yaml:10: tenants[0].anonymus: unknown key; did you mean 'anonymous'?",
    ),
    "unknown key like none": (
        swapped("kind: sim", "kind: sim, sim: {zzz: 1}"),
        "p.yaml:7: groups[0].engine.sim.zzz: unknown key; known here: prefill_tokens_per_s, ",
    ),
    "wrong type": (swapped("8000", '"8000"'), "p.yaml:12: http.port: expected int, got '8000'"),
    "wrong kind of section": (swapped("  port: 8000", "  - 1"), "p.yaml:11: http: expected a mapping, got a list"),
    "not a boolean": (swapped("true", "yes"), "p.yaml:10: tenants[0].anonymous: expected bool, got 'yes'"),
    "null where a number belongs": (swapped("8000", "null"), "p.yaml:12: http.port: expected int, got null"),
    "out of range": (swapped("8000", "70000"), "p.yaml:12: http.port: expected int <= 65535, got 70000"),
    "negative time": (
        GOOD + "admission:\n  max_wait_s: -1\n",
        "p.yaml:14: admission.max_wait_s: expected float > 0.0, got -1",
    ),
    "infinite time": (
        GOOD + "admission:\n  max_wait_s: .inf\n",
        "p.yaml:14: admission.max_wait_s: must be a finite number, got .inf",
    ),
    "word not in the list": (
        GOOD + "telemetry:\n  log_level: loud\n",
        "p.yaml:14: telemetry.log_level: expected one of debug, info, warning, error, got 'loud'",
    ),
    "missing key": (swapped("  - id: sim\n    source", "  - source"), "p.yaml:2: models[0].id: missing key"),
    "missing section": (GOOD.partition("tenants")[0], "p.yaml:1: tenants: missing key"),
    "duplicate key": (
        GOOD + "  port: 8001\n",
        "p.yaml:13: http.port: duplicate key, first given in line 12",
    ),
    "duplicate port": (
        GOOD + "redis:\n  url: redis://localhost:8000/0\n",
        "p.yaml:14: redis.url: duplicate port '8000', first given at http.port",
    ),
    "duplicate group": (
        swapped("tenants:", "  - {name: a, model: sim, engine: {kind: sim}}\ntenants:"),
        "p.yaml:8: groups[1].name: duplicate group name 'a', first given at groups[0].name",
    ),
    "bad syntax": (
        GOOD + "  docs: [true\n",
        "p.yaml:14: not valid YAML: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'",
    ),
    "tab": (
        GOOD + "\tdocs: true\n",
        "p.yaml:13: not valid YAML: while scanning for the next token, found character '\\t'",
    ),
    "empty": ("", "p.yaml:1: the profile is empty"),
    "not a mapping": ("- a\n", "p.yaml:1: expected a mapping of sections"),
    "an alias within itself": (
        swapped("  port: 8000", "  port: &p [*p]"),
        "p.yaml:12: http.port[0]: an alias that contains itself",
    ),
    "a Python object": (
        swapped("8000", "!!python/object/apply:os.getpid []"),
        "p.yaml:12: http.port: expected int, got a list",
    ),
    "an unknown tag": (swapped("8000", "!port 8000"), "p.yaml:12: http.port: unknown YAML tag !port"),
    "group without its model": (
        swapped("    model: sim", "    model: simm"),
        "p.yaml:6: groups[0].model: no model 'simm' in this profile; there is: sim",
    ),
    "an API key is not printed": (
        swapped("    anonymous: true", "    key_sha256: [my-secret-key]"),
        "p.yaml:10: tenants[0].key_sha256[0]: expected str matching regex '^[0-9a-f]{64}$'",
    ),
}


@pytest.mark.parametrize("case", BAD_PROFILES)
def test_bad_profile_gives_one_line_with_file_line_key_and_reason(case: str, profile: Path) -> None:
    text, expected = BAD_PROFILES[case]
    found = error_of(profile, text)
    assert "\n" not in found
    if expected.endswith(", ") or "found character" in expected:
        assert found.startswith(expected)
    else:
        assert found == expected
    assert "my-secret" not in found


def test_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^nowhere/p\.yaml: no such file$"):
        load_config("nowhere/p.yaml", {})


def test_unknown_profile_name_suggests_a_shipped_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'quickstart'"):
        load_config("qickstart", {})


@pytest.mark.parametrize("name", shipped_profiles())
def test_every_shipped_profile_is_valid(name: str) -> None:
    assert load_config(name, {}).groups


def test_what_quickstart_shows_in_comments_is_valid_and_the_default(tmp_path: Path) -> None:
    shipped = PROFILES / "quickstart.yaml"
    active, first, commented = shipped.read_text().partition("# routing:\n")
    shown = "".join(line[2:] or "\n" for line in (first + commented).splitlines(keepends=True))
    (tmp_path / "shown.yaml").write_text(active + shown)
    assert load_config(tmp_path / "shown.yaml", {}) == load_config(shipped, {})
    (tmp_path / "sections.yaml").write_text(shown)
    sections = read_file(tmp_path / "sections.yaml").tree
    assert set(sections) == {"routing", "admission", "redis", "ray", "telemetry"}


def test_later_layers_win(profile: Path) -> None:
    env = {"WARMGATE_HTTP__PORT": "8001"}
    assert load_config(profile, {}).http.port == 8000
    assert load_config(profile, env).http.port == 8001
    assert load_config(profile, env, [setting("http.port=8002")]).http.port == 8002


def test_environment_reaches_into_lists_and_makes_sections(profile: Path) -> None:
    env = {
        "WARMGATE_GROUPS__0__REPLICAS": "3",
        "WARMGATE_GROUPS__0__ENGINE__SIM__STEP_BASE_S": "1e-3",
        "WARMGATE_CLUSTER": "8000",
        "WARMGATE_MODELS__0__ALIASES": "one, two",
        "WARMGATE_HTTP__DOCS": "false",
        "WARMGATE_TENANTS__1": "{id: second, keys: [sk-1]}",
    }
    config = load_config(profile, env)
    assert config.groups[0].replicas == 3
    assert config.groups[0].engine.sim.step_base_s == 0.001
    assert config.cluster == "8000"
    assert config.models[0].aliases == ("one", "two")
    assert config.http.docs is False
    assert config.tenants[1].keys == ("sk-1",)


def test_variables_that_are_no_settings_are_left_alone(profile: Path) -> None:
    env = {"WARMGATE_HOME": "/x", "WARMGATE_CLUSTER_SECRET": "s", "WARMGATE_RUN_DIR": "/y", "HTTP__PORT": "1"}
    assert load_config(profile, env) == load_config(profile, {})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("WARMGATE_HTTP__PORT", "x", "http.port: expected int, got 'x'"),
        ("WARMGATE_HTTP__PROT", "1", "http.prot: unknown key; did you mean 'port'?"),
        ("WARMGATE_HTPP__PORT", "1", "htpp: unknown key; did you mean 'http'?"),
        ("WARMGATE_GROUPS__7__NAME", "x", "groups[7]: there is no entry 7: the list has 1"),
        ("WARMGATE_GROUPS__FIRST", "x", "groups.first: groups is a list: expected an index, got 'first'"),
        ("WARMGATE_CLUSTER__NAME", "x", "cluster.name: cluster has no keys below it"),
        ("WARMGATE_ADMISSION__MAX_WAIT_S", "-1", "admission.max_wait_s: expected float > 0.0, got -1"),
        ("WARMGATE_ADMISSION__MAX_WAIT_S", ".nan", "admission.max_wait_s: must be a finite number, got .nan"),
        ("WARMGATE_HTTP", "{prot: 1}", "http.prot: unknown key; did you mean 'port'?"),
        ("WARMGATE_HTTP__PORT", "{a: 1, a: 2}", "a: duplicate key, first given in line 1"),
        ("WARMGATE_GROUPS__0__MODEL", "zzz", "groups[0].model: no model 'zzz' in this profile; there is: sim"),
    ],
)
def test_bad_variable_is_named(name: str, value: str, expected: str, profile: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(profile, {name: value})
    assert str(caught.value) == f"environment variable {name}: {expected}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http.port=0", "--set http.port: http.port: expected int >= 1, got 0"),
        ("groups[0].replicas=0", "--set groups[0].replicas: groups[0].replicas: expected int >= 1, got 0"),
        ("http.port", "--set http.port: expected KEY=VALUE, like http.port=8001"),
        ("=1", "--set =1: expected KEY=VALUE, like http.port=8001"),
        ("http=1", "--set http: http: expected a mapping, got 1"),
    ],
)
def test_bad_flag_is_named(text: str, expected: str, profile: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(profile, {}, [setting(text)])
    assert str(caught.value) == expected


def test_origin_of_every_layer_is_kept(profile: Path) -> None:
    loaded = load_profile(profile, {"WARMGATE_HTTP__HOST": "::1"}, [setting("http.docs=false")])
    assert str(loaded.origin_of(("http", "port"))) == f"{profile}:12"
    assert str(loaded.origin_of(("http", "host"))) == "environment variable WARMGATE_HTTP__HOST"
    assert str(loaded.origin_of(("http", "docs"))) == "--set http.docs"
    assert loaded.origin_of(("http", "keep_alive_s")) is None


def test_a_section_set_whole_forgets_the_lines_it_replaced(profile: Path) -> None:
    loaded = load_profile(profile, {"WARMGATE_HTTP": "{docs: false}"})
    assert loaded.config.http.port == 8000
    assert loaded.origin_of(("http", "port")) is None


def test_words_that_may_be_left_out_are_listed_too(profile: Path) -> None:
    words = error_of(profile, GOOD.replace("{kind: sim}", "{quantization: int3}"))
    assert words.startswith("p.yaml:7: groups[0].engine.quantization: expected one of int8, w8a8,")
    assert words.endswith("gguf, got 'int3'")
