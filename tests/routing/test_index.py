"""The index, mirrored and exact, against the slow obvious one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from routing.index import EXPECT_S, PURGE_STEP, PrefixIndex

ROOT = Path(__file__).parents[2]


def chain(name: str, length: int) -> list[int]:
    """Hashes of one prompt's blocks: two prompts with the same name share them."""
    return [hash((name, i)) & (2**64 - 1) for i in range(length)]


def test_every_replica_gets_its_own_longest_prefix_in_one_match() -> None:
    index = PrefixIndex(1000)
    prompt = chain("p", 10)
    for replica, num in (("a", 10), ("b", 4), ("c", 0), ("d", 4)):
        index.add(replica, 100)
        index.insert(replica, prompt[:num])
    assert index.match(prompt) == {"a": 10, "b": 4, "d": 4}
    assert index.match(prompt[:3]) == {"a": 3, "b": 3, "d": 3}
    assert index.match(chain("q", 5)) == {}
    assert index.match([]) == {}


def test_a_hole_ends_the_match_even_when_later_blocks_are_held() -> None:
    index = PrefixIndex(1000)
    index.add("a", 100)
    prompt = chain("p", 6)
    index.insert("a", prompt)
    index.evict("a", [prompt[2]])
    assert index.match(prompt) == {"a": 2}
    index.check()


def test_a_hole_in_what_a_replica_says_counts_once_its_publisher_no_longer_vouches_for_there_being_none() -> None:
    index = PrefixIndex(1000)
    prompt = chain("p", 64)
    for replica in "ab":
        index.add(replica, 100)
        index.load(replica, prompt)
        index.vouch(replica)
        index.evict(replica, prompt[10:12])
    index.allow_gaps("a")
    assert index.match(prompt)["a"] == 10
    assert index.match(prompt)["b"] == 64, "it is told that this does not happen, so it does not look"
    index.load("b", [*prompt[:10], *prompt[12:]])
    assert index.match(prompt)["b"] == 10
    index.check()


def test_what_a_bounded_index_forgets_of_an_exact_replica_is_a_gap_whoever_vouches() -> None:
    index = PrefixIndex(20)
    index.add("a", 100)
    prompt = chain("p", 30)
    index.load("a", prompt)
    index.vouch("a")
    assert index.match(prompt) == {}, "the oldest went: the beginning"
    assert index.match(prompt[10:]) == {"a": 20}
    index.check()


def test_the_same_question_is_answered_again_only_while_nothing_has_changed() -> None:
    index = PrefixIndex(1000)
    index.add("a", 100)
    prompt = tuple(chain("p", 6))
    assert index.match(prompt) == {}
    index.insert("a", prompt[:2])
    assert index.match(prompt) == {"a": 2} == index.match(prompt)
    index.load("a", prompt[:3])
    assert index.match(prompt) == {"a": 3}
    index.sent("a", prompt, now=0.0)
    assert index.match(prompt) == {"a": 6}
    index.expire(EXPECT_S)
    assert index.match(prompt) == {"a": 3}
    index.evict("a", prompt[1:])
    assert index.match(prompt) == {"a": 1}
    index.drop("a")
    assert index.match(prompt) == {}


def test_few_blocks_of_a_long_prompt_are_looked_up_where_there_are_no_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    index = PrefixIndex(10_000)
    prompt = chain("p", 1000)
    for replica, num in (("a", 900), ("b", 17), ("c", 0)):
        index.add(replica, 2000)
        index.load(replica, prompt[:num])
        index.vouch(replica)
    looked_up: list[int] = []

    class Noting(dict[int, int]):
        def get(self, block: int, default: int) -> int:  # type: ignore[override]
            looked_up.append(block)
            return super().get(block, default)

    monkeypatch.setattr(index._holders, "_shards", [Noting(shard) for shard in index._holders._shards])
    assert index.match(prompt) == {"a": 900, "b": 17}
    assert len(looked_up) < 30


def test_a_full_mirror_forgets_the_least_recently_used_prompt_from_its_tail() -> None:
    index = PrefixIndex(1000)
    index.add("a", 10)
    old, new = chain("old", 6), chain("new", 6)
    index.insert("a", old)
    index.insert("a", new)
    assert index.match(new) == {"a": 6}
    assert index.match(old) == {"a": 4}
    index.insert("a", old[:4])
    index.insert("a", chain("third", 6))
    assert index.match(old) == {"a": 4}
    assert index.match(new) == {}


