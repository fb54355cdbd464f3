import dataclasses
import os
import resource
import socket
from pathlib import Path

import msgspec
import pytest
import yaml

import configs
from configs.runtime import Runtime
from configs.schema import Config
from ops import ray_cluster
from ops.ray_cluster import RayPorts, plan_cluster

SIM = yaml.safe_load((Path(configs.__file__).parent / "sim.yaml").read_text())


def profile(**sections) -> Config:
    return msgspec.convert({**SIM, **sections}, Config)


def runtime(config: Config) -> Runtime:
    return Runtime.from_config(config, {}, os.urandom)


def ports(first: int = 1) -> RayPorts:
    return RayPorts(*range(first, first + 6))


def plan(config: Config, which: RayPorts | None = None):
    return plan_cluster(config, runtime(config), which or ports())


def test_every_socket_path_fits_in_107_bytes_even_with_a_long_uid_and_port(monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 4294967294)
    planned = plan(profile(http={"port": 65535}))
    ray_socket = "session_2026-11-21_04-08-05_773695_4194304/sockets/plasma_store"
    assert len(os.fsencode(planned.folder / ray_socket)) <= 107
    if "RAY_SERVE_HAPROXY_SOCKET_PATH" in planned.env:
        admin = Path(planned.env["RAY_SERVE_HAPROXY_SOCKET_PATH"])
        node_id = "f" * 56
        assert len(os.fsencode(admin.parent / node_id / f"{admin.name}.4194304.tmp")) <= 107


def test_two_instances_share_no_path_and_no_port():
    one = plan(profile(http={"port": 8001}), ports(100)).env
    two = plan(profile(http={"port": 8002}), ports(200)).env
    own = [key for key in one if key.endswith(("_PORT", "_PATH", "_LOC", "_BASE", "_FILE")) and "IMPORT" not in key]
    assert len(own) >= 12 or not ray_cluster.uses_haproxy(profile())
    assert [key for key in own if one[key] == two[key]] == []


def test_haproxy_off_keeps_throughput_mode_without_direct_ingress():
    env = plan(profile(ray={"haproxy": "off"})).env
    assert env["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
    assert env["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
    assert env["RAY_SERVE_ENABLE_DIRECT_INGRESS"] == "0"
    assert not any(key.startswith("RAY_SERVE_HAPROXY") for key in env)


def test_ray_advertises_what_the_profile_reserves_when_the_machine_has_less(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    group = {**SIM["groups"][0], "replicas": 6, "resources": {"num_cpus": 1}}
    config = profile(groups=[group], http={"ingress_replicas": 2})
    assert plan(config).num_cpus == 7
    assert plan(profile()).num_cpus == 2


@pytest.mark.parametrize(
    ("max_files", "expected"), [(resource.RLIM_INFINITY, 8192), (20000, 7897), (1024, 307), (0, 64)]
)
def test_haproxys_connections_fit_the_file_limit(max_files, expected):
    assert ray_cluster.max_connections(profile(), max_files) == expected


def test_drawn_ports_are_free_and_different():
    drawn = RayPorts.draw()
    single = [drawn.haproxy_metrics, drawn.haproxy_stats, drawn.fallback_proxy, drawn.autoscaler_metrics]
    assert len({*single, drawn.dashboard_metrics, drawn.ingress}) == 6
    for port in single:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", port))


def test_a_taken_port_is_named_and_one_in_time_wait_is_not_taken():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        config = profile(http={"port": port})
        assert ray_cluster.port_problem(config) == f"port {port} of 127.0.0.1 is in use"
        client = socket.create_connection(("127.0.0.1", port))
        server, _ = listener.accept()
        server.close()  # closes first: its end of the connection waits in TIME_WAIT
        client.close()
    assert ray_cluster.port_problem(config) is None


def test_an_address_of_another_machine_is_a_problem():
    problem = ray_cluster.port_problem(profile(http={"host": "192.0.2.1", "port": 8000}))
    assert problem == "cannot listen on port 8000 of 192.0.2.1: Cannot assign requested address"


def test_the_token_is_private_and_new_at_each_start(tmp_path):
    planned = dataclasses.replace(plan(profile()), folder=tmp_path / "wg" / "ray")
    (tmp_path / "wg").mkdir()
    env = {**planned.env, "RAY_SERVE_HAPROXY_BINARY_PATH": str(planned.folder / "h" / "haproxy")}
    planned = dataclasses.replace(planned, env=env if ray_cluster.uses_haproxy(profile()) else planned.env)
    tokens = set()
    for _ in range(2):
        ray_cluster.prepare_folder(planned)
        (planned.folder / "leftover").mkdir()
        assert planned.token_file.stat().st_mode & 0o777 == 0o600
        assert planned.folder.stat().st_mode & 0o777 == 0o700
        tokens.add(planned.token_file.read_text())
    assert len(tokens) == 2
    ray_cluster.prepare_folder(planned)
    assert not (planned.folder / "leftover").exists()
