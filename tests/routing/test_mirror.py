"""What was sent where."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st

from routing.mirror import Mirror


def mirror(**bounds: int) -> Mirror:
    made = Mirror()
    for replica_id, max_blocks in bounds.items():
        made.add(replica_id, max_blocks)
    return made


def test_a_prompt_matches_as_far_as_it_was_sent() -> None:
    sent = mirror(a=100, b=100)
    sent.insert("a", (1, 2, 3, 4))
    sent.insert("b", (1, 2, 9))
    assert sent.match((1, 2, 3, 5)) == {"a": 3, "b": 2}
    assert sent.match((7,)) == {}
    assert sent.match(()) == {}
    assert sent.held_blocks() == {"a": 4, "b": 3}


def test_beyond_its_bound_a_replica_forgets_the_tail_of_its_oldest_prompt() -> None:
    sent = mirror(a=5)
    sent.insert("a", (1, 2, 3))
    sent.insert("a", (1, 7, 8))
    sent.insert("a", (9,))
    assert sent.match((1, 2, 3)) == {"a": 1} or sent.match((1, 2, 3)) == {"a": 2}
    assert sent.match((1, 7, 8)) == {"a": 3}
    assert sent.held_blocks() == {"a": 5}


def test_a_replica_that_is_dropped_matches_nothing_and_may_come_again_empty() -> None:
    sent = mirror(a=10, b=10)
    sent.insert("a", (1,))
    sent.drop("a")
    sent.drop("a")
    assert sent.match((1,)) == {}
    assert "a" not in sent
    sent.insert("a", (1,))
    sent.add("a", 10)
    assert sent.match((1,)) == {}
    sent.check()


actions = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), st.sampled_from("abc"), st.integers(0, 5), st.integers(1, 6)),
        st.tuples(st.just("add"), st.sampled_from("abc"), st.integers(1, 12), st.just(0)),
        st.tuples(st.just("drop"), st.sampled_from("abc"), st.just(0), st.just(0)),
    ),
    max_size=40,
)


def chain(conversation: int, num_blocks: int) -> tuple[int, ...]:
    """Prompts share blocks from the front: conversations 0 to 2 have a common first block, 3 to 5 another."""
    return tuple(conversation // 3 if i == 0 else 100 * (conversation + 1) + i for i in range(num_blocks))


@given(actions)
def test_it_agrees_with_one_ordered_set_a_replica(script: list[tuple[str, str, int, int]]) -> None:
    sent = Mirror()
    naive: dict[str, tuple[int, OrderedDict[int, None]]] = {}
    for action, replica_id, number, num_blocks in script:
        if action == "add":
            sent.add(replica_id, number)
            naive[replica_id] = (number, OrderedDict())
        elif action == "drop":
            sent.drop(replica_id)
            naive.pop(replica_id, None)
        else:
            hashes = chain(number, num_blocks)
            sent.insert(replica_id, hashes)
            if replica_id in naive:
                bound, blocks = naive[replica_id]
                for block in reversed(hashes):
                    blocks[block] = None
                    blocks.move_to_end(block)
                while len(blocks) > bound:
                    blocks.popitem(last=False)
        sent.check()
        assert sent.held_blocks() == {i: len(blocks) for i, (_, blocks) in naive.items()}
        for conversation in range(6):
            hashes = chain(conversation, 6)
            expected = {i: next((n for n, h in enumerate(hashes) if h not in b), 6) for i, (_, b) in naive.items()}
            assert sent.match(hashes) == {i: n for i, n in expected.items() if n}