def test_a_prompt_longer_than_the_cache_keeps_its_beginning() -> None:
    index = PrefixIndex(1000)
    index.add("a", 4)
    prompt = chain("p", 9)
    index.insert("a", prompt)
    assert index.match(prompt) == {"a": 4}


def test_a_dropped_replica_matches_nothing_at_once_and_leaves_nothing_behind() -> None:
    index = PrefixIndex(10 * PURGE_STEP)
    index.add("dead", 10 * PURGE_STEP)
    prompt = chain("p", 3 * PURGE_STEP)
    index.insert("dead", prompt)
    index.drop("dead")
    assert index.match(prompt) == {}
    index.insert("dead", prompt)  # unknown by now
    index.add("alive", 100)
    index.insert("alive", prompt[:5])
    assert index.match(prompt) == {"alive": 5}
    for _ in range(4):
        index.insert("alive", prompt[:5])
        index.check()
    assert len(index) == 5


def test_a_replica_that_comes_back_starts_cold() -> None:
    index = PrefixIndex(100)
    index.add("a", 50)
    index.insert("a", chain("p", 5))
    index.add("a", 50)
    assert index.match(chain("p", 5)) == {}
    index.insert("a", chain("p", 2))
    assert index.match(chain("p", 5)) == {"a": 2}
    index.clear("a")
    assert index.match(chain("p", 5)) == {}


def test_all_mirrors_together_stay_within_the_bound() -> None:
    index = PrefixIndex(100)
    index.add("a", 10_000)
    index.insert("a", chain("p", 90))
    assert len(index) == 90
    for replica in ("b", "c", "d"):
        index.add(replica, 10_000)
        index.insert(replica, chain(replica, 90))
    assert len(index) == 100
    assert index.match(chain("p", 90)) == {"a": 25}
    index.check()


# Exact replicas: their own word, and what is expected of them


def test_what_was_sent_to_an_exact_replica_matches_until_it_expires() -> None:
    index = PrefixIndex(1000)
    index.add("a", 100)
    index.load("a", chain("p", 2))
    index.sent("a", chain("p", 6), now=10.0)
    assert index.match(chain("p", 6)) == {"a": 6}
    assert len(index) == 2, "not held yet"
    index.expire(10.0 + EXPECT_S - 0.01)
    assert index.match(chain("p", 6)) == {"a": 6}
    index.expire(10.0 + EXPECT_S)
    assert index.match(chain("p", 6)) == {"a": 2}
    index.check()


def test_an_expectation_that_is_confirmed_stays() -> None:
    index = PrefixIndex(1000)
    index.add("a", 100)
    index.load("a", [])
    index.sent("a", chain("p", 6), now=0.0)
    index.insert("a", chain("p", 4))
    index.check()
    index.expire(EXPECT_S)
    assert index.match(chain("p", 6)) == {"a": 4}
    index.check()


def test_a_second_prompt_with_the_same_prefix_prolongs_the_expectation() -> None:
    index = PrefixIndex(1000)
    index.add("a", 100)
    index.load("a", [])
    index.sent("a", chain("p", 6), now=0.0)
    index.sent("a", chain("p", 3), now=1.0)
    index.expire(EXPECT_S)
    assert index.match(chain("p", 6)) == {"a": 3}
    index.expire(1.0 + EXPECT_S)
    assert index.match(chain("p", 6)) == {}
    index.check()


def test_an_eviction_does_not_take_back_what_is_on_its_way() -> None:
    index = PrefixIndex(1000)
    index.add("a", 100)
    index.load("a", chain("p", 6))
    index.sent("a", chain("p", 8), now=0.0)
    index.evict("a", chain("p", 8))
    assert index.match(chain("p", 8)) == {}, "six of them were held, so only two are expected"
    index.sent("a", chain("p", 8), now=0.0)
    assert index.match(chain("p", 8)) == {"a": 8}
    index.evict("a", chain("p", 8))
    assert index.match(chain("p", 8)) == {"a": 8}
    index.check()


def test_only_replicas_that_spoke_for_themselves_are_certain() -> None:
    index = PrefixIndex(1000)
    index.add("a", 100)
    index.add("b", 100)
    assert index.guessed == {"a", "b"}
    index.load("a", chain("p", 3))
    assert index.guessed == {"b"}
    assert index.is_exact("a") and not index.is_exact("b") and not index.is_exact("unknown")
    index.doubt("a")
    assert index.guessed == {"a", "b"}
    index.load("a", [])
    index.drop("b")
    assert index.guessed == frozenset()


