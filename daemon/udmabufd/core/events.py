# SPDX-License-Identifier: MIT
"""Tells the journal of events, each with the MESSAGE_ID and the fields that the catalog and searches go by.

What events there are is in `event_table`. Of those that a user can cause at will there is one entry for each user and
minute, so that nobody floods the journal. The journal's protocol is left to the log handlers.
"""

from __future__ import annotations

import logging
import string
import time
from collections.abc import Callable, Hashable
from typing import Any, Final

from udmabufd.core.errors import AllocatorError
from udmabufd.core.event_table import NOTICE, Event
from udmabufd_client.contract import ErrorName

__all__ = ["FIELDS", "NOTICE", "REFUSALS", "Event", "RepeatGuard", "emit", "fields_of", "refused"]

INTERVAL: Final = 60.0
"""Seconds for which a user's next events of the same kind are only counted."""

REFUSALS: Final[dict[ErrorName, Event]] = {
    ErrorName.QUOTA_EXCEEDED: Event.QUOTA_EXCEEDED,
    ErrorName.RATE_LIMITED: Event.RATE_LIMITED,
    ErrorName.OUT_OF_MEMORY: Event.OUT_OF_MEMORY,
    ErrorName.KERNEL_LIMIT: Event.KERNEL_LIMIT,
    ErrorName.ACCESS_DENIED: Event.ACCESS_DENIED,
    ErrorName.BAD_MEMFD: Event.BAD_MEMFD,
    ErrorName.UDMABUF_UNAVAILABLE: Event.UDMABUF_REFUSED,
    ErrorName.NOT_SUPPORTED: Event.UNSERVABLE,
    ErrorName.NO_ALLOCATOR: Event.UNSERVABLE,
    ErrorName.CACHE_UNAVAILABLE: Event.UNSERVABLE,
}
"""What the journal is told of when a call is answered by an error; the other errors are between client and service."""

FIELDS: Final[dict[str, str]] = {
    "allocator": "name of the allocator",
    "application": "name of the application, as its cgroup tells",
    "buffer": "id of the buffer",
    "client": "unique name of the connection",
    "count": "how many there are of what the event is about",
    "device": "device, as the caller or udev names it",
    "error": "name of the error, without its prefix",
    "former": "name of the allocator of the memory before",
    "holders": "number of holders",
    "limit": "name of the limit",
    "maximum": "figure of that limit",
    "member": "name of the D-Bus member that was called",
    "present": "present figure that is held against it",
    "reason": "cause, as a clause",
    "seconds": "duration",
    "size": "bytes",
    "uid": "numeric user id",
}
"""What an event may be told with. Whatever its message needs must be given; the rest may."""


class RepeatGuard:
    """Lets one event of a kind and user pass in each interval, and counts the others. Bounded."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, interval: float = INTERVAL, size: int = 512
    ) -> None:
        """`clock` gives seconds, monotonic; `size` kinds and users are told apart, further users are one."""
        self._clock = clock
        self._interval = interval
        self._size = size
        # In the order of their times: time when it passed, those suppressed since.
        self._passed: dict[tuple[Event, Hashable], tuple[float, int]] = {}

    def passes(self, event: Event, user: Hashable) -> int | None:
        """Return how many were suppressed since the last one that passed, or None when this one is, too."""
        now = self._clock()
        key = (event, user)
        if key not in self._passed and len(self._passed) >= self._size:
            self._forget(now)
            if len(self._passed) >= self._size:
                key = (event, _OTHERS)
        passed, suppressed = self._passed.get(key, (-self._interval, 0))
        if now < passed + self._interval:
            self._passed[key] = (passed, suppressed + 1)
            return None
        self._passed.pop(key, None)
        self._passed[key] = (now, 0)
        return suppressed

    def _forget(self, now: float) -> None:
        """Forget those whose interval is over, and with it the counts of users who have not come again."""
        for key, (passed, _) in list(self._passed.items()):
            if now < passed + self._interval:
                break
            del self._passed[key]


_OTHERS: Final = "others"
"""No uid: the users beyond those that a RepeatGuard tells apart."""

_GUARD: Final = RepeatGuard()


def fields_of(event: Event) -> frozenset[str]:
    """Return the fields without which the message of `event` cannot be written."""
    names = {name for _, name, _, _ in string.Formatter().parse(event.message) if name}
    return frozenset(names - {"who"} | ({"uid"} if "who" in names else set()))


def emit(log: logging.Logger, event: Event, *, guard: RepeatGuard = _GUARD, **fields: Any) -> bool:
    """Log `event` with these `fields` (see FIELDS), under its MESSAGE_ID; return whether it was logged.

    It is not when the logger does not take its level, or when `guard` has let one of the same uid pass a short while
    ago. Never raises for what is in the fields; one that is missing shows as "?".
    """
    return _emit(log, event, guard, fields)


def refused(
    log: logging.Logger,
    error: AllocatorError,
    *,
    guard: RepeatGuard = _GUARD,
    uid: int,
    application: str,
    client: str,
    member: str,
    **fields: Any,
) -> bool:
    """Log that a call was answered by `error`, if that is among REFUSALS; return whether it was logged."""
    event = REFUSALS.get(error.name)
    if event is None:
        return False
    fields |= {"uid": uid, "application": application, "client": client, "member": member}
    return _emit(log, event, guard, fields | {"error": str(error.name), "reason": str(error)})


def _emit(log: logging.Logger, event: Event, guard: RepeatGuard, fields: dict[str, Any]) -> bool:
    if not log.isEnabledFor(event.level):
        return False
    suppressed: int | None = 0
    if not event.each and (suppressed := guard.passes(event, fields.get("uid"))) is None:
        return False
    text = event.message.format_map(_Shown(fields, who=_who(fields)))
    if suppressed:
        text += f" ({suppressed} more like this in the meantime)"
    extra = {"message_id": event.message_id, "suppressed": suppressed or None, **_known(fields)}
    # The entry names the place of whoever called emit() or refused().
    log.log(event.level, "%s", text, extra=extra, stacklevel=3)
    return True


class _Shown(dict[str, Any]):
    """The fields by name, as far as they were given."""

    def __missing__(self, key: str) -> str:
        return "?"


def _who(fields: dict[str, Any]) -> str:
    uid = fields.get("uid")
    user = "an unknown user" if uid is None else f"user {uid}"
    return f"{user} ({fields['application']})" if fields.get("application") else user


def _known(fields: dict[str, Any]) -> dict[str, Any]:
    # A stray name could be one of logging's own, which makes it raise.
    return {name: value for name, value in fields.items() if name in FIELDS and value not in (None, "")}
