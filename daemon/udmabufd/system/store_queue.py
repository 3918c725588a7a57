# SPDX-License-Identifier: MIT
"""The messages that wait for their turn at the service manager's store: whose is next.

What is dropped goes first: else the store fills up with what is not there any more. There is no more of it than was
put. Users take turns with what they put, one message each, and are paced besides. Messages of one name keep their
order. Sending is fdstore.py's.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator, Sequence

    from udmabufd_base.fd import OwnedFd

ANYBODY: Final = -1
"""The lane of what is dropped, whoever put it."""

PRUNE_AT: Final = 256


@dataclass(eq=False, slots=True)
class Message:
    """One message: descriptors to store under a name, or, with None, to forget what is stored under it."""

    name: str
    fds: Sequence[OwnedFd] | None
    uid: int
    done: asyncio.Future[None]
    """Set when the message was sent or could not be; only a put learns of the latter."""


class Pace:
    """At most `burst` at once and `rate` a second in the long run, for each uid by itself."""

    def __init__(self, rate: float, burst: int) -> None:
        self._interval = 1 / rate
        self._slack = (burst - 1) * self._interval
        # When each uid will have its whole burst again; absent means that it has.
        self._paid: dict[int, float] = {}

    def wait(self, uid: int, now: float) -> float:
        """Return the seconds until `uid` may take one, 0 if it may now."""
        # A rounding error of the clock must not make a timer fire again and again.
        wait = self._paid.get(uid, now) - now - self._slack
        return wait if wait > 1e-6 else 0.0

    def take(self, uid: int, now: float) -> None:
        """Count one of `uid`."""
        if len(self._paid) >= PRUNE_AT:
            self._paid = {other: paid for other, paid in self._paid.items() if paid > now}
        self._paid[uid] = max(self._paid.get(uid, now), now) + self._interval


class StoreQueue:
    """Lanes of messages, one for each uid that has any waiting."""

    def __init__(self, rate: float, burst: int) -> None:
        self._pace = Pace(rate, burst)
        self._lanes: OrderedDict[int, deque[Message]] = OrderedDict()
        self._waiting: dict[str, list[int]] = {}
        """name -> [lane, number of messages of that name in it]"""

    def add(self, message: Message) -> None:
        """Append to the lane of the message's uid, or to the one where messages of its name wait already."""
        place = self._waiting.setdefault(message.name, [message.uid, 0])
        message.uid = place[0]
        place[1] += 1
        self._lanes.setdefault(message.uid, deque()).append(message)

    def first(self, now: float) -> Message | None:
        """Return the message whose turn it is, None if there is none or each has to wait() first."""
        if (dropped := self._lanes.get(ANYBODY)) is not None:
            return dropped[0]
        for uid, lane in self._lanes.items():
            if lane[0].fds is None or not self._pace.wait(uid, now):
                return lane[0]
        return None

    def wait(self, now: float) -> float | None:
        """Return the seconds until first() has a message; None when nothing waits."""
        return min((self._pace.wait(uid, now) for uid in self._lanes), default=None)

    def sent(self, message: Message, now: float) -> None:
        """Remove what first() returned and let the next user have a turn."""
        self._lanes.move_to_end(message.uid)
        if message.fds is not None:
            self._pace.take(message.uid, now)
        self.remove(message)

    def remove(self, message: Message) -> None:
        """Remove a message that is not to be sent any more."""
        lane = self._lanes[message.uid]
        lane.remove(message)
        if not lane:
            del self._lanes[message.uid]
        place = self._waiting[message.name]
        place[1] -= 1
        if not place[1]:
            del self._waiting[message.name]

    def __bool__(self) -> bool:
        """Whether any message waits."""
        return bool(self._lanes)

    def __iter__(self) -> Iterator[Message]:
        """All messages that wait."""
        for lane in self._lanes.values():
            yield from lane
