"""Who holds which prefix block: what replicas say they hold, what was just sent to them, or a mirror of it.

    holders      block hash → bit mask of the replicas (by slot) that hold it (`routing.holders`)
    expected     the same for prompts on their way (`routing.expected`): small, and gone after `EXPECT_S`
    per replica  held: its hashes, least recently used first

A replica begins mirrored: `held` is what was sent to it, bounded like a cache with LRU eviction. `load` makes it exact:
from then on `insert` and `evict` come from its own KV events, and what is sent to it is only expected. `doubt` turns it
back into a mirror that starts from what it last said. `routing.kv_registry` decides when.

A mirror knows of itself that it has no gaps, that is, that it holds all blocks before one that it holds; a publisher
vouches for it. Then a prompt is matched in few look-ups (`routing.holders`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from routing.expected import Expectations
from routing.holders import Holders

PURGE_STEP = 512
"""Entries of departed replicas that one insertion cleans up: a death costs no pause."""

EXPECT_S = 2.0
"""How long a prompt that was sent counts as held without a word from the replica: a burst with one new prefix stays
together while the first of it is computed."""

HASH_BYTES = 48
"""What CPython allocates for an int of 64 bits."""


@dataclass(slots=True, eq=False)
class _Replica:
    """One replica's blocks. `bit` = 1 << slot. `cut`: the index has forgotten some of what an exact one said."""

    replica_id: str
    bit: int
    capacity_blocks: int
    exact: bool = False
    cut: bool = False
    held: dict[int, None] = field(default_factory=dict)


