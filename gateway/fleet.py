"""The replicas an ingress can send to: one link per live member, kept up, watched, and turned into routing's snapshots.

    members (registry) ─► slots ─► links (channel) ─► states, places, facts ─► dispatcher and admission

Everything is an event: a push, a loss, a member more or less changes a slot, and whoever subscribed hears of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping

from configs.check import num_slots
from configs.schema import Config
from gateway.able import least_able
from gateway.listeners import Listeners
from gateway.placement import Placement, Reserved
from gateway.rates import Relaxation
from gateway.slot import Connect, Link, LinkEvents, Slot, Surroundings
from replicas.channel import ChannelError
from replicas.contract import EngineFacts, GenerateRequest
from routing.index import PrefixIndex
from routing.registry import Member
from routing.types import ReplicaState

logger = logging.getLogger("warmgate.fleet")

FIRST_BACKOFF_S = 0.05
MAX_BACKOFF_S = 2.0


class Fleet:
    """Slots by replica id. Implements `gateway.admission.Capacity`.

    `index` knows the same replicas: one that is lost matches nothing from that moment.
    """

    def __init__(self, config: Config, connect: Connect, index: PrefixIndex, around: Surroundings) -> None:
        self.index = index
        self.closed = False
        self._config = config
        self._connect = connect
        self._around = around
        self._slots: dict[str, Slot] = {}
        self._members: dict[str, Member] = {}
        self._by_model: dict[str, dict[str, Slot]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._timers: set[asyncio.TimerHandle] = set()
        self._facts: dict[str, EngineFacts] = {}
        self._free: dict[str, int] = {}
        self._counted: dict[Slot, tuple[int, bool]] = {}
        self._listeners = Listeners()
        self._relaxation = Relaxation(self._grouped)

    # What others ask.

    def facts(self, model_id: str) -> EngineFacts | None:
        """What the replicas of a model can do, the least able of them; the last known when there are none."""
        return self._facts.get(model_id)

    def num_ready(self, model_id: str) -> int:
        return sum(slot.ready for slot in self._of(model_id))

    def num_free(self, model_id: str) -> int:
        return self._free.get(model_id, 0)

    def prefill_tokens_per_s(self, model_id: str) -> float:
        """The mean of the replicas that know theirs; 0 while none does."""
        stats = [slot.link.stats for slot in self._of(model_id) if slot.link is not None]
        known = [s.prefill_tokens_per_s for s in stats if s.prefill_tokens_per_s > 0]
        return sum(known) / len(known) if known else 0.0

    def states(self, model_id: str) -> tuple[ReplicaState, ...]:
        """Every replica of the model that is connected."""
        return tuple([state for slot in self._of(model_id) if (state := slot.state()) is not None])

    def takes_adapters(self, model_id: str) -> bool:
        """Whether any group of the model has slots for LoRA adapters, be its replicas here or not."""
        return any(group.model == model_id and num_slots(group.engine) for group in self._config.groups)

    def is_ready(self, replica_id: str) -> bool:
        """Whether this replica can take requests."""
        slot = self._slots.get(replica_id)
        return slot is not None and slot.ready

    def start_linked(self, replica_id: str) -> str | None:
        """The `start_id` that the live connection to this replica leads to; None where there is none."""
        slot = self._slots.get(replica_id)
        return None if slot is None or slot.link is None else slot.link.start_id

    def links(self) -> list[tuple[Member, Link]]:
        """Every member that is connected, with its link."""
        pairs = [(member, self._slots[replica_id].link) for replica_id, member in self._members.items()]
        return [(member, link) for member, link in pairs if link is not None]

    def subscribe(self, callback: Callable[[str], None]) -> None:
        """Calls back with a model's id whenever it has more places than before, or a replica more or less is ready; and
        soon after a replica has told its load."""
        self._listeners.subscribe(callback)

    async def change(self) -> None:
        """Returns when some model has more places than before, or a replica more or less."""
        await self._listeners.change()

    async def connected(self) -> None:
        """Returns when every member that is known is connected."""
        while any(self._slots[replica_id].link is None for replica_id in self._members):
            await self.change()

    def place(self, replica_id: str, request: GenerateRequest, num_uncached: int) -> Placement:
        """Sends a request to a replica. Raises LinkLostError when it is gone, FrameTooLargeError."""
        slot = self._slots[replica_id]
        placement = Placement(self, slot, slot.open(request, num_uncached))
        self.refresh(slot)
        return placement

    def reserve(self, replica_id: str, num_uncached: int) -> Reserved:
        """Keeps a place for a request that is about to be sent there."""
        slot = self._slots[replica_id]
        reserved = Reserved(self, slot, num_uncached)
        self.refresh(slot)
        return reserved

    def prefetch(self, replica_id: str, adapter_id: str) -> None:
        """Tells a replica that a request for the adapter will come. No-op when it is gone."""
        slot = self._slots.get(replica_id)
        if slot is not None:
            slot.prefetch(adapter_id)

    # Members come and go.

    def set_members(self, members: Mapping[str, Member]) -> None:
        """The live members of this cluster; a replica that is new, or at another place than before, is connected to.

        One that started anew at the same place keeps the link where that has found it already, perhaps with requests
        on it.
        """
        for replica_id in self._members.keys() - members.keys():
            self._leave(replica_id)
        for replica_id, member in members.items():
            known = self._members.get(replica_id)
            if known is not None and self._is_same_place(known, member):
                self._members[replica_id] = member
                continue
            if known is not None:
                self._leave(replica_id)
                self._remove(replica_id)
            self._join(member)

    async def close(self) -> None:
        """Closes every link and forgets every replica; open attempts end with LinkLostError. Idempotent."""
        self.closed = True
        self._relaxation.stop()
        for replica_id in list(self._members):
            self._leave(replica_id)
        for replica_id in list(self._slots):
            self._remove(replica_id)
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        while self._closing:
            await asyncio.wait(set(self._closing))

    # What becomes of places (`gateway.placement.SlotKeeper`).

    def failed(self, slot: Slot) -> None:
        """Counts a failure; opens the slot's breaker for a while when there were several."""
        open_s = slot.breaker.failed()
        if open_s is not None:
            logger.warning("replica %s failed repeatedly: nothing goes there for %.1f s", slot.replica_id, open_s)
            self.refresh(slot)
            self._later(open_s, slot)

    def left(self, slot: Slot) -> None:
        """One attempt there has ended."""
        slot.num_in_flight -= 1
        if slot.leaving and not slot.num_in_flight:
            self._remove_slot(slot)
        else:
            self.refresh(slot)

    def refresh(self, slot: Slot) -> None:
        """Counts the slot's places anew, and tells whoever must know."""
        slot.changed()
        before, now = self._counted.get(slot), (slot.num_free, slot.ready)
        if before is None or now == before:
            return
        self._counted[slot] = now
        self._free[slot.model_id] = self._free.get(slot.model_id, 0) + now[0] - before[0]
        if now[0] > before[0] or now[1] != before[1]:
            self._listeners.tell(slot.model_id)

    # Inside.

    def _of(self, model_id: str) -> Iterable[Slot]:
        return self._by_model.get(model_id, {}).values()

    def _grouped(self) -> list[tuple[str, Slot]]:
        """Every member's slot, with the name of its group."""
        return [(member.group, self._slots[replica_id]) for replica_id, member in self._members.items()]

    def _join(self, member: Member) -> None:
        replica_id = member.replica_id
        self._relaxation.start()
        self._members[replica_id] = member
        slot = self._slots.get(replica_id)
        if slot is not None and slot.link is not None and slot.link.start_id != member.start_id:
            self._remove_slot(slot)  # those that still run are another start's
            slot = None
        if slot is not None:  # it had left, but its last requests are still running there
            slot.leaving = False
            self._index(slot)
            self.refresh(slot)
            return
        slot = Slot(replica_id, member.model, self._config.admission.max_ahead_per_replica, self._around.clock)
        self._slots[replica_id] = slot
        self._counted[slot] = (0, False)
        if member.model not in self._by_model:
            self._by_model[member.model] = {}
            model_id = member.model
            self._around.metrics.replicas_ready.labels(model_id).set_function(lambda: self.num_ready(model_id))
        self._by_model[member.model][replica_id] = slot
        gauge = self._around.metrics.replica_outstanding.labels(replica_id)
        gauge.set_function(lambda: slot.num_in_flight)
        self._tasks[replica_id] = asyncio.create_task(self._keep(slot, member), name=f"link to {replica_id}")

    def _is_same_place(self, known: Member, member: Member) -> bool:
        """Whether the link to a known member is one to what it says now."""
        if (known.endpoint, known.model) != (member.endpoint, member.model):
            return False
        if (known.epoch, known.start_id) == (member.epoch, member.start_id):
            return True
        return bool(member.start_id) and self.start_linked(member.replica_id) == member.start_id

    def _leave(self, replica_id: str) -> None:
        """It is no member any more: nothing new goes there; what runs there may end."""
        del self._members[replica_id]
        slot = self._slots[replica_id]
        slot.leaving = True
        self.index.drop(replica_id)
        self.refresh(slot)
        if not slot.num_in_flight:
            self._remove_slot(slot)

    def _remove(self, replica_id: str) -> None:
        slot = self._slots.get(replica_id)
        if slot is not None:
            self._remove_slot(slot)

    def _remove_slot(self, slot: Slot) -> None:
        """Forgets a slot. Idempotent."""
        replica_id = slot.replica_id
        if self._slots.get(replica_id) is not slot:
            return
        del self._slots[replica_id]
        del self._counted[slot]
        del self._by_model[slot.model_id][replica_id]
        with contextlib.suppress(KeyError):
            self._around.metrics.replica_outstanding.remove(replica_id)
        task = self._tasks.pop(replica_id)
        task.cancel()
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _keep(self, slot: Slot, member: Member) -> None:
        """Connects, waits for the loss, connects again; more slowly each time it fails."""
        lost = asyncio.Event()
        events = LinkEvents(on_stats=lambda: self._on_stats(slot), on_lost=lambda: self._on_lost(slot, lost))
        backoff_s = FIRST_BACKOFF_S
        while True:
            try:
                link = await self._connect(member, events)
            except ChannelError as error:
                logger.info("replica %s cannot be reached: %s", slot.replica_id, error)
            else:
                backoff_s = FIRST_BACKOFF_S
                await self._use(slot, link, lost)
            await asyncio.sleep(backoff_s * (1 + self._around.random.random()))
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    async def _use(self, slot: Slot, link: Link, lost: asyncio.Event) -> None:
        """Offers the slot while its link lives; closes the link in any case."""
        lost.clear()
        try:
            if link.alive:
                self._connected(slot, link)
                await lost.wait()
        finally:
            self._disconnected(slot)
            await link.close()

    def _connected(self, slot: Slot, link: Link) -> None:
        logger.info("connected to replica %s", slot.replica_id)
        slot.connected(link)
        self._index(slot)
        able = [s.link.facts for s in self._of(slot.model_id) if s.link is not None]
        self._facts[slot.model_id] = least_able(able)
        self.refresh(slot)

    def _index(self, slot: Slot) -> None:
        """Begins, or begins anew, to mirror what a connected replica holds."""
        model = self._config.model_named(slot.model_id)
        if model is not None and slot.link is not None:
            self.index.add(slot.replica_id, slot.link.facts.kv_tokens // model.route_block_tokens)

    def _disconnected(self, slot: Slot) -> None:
        """The slot cannot be reached from now on. Idempotent."""
        if slot.link is None:
            return
        slot.disconnected()
        if self._slots.get(slot.replica_id) is slot:
            self.index.drop(slot.replica_id)
        able = [s.link.facts for s in self._of(slot.model_id) if s.link is not None]
        if able:
            self._facts[slot.model_id] = least_able(able)
        self.refresh(slot)

    def _on_lost(self, slot: Slot, lost: asyncio.Event) -> None:
        if slot.link is not None:
            self._around.metrics.links_lost.inc()
            logger.warning("lost replica %s with %d requests", slot.replica_id, slot.num_in_flight)
            self.failed(slot)
        self._disconnected(slot)
        lost.set()

    def _on_stats(self, slot: Slot) -> None:
        slot.pushed()
        self.refresh(slot)
        slot.state()  # made now, so that no decision has to wait for it
        self._listeners.tell_soon(slot.model_id)

    def _later(self, delay_s: float, slot: Slot) -> None:
        """Looks at the slot again when its breaker has closed."""

        def look() -> None:
            self._timers.discard(timer)
            self.refresh(slot)

        timer = asyncio.get_running_loop().call_later(delay_s, look)
        self._timers.add(timer)
