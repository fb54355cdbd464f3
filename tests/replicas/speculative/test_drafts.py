"""Trees of guesses: their shape, what is cut off, what a model's draws confirm."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from replicas.engine.drafts import NO_DRAFTS, Drafts

FORK = Drafts((7, 8, 9, 7, 5), (0, 1, 2, 1, 0))  # 7 ─ 8 ─ 9, 7 ─ 7, 5


@st.composite
def trees(draw: st.DrawFn) -> Drafts:
    size = draw(st.integers(0, 9))
    parents = tuple(draw(st.integers(0, row)) for row in range(size))
    return Drafts(tuple(draw(st.integers(0, 2)) for _ in range(size)), parents)


def test_a_chain_is_a_tree_with_one_branch() -> None:
    chain = Drafts.chain([4, 5, 6])
    assert chain.is_chain and chain.parents == (0, 1, 2) and chain.depths == (0, 1, 2, 3)
    assert not FORK.is_chain and FORK.depths == (0, 1, 2, 3, 2, 1)
    assert FORK.path(3) == (7, 8, 9) and FORK.path(4) == (7, 7) and FORK.path(0) == ()
    assert FORK.first == (7, 5) and NO_DRAFTS.is_chain and not NO_DRAFTS


def test_draws_confirm_one_path_from_the_root() -> None:
    assert FORK.accepted([7, 8, 9, 1, 1, 1]) == (1, 2, 3)
    assert FORK.accepted([7, 7, 0, 0, 3, 0]) == (1, 4)
    assert FORK.accepted([5, 8, 9, 1, 1, 1]) == (5,)
    assert FORK.accepted([6, 8, 9, 1, 1, 1]) == ()


@given(trees(), st.integers(0, 10), st.integers(0, 10))
def test_what_is_cut_keeps_the_paths_of_the_rest(tree: Drafts, max_drafts: int, max_depth: int) -> None:
    cut = tree.cut(max_drafts, max_depth)
    assert len(cut) <= max_drafts and max(cut.depths) <= max_depth
    paths = [tree.path(row) for row in range(1, len(tree) + 1)]
    kept = [cut.path(row) for row in range(1, len(cut) + 1)]
    within = [path for path in paths if len(path) <= max_depth]
    assert kept == within[:max_drafts]


@given(trees(), st.data())
def test_what_is_accepted_is_what_following_the_draws_gives(tree: Drafts, data: st.DataObject) -> None:
    draws = [data.draw(st.integers(0, 2)) for _ in range(len(tree) + 1)]
    said: list[int] = []
    for row in (0, *tree.accepted(draws)):
        assert tree.path(row) == tuple(said)
        said.append(draws[row])
    paths = [tree.path(row) for row in range(len(tree) + 1)]
    if len(set(paths)) == len(paths):  # of equal siblings only the first is followed
        assert tuple(said) not in paths, "a guess was right and not taken"
