# SPDX-License-Identifier: MIT
"""Whose descriptors are received: every one may hang whoever closes it, so only so many are ours at a time.

A descriptor counts from its receipt until its close() has returned, for the user whose connection sent it. A user who
has sent what does not close is refused further ones; what others may send does not depend on it. Who called is known
from a connection's second call on; of those not known yet little is taken, and nothing while much does not close.
Which calls take descriptors at all is left to dispatch, closing them to core.closer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from udmabufd.core.closer import Closer
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import MAX_FDS_PER_MESSAGE

PER_USER: Final = 64
"""Descriptors of one user, those of calls being served included."""

UNKNOWN: Final = 64
"""Descriptors of connections that are not known yet, all together."""

CALM: Final = 256
"""Descriptors of all users at which nothing more is taken of connections that are not known yet."""


class Intake:
    """Counts what was received. `uid_of` tells the user of a connection by its unique name, or None."""

    def __init__(self, closer: Closer, uid_of: Callable[[str], int | None]) -> None:
        self._closer = closer
        self._uid_of = uid_of
        self._held: dict[str, int] = {}
        """Descriptors of calls that are being served, by sender."""

    def admits(self, sender: str, count: int) -> bool:
        """Whether to receive `count` descriptors from connection `sender`."""
        uid = self._uid_of(sender)
        if self._closer.full(uid):
            return False
        if uid is not None:
            return self._of(uid) + count <= PER_USER
        calm = sum(self._held.values()) + self._closer.unclosed_in_all() + count <= CALM
        one = self._held.get(sender, 0) + count <= MAX_FDS_PER_MESSAGE
        return calm and one and self._of(None) + count <= UNKNOWN

    def _of(self, uid: int | None) -> int:
        held = sum(count for sender, count in self._held.items() if self._uid_of(sender) == uid)
        return held + self._closer.unclosed(uid)

    def hold(self, sender: str, fds: Sequence[OwnedFd]) -> None:
        """Take notice of descriptors that came with a call, until let_go()."""
        if fds:
            self._held[sender] = self._held.get(sender, 0) + len(fds)

    def let_go(self, sender: str, fds: Sequence[OwnedFd], uid: int | None) -> None:
        """Close descriptors that hold() was told of; `uid` is whose they turned out to be."""
        if fds:
            self._held[sender] -= len(fds)
            if not self._held[sender]:
                del self._held[sender]
            self._closer.close(fds, uid)

    def discard(self, sender: str, fds: Sequence[OwnedFd]) -> None:
        """Close descriptors that came with a call that is not served."""
        self._closer.close(fds, self._uid_of(sender))
