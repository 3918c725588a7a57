# SPDX-License-Identifier: MIT
"""What the service's books have to say, worked out from the contract alone: buffers, shares, charges, times.

Knows nothing of how the service does it. What a caller may be refused is asked before (`verdict`), what happened is
told afterwards. A buffer's `fds` and `paths` are the descriptors that clients have of it, the O_PATH ones apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

REQUEST_GRACE = 10.0
BUS_GRACE = 30.0
HINT_SEEN = 6.0
PROOF_TAKEN = 62.0
"""Seconds within which the end of the last reference has to be noticed, without and with an O_PATH descriptor."""


class Payer(NamedTuple):
    """A user and an application of it."""

    uid: int
    application: str


class Quotas(NamedTuple):
    """The limits; 0 for none."""

    bytes: int
    wrapped: int
    buffers: int
    shares: int
    application_bytes: int
    attachments: int
    evicted: int = 0


class Verdict(Enum):
    """Whether a quota forbids something; either when that depends on what the service has noticed by now."""

    ALLOWED = "allowed"
    REFUSED = "refused"
    EITHER = "either"


@dataclass(eq=False)
class Client:
    """A connection."""

    name: str
    owner: Payer


class Attached(NamedTuple):
    """An attachment: whose, of which device, and whether it is told of moves."""

    client: Client
    device: str
    dynamic: bool = False
    pins: int = 0


ORDINARY = "udmabuf"
"""The allocator whose memory has a memfd of the service's own."""

PROVABLE = (ORDINARY, "udmabuf-2M")
"""Allocators of whose memory it can be told whether anything, an O_PATH descriptor, too, references it."""

FIRST = {"dma-buf": ORDINARY}
"""The allocator that is asked first for a kind; others are called as the kind is."""

PICKY = "card"
"""A device that takes nothing but memory of one allocator; the others take any."""


@dataclass(eq=False)
class Known:
    """A buffer as clients know it, or memory that one had before: such has an `origin`, and no id until it is seen."""

    size: int
    kind: str
    name: str
    payer: Payer
    asked: Hashable = None
    """Of whom and with which request_id, while that stands for it or it may still be asked for."""
    id: str = ""
    ticket: str = ""
    shares: dict[Client, int] = field(default_factory=dict)
    told: set[Client] = field(default_factory=set)
    """Who was told that a call with a request_id has brought it a share."""
    unanswered: set[Client] = field(default_factory=set)
    """Who has a share by a call with a request_id, and perhaps was never told so before the service was killed."""
    attachments: dict[int, Attached] = field(default_factory=dict)
    """By number."""
    attached: int = 0
    """The last number that was given."""
    backed: bool = False
    elsewhere: str = ""
    """The allocator of its memory, if that is another than what memory of its kind is of at first."""
    serial: int = 0
    cancelled: int = 0
    """The last serial that somebody was told will not come."""
    evicted: bool = False
    withdrawn: bool = False
    """It was evicted when its last holder went: nobody can have it again."""
    loose: set[Client] = field(default_factory=set)
    """Who has a descriptor without a dynamic attachment."""
    content: str = ""
    origin: Known | None = None
    state: str = "held"
    """held, waiting (for those who held it, or asked for it, until `until`), lingering (since `since`)."""
    kept: bool = False
    awaited: float = 0.0
    """Until when those that had it when the bus ended may come back."""
    until: float = 0.0
    since: float = 0.0
    shadowed: bool = False
    """Somebody has opened it O_PATH."""
    fds: list[Any] = field(default_factory=list)
    paths: list[Any] = field(default_factory=list)

    @property
    def allocator(self) -> str:
        """Whose memory it has."""
        return (self.elsewhere or FIRST.get(self.kind, self.kind)) if self.backed else ""

    @allocator.setter
    def allocator(self, allocator: str) -> None:
        self.backed, self.elsewhere = True, allocator if allocator != FIRST.get(self.kind, self.kind) else ""

    def back(self, allocator: str) -> None:
        """It has got its first memory."""
        self.allocator, self.serial = allocator, 1

    def is_so(self, told: str, serial: int) -> bool:
        """Whether Moved, or MoveCancelled, was told rightly of a move to `serial`."""
        return serial <= self.serial if told == "Moved" else serial != self.serial

    def advance(self) -> None:
        """It has other memory, or its own again: under a serial of which nobody was told that it will not come."""
        self.serial = max(self.serial, self.cancelled) + 1

    @property
    def free(self) -> bool:
        """Whether nothing references the memory that nobody holds, as far as the service can tell."""
        return self.state == "lingering" and not self.fds and (self.allocator not in PROVABLE or not self.paths)

    @property
    def movable(self) -> bool:
        """Whether it is memory of the service's own choice."""
        return self.backed and self.kind == "dma-buf" and self.state != "lingering"

    @property
    def demanding(self) -> bool:
        """Whether a device takes nothing but memory of one allocator."""
        return any(row.device == PICKY for row in self.attachments.values())

    def answers(self, client: Client) -> bool:
        """Whether a dynamic attachment answers for all that `client` has."""
        return any(row.dynamic and row.client is client for row in self.attachments.values())

    def loosen(self, client: Client) -> None:
        """`client` has got a descriptor that is for no attachment."""
        if client in self.shares and not self.answers(client):
            self.loose.add(client)

    def held_in_place(self, now: float, answering: Client | None = None) -> bool:
        """Whether it has to stay where it is; `answering` is about to attach dynamically."""
        rows = self.attachments.values()
        if self.kept or self.awaited > now:
            return True
        return bool(self.loose - {answering}) or any(row.pins or not row.dynamic for row in rows)