def test_a_doubted_replica_goes_on_as_a_mirror_of_what_it_said_and_what_was_sent() -> None:
    index = PrefixIndex(1000)
    index.add("a", 10)
    index.load("a", chain("old", 6))
    index.sent("a", chain("sent", 2), now=0.0)
    index.doubt("a")
    index.expire(1e9)
    assert index.match(chain("old", 6)) == {"a": 6}
    assert index.match(chain("sent", 2)) == {"a": 2}
    index.sent("a", chain("new", 8), now=0.0)
    assert index.match(chain("new", 8)) == {"a": 8}, "a mirror is bounded like the cache"
    assert len(index) == 10
    index.check()


def test_a_snapshot_replaces_whatever_was_believed() -> None:
    index = PrefixIndex(1000)
    index.add("a", 100)
    index.add("b", 100)
    for replica in "ab":
        index.insert(replica, chain("guess", 5))
    index.load("a", chain("truth", 3))
    assert index.match(chain("guess", 5)) == {"b": 5}
    assert index.match(chain("truth", 3)) == {"a": 3}
    index.check()


def test_an_exact_replica_may_hold_more_than_its_size_suggests_but_not_more_than_its_share() -> None:
    index = PrefixIndex(40)
    index.add("a", 10)
    index.load("a", chain("p", 30))
    assert index.match(chain("p", 30)) == {"a": 30}
    index.add("b", 10)
    assert index.num_held("a") == 20
    index.check()


def test_memory_is_counted() -> None:
    index = PrefixIndex(100_000)
    empty = index.num_bytes
    index.add("a", 50_000)
    index.insert("a", chain("p", 50_000))
    assert 90 < (index.num_bytes - empty) / 50_000 < 180


prompts = st.tuples(st.sampled_from("pqr"), st.integers(0, 12)).map(lambda p: chain(*p))
replicas = st.sampled_from(["a", "b", "c"])
CAPACITY, SHARE = 16, 48


class NaiveReplica:
    """One replica, the slow obvious way."""

    def __init__(self) -> None:
        self.exact = False
        self.held: OrderedDict[int, None] = OrderedDict()
        self.expected: dict[int, float] = {}

    def use(self, hashes: list[int]) -> None:
        for block in reversed(hashes):
            self.held[block] = None
            self.held.move_to_end(block)
        for block in hashes:
            self.expected.pop(block, None)
        self.trim()

    def trim(self) -> None:
        while len(self.held) > (SHARE if self.exact else CAPACITY):
            self.held.popitem(last=False)

    def leading(self, prompt: list[int]) -> int:
        return next((i for i, b in enumerate(prompt) if b not in self.held and b not in self.expected), len(prompt))


