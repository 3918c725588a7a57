# SPDX-License-Identifier: MIT
"""memfds as clients make them, well and badly, and the calls that bring descriptors to the service."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

from tests.bus.peer import Peer, plain
from tests.system.test_policy import as_user
from udmabufd.linux import memfd
from udmabufd_base.codec import Variant
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import ADMIN_INTERFACE, ALLOCATOR_INTERFACE, BUS_NAME, OBJECT_PATH, WRAP_TYPES

PATIENCE: Final = 90.0
"""Seconds for what the service does by itself; an emulated machine is slow."""

SEALS: Final = memfd.F_SEAL_SHRINK | memfd.F_SEAL_SEAL
"""The seals that WrapMemfd wants."""


def clients_memfd(size: int, seals: int = SEALS, content: bytes = b"own pages ") -> OwnedFd:
    """Return a memfd that can be wrapped: `content` over and over, every page written to, sealed."""
    fd = memfd.create("clients", size)
    os.pwrite(fd.fileno(), (content * (size // len(content) + 1))[:size], 0)
    memfd.add_seals(fd.fileno(), seals)
    return fd


def reopened(fd: OwnedFd, flags: int) -> OwnedFd:
    """Return another descriptor of the same file, opened with `flags`."""
    return OwnedFd(os.open(f"/proc/self/fd/{fd.fileno()}", flags | os.O_CLOEXEC))


async def send(
    peer: Peer,
    member: str,
    signature: str,
    body: Sequence[Any],
    fds: Sequence[OwnedFd],
    interface: str = ALLOCATOR_INTERFACE,
) -> list[Any]:
    """Call a member of the allocator with descriptors, which are borrowed; return the answer's body."""
    copies = [fd.dup() for fd in fds]
    reply = await peer.connection.call(
        BUS_NAME, OBJECT_PATH, interface, member, signature, body, fds=copies, timeout=PATIENCE
    )
    return reply.body


async def wrap(
    peer: Peer, fds: Sequence[OwnedFd], ranges: Sequence[tuple[int, int, int]], **options: Any
) -> tuple[str, dict[str, Any]]:
    """WrapMemfd of the memfds `fds`; return path and info as plain values."""
    values = {key: Variant(WRAP_TYPES[key], value) for key, value in options.items()}
    body = [list(range(len(fds))), [list(part) for part in ranges], values]
    path, info = await send(peer, "WrapMemfd", "aha(utt)a{sv}", body, fds)
    return path, plain(info)


async def usage(root: Peer, uid: int) -> dict[str, int]:
    """Return what GetUsage says of a user, of all its applications together."""
    (rows,) = await root.call("GetUsage", interface=ADMIN_INTERFACE)
    mine = [row for row in map(plain, rows) if row["uid"] == uid]
    return {key: sum(row[key] for row in mine) for key in ("buffers", "bytes", "lingering", "refusals")}


async def entries(peer: Peer) -> dict[str, dict[str, Any]]:
    """Return what ListBuffers tells this peer, by path."""
    (listed,) = await peer.call("ListBuffers")
    return {entry["buffer"]: entry for entry in map(plain, listed)}


async def until(condition: Callable[[], Awaitable[bool]], patience: float = PATIENCE) -> None:
    """Ask again until the answer is yes: of what the service does by itself and tells nobody."""
    deadline = time.monotonic() + patience
    while not await condition():
        assert time.monotonic() < deadline, "it did not come about"
        await asyncio.sleep(0.05)


@asynccontextmanager
async def peer_of(address: str, uid: int) -> AsyncIterator[Peer]:
    """A connection of another user."""
    with as_user(uid):
        peer = await Peer.connect(address)
    try:
        yield peer
    finally:
        peer.close()