class PrefixIndex:
    """A bounded map from block hash to replicas; about 140 bytes an entry.

    `guessed`: the replicas of which nothing is certain, because they are mirrored.

    All replicas together hold at most about `max_blocks` entries: a mirrored one gets its cache's size or an equal
    share, whichever is smaller, an exact one an equal share (what it holds can be more than its size suggests, as
    prompts may share half a routing block).
    """

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._holders = Holders()
        self._expected = Expectations()
        self._replicas: dict[str, _Replica] = {}
        self._by_bit: dict[int, str] = {}
        self._live = 0
        self._gapless = 0  # of the live ones, those without gaps
        self._departed: list[_Replica] = []
        self._free_bits: list[int] = []
        self._num_slots = 0
        self._version = 0  # grows with every change
        self._asked: tuple[Sequence[int], int, dict[str, int]] = ((), -1, {})  # the last question, when, its answer
        self.guessed: frozenset[str] = frozenset()

    def __len__(self) -> int:
        """Blocks held, those of departed replicas not yet cleaned up included."""
        return sum(len(replica.held) for replica in (*self._replicas.values(), *self._departed))

    def __contains__(self, replica_id: str) -> bool:
        return replica_id in self._replicas

    @property
    def num_bytes(self) -> int:
        """Memory of everything held, in the allocator's own sizes."""
        replicas = (*self._replicas.values(), *self._departed)
        tables = self._holders.num_bytes + self._expected.num_bytes
        tables += sum(sys.getsizeof(replica.held) for replica in replicas)
        return tables + HASH_BYTES * len(self)

    def num_held(self, replica_id: str) -> int:
        """Blocks a replica holds, those expected left out; 0 for an unknown one."""
        replica = self._replicas.get(replica_id)
        return 0 if replica is None else len(replica.held)

    def is_exact(self, replica_id: str) -> bool:
        """Whether this is the replica's own word, rather than a guess from what was sent to it."""
        replica = self._replicas.get(replica_id)
        return replica is not None and replica.exact

    def may_have_gaps(self, replica_id: str) -> bool:
        """Whether a replica's blocks have to be looked up one by one; so with an unknown one."""
        replica = self._replicas.get(replica_id)
        return replica is None or not self._gapless & replica.bit

    # Replicas.

    def add(self, replica_id: str, capacity_blocks: int) -> None:
        """Makes room for a replica that can hold `capacity_blocks` routing blocks, mirrored from now on. A known id
        starts anew, empty."""
        self.drop(replica_id)
        if self._free_bits:
            bit = self._free_bits.pop()
        else:
            bit = 1 << self._num_slots
            self._num_slots += 1
        self._replicas[replica_id] = _Replica(replica_id, bit, max(1, capacity_blocks))
        self._by_bit[bit] = replica_id
        self._live |= bit
        self._gapless |= bit
        self._recount()
        for replica in self._replicas.values():
            self._trim(replica)

    def drop(self, replica_id: str) -> None:
        """Forgets a replica at once: it matches nothing from now on. No-op for an unknown one."""
        replica = self._replicas.pop(replica_id, None)
        if replica is not None:
            self._live &= ~replica.bit
            self._gapless &= ~replica.bit
            self._expected.drop(replica.bit)
            self._departed.append(replica)
            self._recount()

    def load(self, replica_id: str, hashes: Sequence[int]) -> None:
        """This is exactly what a replica holds now, least recently used first; it is exact from here on, and may have
        gaps unless `vouch` follows.

        No-op for an unknown replica.
        """
        replica = self._replicas.get(replica_id)
        if replica is None:
            return
        held, replica.held = replica.held, dict.fromkeys(hashes)
        self._holders.remove(replica.bit, held.keys() - replica.held.keys())
        self._holders.add(replica.bit, replica.held.keys() - held.keys())
        self._expected.confirm(replica.bit, [b for b in self._expected.of(replica.bit) if b in replica.held])
        replica.exact, replica.cut = True, False
        self._gapless &= ~replica.bit
        self._recount()
        self._trim(replica)

    def vouch(self, replica_id: str) -> None:
        """An exact replica has no gaps, and will have none: it evicts no block before those that follow it in a prompt.
        No-op for any other."""
        replica = self._replicas.get(replica_id)
        if replica is not None and replica.exact and not replica.cut:
            self._gapless |= replica.bit
            self._version += 1

    def allow_gaps(self, replica_id: str) -> None:
        """Takes back what `vouch` said. No-op for an unknown replica."""
        replica = self._replicas.get(replica_id)
        if replica is not None:
            self._gapless &= ~replica.bit
            self._version += 1

    def doubt(self, replica_id: str) -> None:
        """A replica's word is out of date: from here on it is mirrored, beginning with what it last said and what was
        sent since. No-op for an unknown replica, or one that is mirrored already."""
        replica = self._replicas.get(replica_id)
        if replica is None or not replica.exact:
            return
        replica.exact = False
        self._gapless &= ~replica.bit
        expected = list(self._expected.of(replica.bit))
        self._expected.drop(replica.bit)
        self._hold(replica, expected)
        self._recount()
        self._trim(replica)

    # Blocks.

    def insert(self, replica_id: str, hashes: Sequence[int]) -> None:
        """A replica now holds these blocks (in prompt order), which need not be a prompt's first; they become its most
        recently used.

        The last block counts as the oldest of them, so that eviction takes a prefix from its tail. No-op for an
        unknown replica.
        """
        replica = self._replicas.get(replica_id)
        if replica is not None and not replica.exact:
            self._gapless &= ~replica.bit
        self._insert(replica, hashes)

    def evict(self, replica_id: str, hashes: Iterable[int]) -> None:
        """A replica no longer holds these blocks. Unknown ones are ignored."""
        replica = self._replicas.get(replica_id)
        if replica is not None:
            if not replica.exact:
                self._gapless &= ~replica.bit
            self._release(replica, hashes)
            self._version += 1

    def clear(self, replica_id: str) -> None:
        """A replica emptied its cache; nothing is expected of it either."""
        replica = self._replicas.get(replica_id)
        if replica is not None:
            had_gaps = not self._gapless & replica.bit
            self.add(replica_id, replica.capacity_blocks)
            if replica.exact:
                self.load(replica_id, ())
                if not had_gaps:
                    self.vouch(replica_id)

    def expect(self, replica_id: str, hashes: Sequence[int], until: float) -> None:
        """A prompt of these blocks is on its way to a replica: they match until they are inserted, or until `expire`
        hears a later time than `until`. No-op for an unknown replica."""
        replica = self._replicas.get(replica_id)
        if replica is None or not hashes:
            return
        bit, fresh = replica.bit, hashes
        if self._gapless & bit:
            fresh = hashes[self._holders.ends(hashes, bit)[0][0] :]
        else:
            held = replica.held
            fresh = [block for block in hashes if block not in held]
        if fresh and len(fresh) <= self._bound(replica) - self._expected.num(bit):
            self._expected.add(bit, fresh, until)
            self._version += 1

    def expire(self, now: float) -> None:
        """Stops believing in what was expected until `now` or earlier and has not come."""
        if self._expected.expire(now):
            self._version += 1

    def sent(self, replica_id: str, hashes: Sequence[int], now: float) -> None:
        """A whole prompt of these blocks was sent to a replica: expected of an exact one, taken for held in a
        mirror."""
        self.expire(now)
        replica = self._replicas.get(replica_id)
        if replica is not None and replica.exact:
            self.expect(replica_id, hashes, now + EXPECT_S)
        else:
            self._insert(replica, hashes)

    def match(self, hashes: Sequence[int]) -> dict[str, int]:
        """Leading blocks of the prompt that each replica holds or is about to, by replica id; a replica without any is
        absent. The answer is shared with whoever asks the same before anything changes: read it only."""
        asked, version, answer = self._asked
        if asked is hashes and version == self._version and type(hashes) is tuple:
            return answer
        matched = self._by_replica(self._ends(hashes)) if hashes and self._live else {}
        self._asked = (hashes, self._version, matched)
        return matched

    def check(self) -> None:
        """Asserts that all directions agree and every bound holds; for tests."""
        rebuilt: dict[int, int] = {}
        for replica in (*self._replicas.values(), *self._departed):
            for block in replica.held:
                rebuilt[block] = rebuilt.get(block, 0) | replica.bit
        self._holders.check(rebuilt)
        assert self._gapless & ~self._live == 0
        for replica in self._replicas.values():
            assert len(replica.held) <= self._bound(replica), f"{replica.replica_id} beyond its bound"
            assert self._expected.num(replica.bit) <= self._bound(replica), f"{replica.replica_id} expects too much"
            assert not any(block in replica.held for block in self._expected.of(replica.bit)), "certain, yet expected"
        self._expected.check()

    # Inside.

    def _ends(self, hashes: Sequence[int]) -> list[tuple[int, int]]:
        """(number of leading blocks, replicas that hold so many or are about to); every live replica is in one mask."""
        ends = self._holders.ends(hashes, self._gapless) if self._gapless else []
        if self._expected.masks:
            ends = [further for num, mask in ends for further in self._expected.walk(hashes, num, mask)]
        ends += self._holders.walk(hashes, self._live ^ self._gapless, self._expected.masks)
        return ends

    def _by_replica(self, ends: list[tuple[int, int]]) -> dict[str, int]:
        """The same by replica id, those with none left out. What most of them hold, a system prompt, is filled in for
        all and then corrected."""
        usual, most = max(ends, key=_num_replicas)
        matched = dict.fromkeys(self._replicas, usual) if usual else {}
        by_bit = self._by_bit
        for num, mask in ends:
            if mask == most or not (num or usual):
                continue
            while mask:
                lowest = mask & -mask
                if num:
                    matched[by_bit[lowest]] = num
                else:
                    del matched[by_bit[lowest]]
                mask ^= lowest
        return matched

    def _insert(self, replica: _Replica | None, hashes: Sequence[int]) -> None:
        self._purge()
        if replica is None:
            return
        self._hold(replica, reversed(hashes))
        self._expected.confirm(replica.bit, hashes)
        self._trim(replica)
        self._version += 1

    def _hold(self, replica: _Replica, hashes: Iterable[int]) -> None:
        """Makes these its most recently used blocks."""
        held = replica.held
        fresh = []
        for block in hashes:
            if block in held:
                del held[block]
            else:
                fresh.append(block)
            held[block] = None
        self._holders.add(replica.bit, fresh)

    def _release(self, replica: _Replica, hashes: Iterable[int]) -> None:
        """It no longer holds those of these that it held."""
        held = replica.held
        gone = []
        for block in hashes:
            if block in held:
                del held[block]
                gone.append(block)
        self._holders.remove(replica.bit, gone)

    def _recount(self) -> None:
        self.guessed = frozenset(replica.replica_id for replica in self._replicas.values() if not replica.exact)
        self._version += 1

    def _bound(self, replica: _Replica) -> int:
        share = max(1, self._max_blocks // max(1, len(self._replicas)))
        return share if replica.exact else min(replica.capacity_blocks, share)

    def _trim(self, replica: _Replica) -> None:
        surplus = len(replica.held) - self._bound(replica)
        if surplus > 0:
            self._release(replica, list(islice(replica.held, surplus)))
            if replica.exact:  # its order is that of its events, not of use: what is forgotten need not be a tail
                replica.cut = True
                self._gapless &= ~replica.bit

    def _purge(self) -> None:
        """Cleans up a bounded part of what departed replicas left; a slot is reused only when nothing is left of it."""
        if self._departed:
            replica = self._departed[-1]
            self._release(replica, list(islice(replica.held, PURGE_STEP)))
            if not replica.held:
                self._departed.pop()
                self._free_bits.append(replica.bit)


def _num_replicas(end: tuple[int, int]) -> int:
    return end[1].bit_count()
