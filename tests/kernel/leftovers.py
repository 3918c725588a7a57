# SPDX-License-Identifier: MIT
"""What a failed test has left: its frames, which are kept for the report, own connections, processes and descriptors,
and with them buffers that the next test would wait for.
"""

from __future__ import annotations

import gc
from collections.abc import Collection
from pathlib import Path

from tests.bus.peer import Peer
from tests.interop.remote import RemoteAgent
from udmabufd_base.fd import OwnedFd


def numbers() -> set[int]:
    """Return the numbers of this process's open descriptors."""
    return {int(entry.name) for entry in Path("/proc/self/fd").iterdir()}


def end(before: Collection[int]) -> None:
    """End all peers and agents, which live no longer than a test, and the descriptors that were not among these."""
    every = gc.get_objects()
    for agent in [one for one in every if isinstance(one, RemoteAgent)]:
        if agent.process.returncode is None:
            agent.kill()
    for peer in [one for one in every if isinstance(one, Peer)]:
        peer.close()
    for fd in [one for one in every if isinstance(one, OwnedFd)]:
        if not fd.closed and fd.fileno() not in before:
            fd.close()