class IndexMachine(RuleBasedStateMachine):
    """Any history of sends, events, snapshots, doubts, deaths and time against a dictionary of sets."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.index = PrefixIndex(3 * SHARE)
        self.naive: dict[str, NaiveReplica] = {}
        for replica in "abc":  # all three from the start: a share stays a share
            self.add(replica)

    @rule(replica=replicas)
    def add(self, replica: str) -> None:
        self.index.add(replica, CAPACITY)
        self.naive[replica] = NaiveReplica()

    @rule(replica=replicas, hashes=prompts)
    def insert(self, replica: str, hashes: list[int]) -> None:
        self.index.insert(replica, hashes)
        self.naive[replica].use(hashes)

    @rule(replica=replicas, hashes=prompts)
    def evict(self, replica: str, hashes: list[int]) -> None:
        self.index.evict(replica, hashes)
        for block in hashes:
            self.naive[replica].held.pop(block, None)

    @rule(replica=replicas, hashes=prompts)
    def send(self, replica: str, hashes: list[int]) -> None:
        self.index.sent(replica, hashes, self.now)
        self._expire()
        naive = self.naive[replica]
        if naive.exact:
            naive.expected |= {block: self.now + EXPECT_S for block in hashes if block not in naive.held}
        else:
            naive.use(hashes)

    @rule(replica=replicas, hashes=prompts)
    def load(self, replica: str, hashes: list[int]) -> None:
        self.index.load(replica, hashes)
        naive = self.naive[replica]
        naive.exact, naive.held = True, OrderedDict.fromkeys(hashes)
        naive.expected = {block: until for block, until in naive.expected.items() if block not in naive.held}

    @rule(replica=replicas)
    def doubt(self, replica: str) -> None:
        self.index.doubt(replica)
        naive = self.naive[replica]
        if naive.exact:
            naive.exact = False
            for block in naive.expected:
                naive.held[block] = None
                naive.held.move_to_end(block)
            naive.expected = {}
            naive.trim()

    @rule(replica=replicas)
    def clear(self, replica: str) -> None:
        self.index.clear(replica)
        exact = self.naive[replica].exact
        self.naive[replica] = NaiveReplica()
        self.naive[replica].exact = exact

    @rule(seconds=st.floats(0.1, 3.0))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.index.expire(self.now)
        self._expire()

    def _expire(self) -> None:
        for naive in self.naive.values():
            naive.expected = {block: until for block, until in naive.expected.items() if until > self.now}

    @invariant()
    def agrees(self) -> None:
        self.index.check()
        assert self.index.guessed == {replica for replica, naive in self.naive.items() if not naive.exact}
        for name in "pqr":
            prompt = chain(name, 12)
            leading = {replica: naive.leading(prompt) for replica, naive in self.naive.items()}
            assert self.index.match(prompt) == {replica: num for replica, num in leading.items() if num}


TestAnyHistory = IndexMachine.TestCase
TestAnyHistory.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


class TidyMachine(IndexMachine):
    """The same where caches evict tails first and their publishers vouch for it: the index then looks at few blocks."""

    @rule(replica=replicas, name=st.sampled_from("pqr"), keep=st.integers(0, 11))
    def evict_tail(self, replica: str, name: str, keep: int) -> None:
        super().evict(replica, chain(name, 12)[keep:])

    @rule(replica=replicas, hashes=prompts)
    def load(self, replica: str, hashes: list[int]) -> None:
        super().load(replica, hashes)
        self.index.vouch(replica)

    evict = None  # type: ignore[assignment]


TestTidyHistory = TidyMachine.TestCase
TestTidyHistory.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@pytest.mark.slow
def test_four_million_blocks_of_sixty_four_replicas_fit_in_a_gibibyte(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run([sys.executable, "-c", AT_SCALE], cwd=ROOT, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    with capsys.disabled():
        print(f"\n{figures}")
    assert figures["rss_mib"] < 1024
    assert figures["match_cold_us"] < figures["walk_cold_us"] < 1000


AT_SCALE = """
import json, random, time
from routing.index import PrefixIndex

def rss_mib():
    return int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0]) / 1024

def p50(prompts):
    seconds = []
    for prompt in prompts:
        began = time.perf_counter()
        index.match(prompt)
        seconds.append(time.perf_counter() - began)
    return round(sorted(seconds)[len(seconds) // 2] * 1e6, 1)

draw, index, worst_s = random.Random(1), PrefixIndex(4_194_304), 0.0
before = rss_mib()
for i in range(64):
    index.add(f"r{i}", 62_500)
    index.load(f"r{i}", ())
    index.vouch(f"r{i}")
prompts = [[draw.getrandbits(64) for _ in range(187)] for _ in range(500)]
for n in range(4_000_000 // 187):
    hashes = [draw.getrandbits(64) for _ in range(187)] if n % 40 else [*prompts[n // 40 % 500]]
    began = time.perf_counter()
    index.insert(f"r{n % 64}", hashes)
    worst_s = max(worst_s, time.perf_counter() - began)
draw.shuffle(prompts)
cold = p50(prompts)
for i in range(64):
    index.allow_gaps(f"r{i}")
walked = p50([*prompts])
warm = p50([prompts[0]] * 500)
began = time.perf_counter()
index.load("r0", [draw.getrandbits(64) for _ in range(62_500)])
loaded_s = time.perf_counter() - began
fresh = [draw.getrandbits(64) for _ in range(62_500)]
for start in range(0, len(fresh), 4096):
    index.insert("r1", fresh[start : start + 4096])
began = time.perf_counter()
index.load("r1", fresh)
prepared_s = time.perf_counter() - began
print(json.dumps({
    "blocks": len(index), "rss_mib": round(rss_mib()),
    "bytes_per_block": round((rss_mib() - before) * 2**20 / len(index)),
    "counted_mib": round(index.num_bytes / 2**20), "match_cold_us": cold,
    "walk_cold_us": walked, "walk_warm_us": warm,
    "worst_insert_ms": round(worst_s * 1e3, 1), "load_ms": round(loaded_s * 1e3, 1),
    "prepared_load_ms": round(prepared_s * 1e3, 1)}))
"""
