# SPDX-License-Identifier: MIT
"""What keeps descriptors beyond the life of this process, as core sees it: names, descriptors in, descriptors out.

The service manager's store is one (system/fdstore.py); without a service manager there is none, and `NoStore` takes
its place: then buffers end with the process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from udmabufd_base.fd import OwnedFd

STATE_NAME: Final = "_s"
"""Name of the state itself; take_name() never gives it."""


class Store(Protocol):
    """Descriptors by name. A name stands for all descriptors that were put under it."""

    @property
    def enabled(self) -> bool:
        """Whether what is put here outlives the process."""

    def take_name(self) -> str:
        """Return a name that nothing is stored under; it is the caller's until drop()."""

    async def put(self, name: str, fds: Sequence[OwnedFd], uid: int) -> None:
        """Store `fds` (borrowed) under `name` on behalf of `uid`. Raises OSError when they cannot be stored.

        Returns once they are stored even if this process ends now; waits its turn, fair among uids.
        """

    def drop(self, name: str) -> None:
        """Forget all descriptors of `name`, in order behind what was put before, and free the name. Never blocks."""

    async def settled(self, name: str = "") -> None:
        """Wait until what was put and dropped under `name` so far, or everything, has taken effect."""


class NoStore:
    """Stores nothing."""

    enabled = False

    def take_name(self) -> str:
        """Return no name."""
        return ""

    async def put(self, name: str, fds: Sequence[OwnedFd], uid: int) -> None:
        """Do nothing."""

    def drop(self, name: str) -> None:
        """Do nothing."""

    async def settled(self, name: str = "") -> None:
        """Return."""