class Books:
    """See the module."""

    def __init__(self, quotas: Quotas) -> None:
        self.quotas = quotas
        self.buffers: list[Known] = []
        self.stands: dict[Hashable, tuple[Any, list[Known]]] = {}

    # What is charged.

    def charges(self, without: Collection[Known] = ()) -> dict[Payer, Counter[str]]:
        """Return what each application has to be charged with, by resource; without some buffers."""
        found: dict[Payer, Counter[str]] = {}

        def charge(owner: Payer, what: str, amount: int) -> None:
            found.setdefault(owner, Counter())[what] += amount

        for buffer in self.buffers:
            if buffer in without:
                continue
            if buffer.backed:
                what = "evicted" if buffer.evicted else "wrapped" if buffer.kind == "wrapped" else "bytes"
                charge(buffer.payer, what, buffer.size)
                if buffer.state == "lingering":
                    charge(buffer.payer, "lingering", buffer.size)
            for owner in {buffer.payer, *(client.owner for client in buffer.shares)}:
                charge(owner, "buffers", 1)
            for client in buffer.shares:
                charge(client.owner, "shares", 1)
            for row in buffer.attachments.values():
                charge(row.client.owner, "attachments", 1)
        return found

    def moving(self, buffer: Known, size: int, causer: Payer | None = None) -> Verdict:
        """Return whether `buffer` may have other memory of so many bytes, while what it has becomes a buffer that
        lingers, at the cost of `causer` if that is another user.
        """
        former: dict[str, int] = {"buffers": 1}
        payer = buffer.payer
        if causer is not None and causer.uid != payer.uid:
            payer, former = causer, former | {"bytes": buffer.size}
        verdicts = {self.verdict(payer, former, swept=False), self.verdict(buffer.payer, {"bytes": size})}
        return next(each for each in (Verdict.REFUSED, Verdict.EITHER, Verdict.ALLOWED) if each in verdicts)

    def verdict(self, owner: Payer, more: dict[str, int], *, swept: bool = True) -> Verdict:
        """Return whether `owner` may be charged with `more`. What is free, but was not noticed, must not be in the way
        if it was looked at before (`swept`), and may be otherwise.
        """
        if self._fit(owner, more, ()):
            return Verdict.ALLOWED
        if not self._fit(owner, more, [b for b in self.buffers if b.free and b.payer.uid == owner.uid]):
            return Verdict.REFUSED
        return Verdict.ALLOWED if swept else Verdict.EITHER

    def _fit(self, owner: Payer, more: dict[str, int], without: Collection[Known]) -> bool:
        charges = self.charges(without)
        user: Counter[str] = Counter()
        for other, amounts in charges.items():
            if other.uid == owner.uid:
                user.update(amounts)
        own = charges.get(owner, Counter())
        for what, amount in more.items():
            limit = getattr(self.quotas, what)
            if limit and amount and user[what] + amount > limit:
                return False
        bytes_more, limit = more.get("bytes", 0), self.quotas.application_bytes
        return not (limit and bytes_more and own["bytes"] + bytes_more > limit)

    def to_share(self, buffer: Known, client: Client) -> dict[str, int]:
        """Return what a share of `buffer` would cost `client`."""
        if client in buffer.shares:
            return {}
        counted = {buffer.payer, *(holder.owner for holder in buffer.shares)}
        return {"shares": 1, "buffers": int(client.owner not in counted)}

    # What happens.

    def made(
        self,
        client: Client,
        buffers: Iterable[Known],
        asked: Hashable = None,
        question: Any = None,
        devices: Iterable[str] = (),
    ) -> None:
        """`client` has made buffers, with these devices attached to each."""
        made = list(buffers)
        for buffer in made:
            buffer.shares[client] = 1
            buffer.asked = asked
            self.buffers.append(buffer)
            self.attach(buffer, client, devices)
        if asked is not None:
            self.stands[asked] = question, made

    def attach(self, buffer: Known, client: Client, devices: Iterable[str], *, dynamic: bool = False) -> None:
        """`client` has attached devices."""
        for device in devices:
            buffer.attached += 1
            buffer.attachments[buffer.attached] = Attached(client, device, dynamic)
            if buffer.answers(client):
                buffer.loose.discard(client)

    def moved(self, buffer: Known, allocator: str, size: int, causer: Payer | None) -> Known:
        """`buffer` has got other memory; return what it had, which lingers at the cost of `causer`, another user than
        the one who paid before, or of who pays now.
        """
        former = Known(
            buffer.size,
            buffer.kind,
            buffer.name,
            causer or buffer.payer,
            backed=True,
            elsewhere=buffer.elsewhere,
            serial=buffer.serial,
            state="lingering",
            shadowed=buffer.shadowed,
            fds=buffer.fds,
            paths=buffer.paths,
            content=buffer.content,
            origin=buffer,
        )
        buffer.fds, buffer.paths, buffer.shadowed = [], [], False
        buffer.allocator, buffer.size = allocator, size
        self.buffers.append(former)
        return former

    def missing(self, buffer: Known, client: Client, devices: Iterable[str]) -> list[str]:
        """Return which of `devices` `client` has not attached."""
        own = Counter(row.device for row in buffer.attachments.values() if row.client is client)
        rest = []
        for device in devices:
            if own[device]:
                own[device] -= 1
            else:
                rest.append(device)
        return rest

    def unplugged(self, device: str) -> None:
        """A device has gone."""
        for buffer in self.buffers:
            ended = [row.client for row in buffer.attachments.values() if row.device == device]
            buffer.attachments = {n: row for n, row in buffer.attachments.items() if row.device != device}
            if buffer.backed and not buffer.evicted:
                # What they may have got for it nothing answers for any more.
                for client in ended:
                    buffer.loosen(client)

    def share_again(self, buffer: Known, client: Client) -> None:
        """`client` has repeated the call that made the buffer; what it was never told of, it is told of now."""
        if client in buffer.unanswered:
            buffer.unanswered.remove(client)
        else:
            self.share(buffer, client)

    def share(self, buffer: Known, client: Client) -> None:
        """`client` has got one more share."""
        buffer.shares[client] = buffer.shares.get(client, 0) + 1
        buffer.state, buffer.kept = "held", False
        self._settle(buffer)

    def release(self, buffer: Known, client: Client, now: float) -> None:
        """`client` has given one share back."""
        buffer.shares[client] -= 1
        if not buffer.shares[client]:
            self._leave(buffer, client, now)

    def gone(self, client: Client, now: float) -> None:
        """The connection of `client` has ended."""
        for buffer in list(self.buffers):
            if client in buffer.shares:
                self._leave(buffer, client, now)

    def pass_time(self, now: float) -> None:
        """It is `now`."""
        due = [buffer for buffer in self.buffers if buffer.state == "waiting" and buffer.until <= now]
        for buffer in sorted(due, key=lambda buffer: buffer.until):
            self._end(buffer, buffer.until)

    def restarted(self, now: float) -> None:
        """The service has come back; the times of whatever waits begin anew."""
        for _, asked_for in self.stands.values():
            for buffer in asked_for:
                buffer.unanswered = set(buffer.shares) - buffer.told
        for buffer in self.buffers:
            if buffer.state == "waiting":
                buffer.until = now + (BUS_GRACE if buffer.kept else REQUEST_GRACE)
            if buffer.free:
                buffer.since = now

    def bus_restarted(self, now: float) -> None:
        """The service has come back to another bus: all connections have ended."""
        self.restarted(now)
        for buffer in self.buffers:
            if buffer.shares:
                buffer.shares.clear()
                buffer.loose.clear()
                buffer.attachments.clear()
                buffer.unanswered.clear()
                buffer.told.clear()
                buffer.state, buffer.kept, buffer.until = "waiting", True, now + BUS_GRACE
                buffer.awaited = buffer.until

    def observed(self, ids: Collection[str], now: float) -> list[str]:
        """Take out what was freed; return what should have been by now, or should be there."""
        wrong = []
        for buffer in list(self.buffers):
            if buffer.id in ids:
                if buffer.free and now > buffer.since + (PROOF_TAKEN if buffer.shadowed else HINT_SEEN):
                    wrong.append(f"{buffer.id} should be free since {buffer.since}")
            elif buffer.free:
                self.buffers.remove(buffer)
            else:
                wrong.append(f"{buffer.id} ({buffer.state}) is gone")
        return wrong

    def _leave(self, buffer: Known, client: Client, now: float) -> None:
        del buffer.shares[client]
        buffer.loose.discard(client)
        buffer.attachments = {n: row for n, row in buffer.attachments.items() if row.client is not client}
        buffer.unanswered.discard(client)
        buffer.told.discard(client)
        self._settle(buffer)
        if buffer.shares:
            return
        if buffer.asked is not None:
            buffer.state, buffer.until = "waiting", now + REQUEST_GRACE
        else:
            self._end(buffer, now)

    def _end(self, buffer: Known, now: float) -> None:
        if buffer.asked in self.stands and buffer in self.stands[buffer.asked][1]:
            # An id stands for all of its buffers or for none.
            for other in self.stands.pop(buffer.asked)[1]:
                other.asked = None
                other.unanswered.clear()
        buffer.asked, buffer.kept = None, False
        if buffer.backed and buffer.kind != "memfd":
            buffer.state, buffer.since = "lingering", now
            buffer.withdrawn, buffer.evicted = buffer.evicted, False
        else:
            self.buffers.remove(buffer)

    def _settle(self, buffer: Known) -> None:
        """The creator pays; once its user holds nothing any more, who has held it longest. Applications of one user
        are told apart, and pay for each other first.
        """
        owners = [client.owner for client in buffer.shares]
        if owners and buffer.payer not in owners:
            buffer.payer = next((owner for owner in owners if owner.uid == buffer.payer.uid), owners[0])
