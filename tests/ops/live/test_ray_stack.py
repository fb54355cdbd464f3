"""A running instance: what answers, where it listens, what it survives. One real Ray for all tests of this file."""

import itertools
import sys
import threading
import time
from pathlib import Path

import grpc
import httpx
import pytest

from ops.instance import find_instances
from tests.ops.ray_stack import Stack, eventually, listens, text_of

pytestmark = [pytest.mark.ray, pytest.mark.skipif(not sys.platform.startswith("linux"), reason="HAProxy mode")]


def test_chat_is_answered_whole_and_streamed_alike(stack: Stack):
    whole = stack.chat(seed=1, temperature=0)
    assert whole.status_code == 200
    with stack.stream(seed=1, temperature=0) as payloads:
        streamed = list(payloads)
    assert streamed[-1] == "[DONE]"
    assert text_of(streamed) == whole.json()["choices"][0]["message"]["content"]


def test_every_port_is_on_loopback_and_channels_are_unix_sockets(stack: Stack):
    """Serve's own gRPC server between deployments binds all interfaces; it asks for Ray's token."""
    allowed = {port for p in stack.actors("ServeReplica") for ip, port in listens(p) if ip == "::"}
    everywhere = {(p.name(), *address) for p in stack.family() for address in listens(p) if address[0] != "127.0.0.1"}
    assert {entry for entry in everywhere if entry[2] not in allowed} == set()
    (haproxy,) = stack.named("haproxy")
    assert ("127.0.0.1", stack.port) in listens(haproxy)
    assert len(ingress_ports(stack)) == 2
    assert all(not {port for _, port in listens(p) if 20000 <= port < 32000} for p in stack.actors("group-sim"))


def test_serves_server_on_all_interfaces_refuses_whoever_lacks_the_token(stack: Stack):
    (store,) = stack.actors("store")
    (port,) = [port for ip, port in listens(store) if ip == "::"]
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
        with pytest.raises(grpc.RpcError) as refused:
            call(b"", timeout=10)
    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_the_instance_can_be_found_by_its_record(stack: Stack):
    (found,) = [i for i in find_instances(Path("/tmp")) if i.url == stack.url]
    assert (found.pid, found.ready, found.models) == (stack.process.pid, True, ("sim",))
    run_dir = Path(found.run_dir)
    assert run_dir.stat().st_mode & 0o777 == 0o700
    assert (run_dir / "logs" / "raylet.out").exists()
    assert run_dir.name == f"sim-{stack.port}"


def test_a_request_id_comes_once_and_control_headers_of_serve_are_ignored(stack: Stack):
    headers = {"x-request-timeout-seconds": "0.01", "x-request-disconnect-disabled": "?1"}
    body = {"model": "sim", "prompt": "x", "max_tokens": 20}
    answer = httpx.post(f"{stack.url}/v1/completions", json=body, headers=headers, timeout=30)
    assert answer.status_code == 200
    assert len(answer.headers.get_list("x-request-id")) == 1


def test_a_client_that_leaves_ends_its_request(stack: Stack):
    with stack.stream(max_tokens=2000, ignore_eos=True) as payloads:
        next(itertools.islice(payloads, 3, None))
        assert in_flight(stack) == 1
    assert eventually(lambda: in_flight(stack) == 0, limit_s=30)


def in_flight(stack: Stack) -> float:
    """Requests in flight, summed over the ingress replicas, each asked at its own port."""
    total = 0.0
    for port in ingress_ports(stack):
        lines = httpx.get(f"http://127.0.0.1:{port}/metrics").text.splitlines()
        total += sum(float(line.split()[-1]) for line in lines if line.startswith("warmgate_requests_in_flight{"))
    return total


def ingress_ports(stack: Stack) -> list[int]:
    return [port for p in stack.actors("ingress") for _, port in listens(p) if 20000 <= port < 32000]


class Load:
    """Chats one after another from a thread; keeps every status."""

    def __init__(self, stack: Stack) -> None:
        self.statuses: list[int | str] = []
        self._stack = stack
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.statuses.append(self._stack.chat(max_tokens=2).status_code)
            except httpx.HTTPError as error:
                self.statuses.append(type(error).__name__)


def test_a_killed_replica_is_replaced_and_no_request_notices(stack: Stack):
    before = {p.pid for p in stack.actors("group-sim")}
    with Load(stack) as load:
        stack.actors("group-sim")[0].kill()
        replaced = eventually(lambda: len(fresh := {p.pid for p in stack.actors("group-sim")}) == 2 and fresh != before)
        assert replaced
        assert eventually(lambda: ready_replicas(stack) == 2)
    # A chat that was running on the dead replica may break off; one that had not begun to answer may not.
    assert set(load.statuses) <= {200, 502}
    assert load.statuses.count(502) <= 1
    assert eventually(lambda: stack.said("group-sim: 2 of 2 replicas run"))


def ready_replicas(stack: Stack) -> int:
    return int(httpx.get(f"{stack.url}/ready").json()["replicas"]["sim"])


def test_a_killed_ingress_leaves_the_other_to_answer(stack: Stack):
    before = {p.pid for p in stack.actors("ingress")}
    with Load(stack) as load:
        stack.actors("ingress")[0].kill()
        assert eventually(lambda: len(fresh := {p.pid for p in stack.actors("ingress")}) == 2 and fresh != before)
    # The request that was at the dead one is cut, or HAProxy answers for it.
    others = [s for s in load.statuses if s != 200]
    assert len(others) <= 1, load.statuses


def test_haproxy_goes_on_when_its_ray_actor_dies(stack: Stack):
    (haproxy,) = stack.named("haproxy")
    with stack.stream(max_tokens=300, ignore_eos=True) as payloads:
        next(payloads)
        stack.actors("HAProxyManager")[0].kill()
        assert stack.chat().status_code == 200
        assert eventually(lambda: {p.pid for p in stack.named("haproxy")} - {haproxy.pid} != set())
        assert list(payloads)[-1] == "[DONE]"  # by the old process, which leaves after it
    assert eventually(lambda: [p.pid for p in stack.named("haproxy")] != [haproxy.pid])
    assert eventually(lambda: stack.chat().status_code == 200)


def test_a_killed_valkey_is_started_again_and_no_request_notices(stack: Stack):
    (valkey,) = stack.named("valkey-server")
    with Load(stack) as load:
        valkey.kill()
        assert eventually(lambda: any(p.pid != valkey.pid for p in stack.named("valkey-server")))
        time.sleep(2.0)
    assert set(load.statuses) == {200}
    assert ready_replicas(stack) == 2
