"""The mirrored index against the slow obvious one."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import given, settings
from hypothesis import strategies as st

from routing.index import PURGE_STEP, PrefixIndex


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


prompts = st.tuples(st.sampled_from("pqr"), st.integers(0, 12)).map(lambda p: chain(*p))
replicas = st.sampled_from(["a", "b", "c"])
actions: st.SearchStrategy[tuple[str, str, list[int]]] = st.one_of(
    st.tuples(st.just("insert"), replicas, prompts),
    st.tuples(st.just("evict"), replicas, prompts),
    st.tuples(st.just("add"), replicas, st.just([])),
    st.tuples(st.just("drop"), replicas, st.just([])),
)


@settings(max_examples=200)
@given(st.lists(actions, max_size=30), prompts)
def test_any_history_matches_like_an_lru_dictionary_per_replica(
    history: list[tuple[str, str, list[int]]], prompt: list[int]
) -> None:
    index = PrefixIndex(10_000)
    oracle: dict[str, OrderedDict[int, None]] = {}
    for action, replica, hashes in history:
        if action == "add":
            index.add(replica, 16)
            oracle[replica] = OrderedDict()
        elif action == "drop":
            index.drop(replica)
            oracle.pop(replica, None)
        elif action == "insert":
            index.insert(replica, hashes)
            if replica in oracle:
                for block in reversed(hashes):
                    oracle[replica][block] = None
                    oracle[replica].move_to_end(block)
                while len(oracle[replica]) > 16:
                    oracle[replica].popitem(last=False)
        else:
            index.evict(replica, hashes)
            for block in hashes:
                oracle.get(replica, OrderedDict()).pop(block, None)
        index.check()
    expected = {}
    for replica, held in oracle.items():
        num = next((i for i, block in enumerate(prompt) if block not in held), len(prompt))
        if num:
            expected[replica] = num
    assert index.match(prompt) == expected
