"""Two ingresses, four sim replicas, one Valkey: what the replicas hold is what both ingresses know."""

from __future__ import annotations

import asyncio
import signal
import time

import pytest

from tests.gateway.kv_cluster import A_SECOND, Cluster, long_prompt, until


async def test_two_ingresses_agree_about_four_replicas_within_a_second_and_so_does_a_third(cluster: Cluster) -> None:
    clocks = (time.time, lambda: time.time() + 7200.0, lambda: time.time() - 86400.0, lambda: 5.0)
    for clock in clocks:
        await cluster.host(clock)
    one, two = await cluster.ingress(), await cluster.ingress()
    assert not one.fleet.index.guessed
    await asyncio.gather(*(cluster.ask(one if i % 2 else two, long_prompt(i)) for i in range(24)))
    assert await until(cluster.agree, 5.0) < A_SECOND
    assert sum(cluster.ingresses[0].fleet.index.num_held(host.replica_id) for host in cluster.hosts) >= 24 * 8
    began = time.monotonic()
    third = await cluster.ingress()
    assert time.monotonic() - began < A_SECOND
    assert cluster.agree()
    num_found = 0
    for i in range(24):  # what one ingress warmed, the others find
        answers = [await cluster.ask(ingress, long_prompt(i)) for ingress in (one, two, third)]
        num_found += len({answer["replica"] for answer in answers}) == 1 and all(
            answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 250 for answer in answers
        )
    assert num_found >= 20, "unless a replica that was not heard of for a while looked busy"


async def test_evictions_are_known_within_a_second(cluster: Cluster) -> None:
    host = await cluster.host()
    ingress = await cluster.ingress()
    first = await cluster.ask(ingress, long_prompt(0))
    await until(cluster.agree, 10.0)
    before = cluster.known(ingress)
    assert before and all(before)
    for i in range(1, 40):  # more than the cache holds
        await cluster.ask(ingress, long_prompt(i))
    assert await until(cluster.agree, 5.0) < A_SECOND
    capacity = host._publisher.blocks.num_engine_blocks if host._publisher else 0
    assert ingress.fleet.index.num_held(first["replica"]) * 2 <= capacity <= 256


async def test_a_burst_with_one_new_prefix_stays_together_at_every_ingress(cluster: Cluster) -> None:
    for _ in range(4):
        await cluster.host()
    ingress = await cluster.ingress()
    answers = await asyncio.gather(*(cluster.ask(ingress, long_prompt(7)) for _ in range(6)))
    assert len({answer["replica"] for answer in answers}) == 1


async def test_a_frozen_redis_costs_no_request_and_leaves_guesses_that_thaw_into_certainty(cluster: Cluster) -> None:
    for _ in range(2):
        await cluster.host()
    ingress = await cluster.ingress()
    warm = await cluster.ask(ingress, long_prompt(0))
    await until(cluster.agree, 10.0)
    cluster.valkey.signal(signal.SIGSTOP)
    frozen_at = time.monotonic()
    while len(ingress.fleet.index.guessed) < 1:
        assert time.monotonic() - frozen_at < 5.0
        await cluster.ask(ingress, long_prompt(round(1000 * (time.monotonic() - frozen_at))))
        await asyncio.sleep(0.2)  # so few that no cache must forget the first
    assert time.monotonic() - frozen_at < 2.0 + A_SECOND
    for _ in range(3):
        again = await cluster.ask(ingress, long_prompt(0))
        assert again["replica"] == warm["replica"], "what it knew, and what it sent, still counts"
    cluster.valkey.signal(signal.SIGCONT)
    await until(cluster.agree, 5.0)


async def test_a_replica_that_dies_and_comes_back_is_cold_at_once(cluster: Cluster) -> None:
    host = await cluster.host()
    ingress = await cluster.ingress()
    await cluster.ask(ingress, long_prompt(0))
    await until(cluster.agree, 10.0)
    assert all(cluster.known(ingress))
    blocks = list(host._publisher.blocks.held) if host._publisher else []
    await host.close()
    cluster.hosts.clear()
    await until(lambda: ingress.fleet.num_ready("m") == 0, 10.0)
    assert ingress.fleet.index.match(blocks) == {}
    await cluster.host()
    await until(lambda: ingress.fleet.num_ready("m") == 1, 10.0)
    assert ingress.fleet.index.match(blocks) == {}
    await until(cluster.agree, 10.0)


@pytest.mark.parametrize("still_frozen", [False, True], ids=["asked", "not asked"])
@pytest.mark.parametrize("later", [5.0, 4.0], ids=["stands still", "goes back"])
async def test_a_replica_that_left_without_a_word_is_not_taken_for_the_one_after_it(
    cluster: Cluster, later: float, still_frozen: bool
) -> None:
    """Redis cannot be told that it leaves, so its words are still there; and the clock does not tell them apart. Redis
    may even be away while the next one starts, so that it cannot ask."""
    host = await cluster.host(lambda: 5.0)
    ingress = await cluster.ingress()
    for number in range(8):
        await cluster.ask(ingress, long_prompt(number))
    await until(cluster.agree, 10.0)
    cluster.valkey.signal(signal.SIGSTOP)
    await host.close()
    cluster.hosts.remove(host)
    if not still_frozen:
        cluster.valkey.signal(signal.SIGCONT)
    await cluster.host(lambda: later, host.replica_id)
    await until(lambda: ingress.fleet.num_ready("m") == 1, 10.0)
    await cluster.ask(ingress, long_prompt(9))
    cluster.valkey.signal(signal.SIGCONT)
    await until(cluster.agree, 10.0)


async def test_the_registry_can_be_watched(cluster: Cluster) -> None:
    await cluster.host()
    ingress = await cluster.ingress()
    await cluster.ask(ingress, long_prompt(0))
    await until(cluster.agree, 10.0)
    page = ingress.gateway.metrics.exposition().decode()
    figures = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    assert float(figures["warmgate_prefix_index_blocks"]) == ingress.fleet.index.num_held("r0") > 0
    assert float(figures["warmgate_prefix_index_bytes"]) > 0
    assert float(figures['warmgate_kv_registry_exact{replica="r0"}']) == 1
    assert float(figures['warmgate_kv_registry_lag_seconds{replica="r0"}']) < 0.5
    assert float(figures["warmgate_kv_registry_heals_total"]) == 1
    assert float(figures["warmgate_kv_registry_entries_total"]) >= 1
    for _ in range(30):
        loads = await ingress.watch.loads()
        if loads["r0"].num_prefix_blocks:
            break
        await asyncio.sleep(0.1)
    assert loads["r0"].num_prefix_blocks == ingress.fleet.index.num_held("r0")
    assert loads["r0"].kv_age_s is not None and loads["r0"].kv_age_s < A_SECOND
