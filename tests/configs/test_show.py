"""`warmgate config show`."""

from __future__ import annotations

import msgspec
import yaml

from configs.load import load_profile, setting
from configs.schema import Config
from configs.show import annotated_yaml


def test_shown_profile_is_the_profile() -> None:
    loaded = load_profile("quickstart", {}, [setting("models.0.aliases=a, b:c, 8000")])
    assert msgspec.convert(yaml.safe_load(annotated_yaml(loaded)), Config) == loaded.config


def test_every_value_has_its_origin() -> None:
    text = annotated_yaml(load_profile("sim", {"WARMGATE_HTTP__DOCS": "false"}, [setting("http.port=8001")]))
    lines = {line.split("#")[0].strip(): line.partition("# ")[2] for line in text.splitlines()}
    assert lines["docs: false"] == "environment variable WARMGATE_HTTP__DOCS"
    assert lines["port: 8001"] == "--set http.port"
    assert lines["host: 127.0.0.1"] == "default"
    assert lines["cluster: sim"].endswith("sim.yaml:3")


def test_keys_and_passwords_are_not_shown() -> None:
    settings = [setting("tenants.0.keys=sk-secret"), setting("redis.url=redis://user:hunter2@host:1/0")]
    text = annotated_yaml(load_profile("sim", {}, settings))
    assert "sk-secret" not in text
    assert "hunter2" not in text
    assert "redis://***@host:1/0" in text
