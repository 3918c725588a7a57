# SPDX-License-Identifier: MIT
"""WrapMemfd against a client that punches holes into its memfds meanwhile, on a kernel that zeroes what it allocates.

Only there may a user wrap at all.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import secrets
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest

from tests.bus.memfds import clients_memfd, entries, peer_of, until, usage, wrap
from tests.bus.peer import Peer
from tests.bus.service import RunningService
from tests.kernel.buffers import MIB, PAGE, mapped, poison_free_memory
from tests.kernel.witness import CGROUP
from udmabufd_base.errors import RemoteError
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import ERROR_PREFIX

pytestmark = [pytest.mark.guest, pytest.mark.zeroed]

SLICE = "udmabufd.slice"
ALICE = 1000
CALLS = 1000
AT_ONCE = 20
SIZE = 64 * PAGE
SLACK = 8 * MIB
"""Bytes of the slice that come and go with the service's own work."""

LEFT_BEHIND = 64 * MIB
"""Bytes of clients' memfds that the service pays for at which it wraps no more."""

_KEEP_SIZE_PUNCH_HOLE = 0x03  # include/uapi/linux/falloc.h: FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def charged() -> int:
    """Bytes that the kernel charges to the service."""
    return int((CGROUP / SLICE / "memory.current").read_text())


def punch(fd: int, offset: int, size: int) -> None:
    """Give back the memory of a part of a memfd. F_SEAL_SHRINK does not forbid it."""
    assert _libc.fallocate(fd, _KEEP_SIZE_PUNCH_HOLE, offset, size) == 0, os.strerror(ctypes.get_errno())


@contextmanager
def punching(fd: OwnedFd, content: bytes) -> Iterator[None]:
    """A process that takes a random page away, has it allocated without zeroes, takes it away again and writes it
    back, and so on without pause.

    What udmabuf exports of a page that was allocated and never written to is the memory of whoever had it last; it
    stays in the dma-buf, as the client writes to another page then.
    """
    child = os.fork()
    if child == 0:
        try:
            page = content * (PAGE // len(content))
            while True:
                offset = random.randrange(SIZE // PAGE) * PAGE
                punch(fd.fileno(), offset, PAGE)
                os.posix_fallocate(fd.fileno(), offset, PAGE)
                punch(fd.fileno(), offset, PAGE)
                os.pwrite(fd.fileno(), page, offset)
        finally:
            os._exit(1)
    try:
        yield
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it has punched until now"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


async def test_1000_calls_race_a_hole_puncher(service: RunningService, peer: Peer) -> None:
    """Some are refused for the hole they saw; the rest show the caller's bytes or zeros, and nobody else's."""
    pid, own_bytes = service.pid, secrets.token_bytes(8)
    (own_word,) = np.frombuffer(own_bytes, dtype="<u8")
    poison_free_memory(512 * MIB)
    told: Counter[str] = Counter()
    before = charged()

    async def one(alice: Peer) -> None:
        try:
            path, _ = await wrap(alice, [own], [(0, 0, SIZE)])
        except RemoteError as error:
            told[error.name.removeprefix(ERROR_PREFIX)] += 1
            assert "has a hole at byte" in error.message, error
            return
        told["wrapped"] += 1
        fd, _ = await alice.call("GetFd", "a{sv}", {}, path=path)
        with mapped(fd, SIZE) as view:
            words = np.frombuffer(view, dtype="<u8").copy()
        foreign = words[(words != own_word) & (words != 0)]
        assert not len(foreign), f"{len(foreign)} words of others, such as {foreign[0]:#x}, after {told}"
        told["with zeros"] += bool(np.any(words == 0))

    async def nothing() -> bool:
        return (await usage(peer, ALICE))["bytes"] == 0

    began = time.monotonic()
    with clients_memfd(SIZE, content=own_bytes) as own, punching(own, own_bytes):
        for _ in range(CALLS // AT_ONCE):
            # The end of the connection takes all of its shares.
            async with peer_of(service.address, ALICE) as alice:
                # From its second call on the service knows whose connection it is, and takes several at a time.
                await alice.get("Version")
                await asyncio.gather(*(one(alice) for _ in range(AT_ONCE)))
                assert charged() - before <= AT_ONCE * SIZE + SLACK
                assert (await usage(peer, ALICE))["bytes"] <= 2 * AT_ONCE * SIZE
    print(f"{dict(told)} in {time.monotonic() - began:.0f} s")
    assert told["wrapped"] + told["BadMemfd"] == CALLS
    assert told.keys() <= {"wrapped", "BadMemfd", "with zeros"}
    assert told["wrapped"] >= 100
    await until(nothing)
    assert charged() - before <= SLACK
    assert service.pid == pid
    assert not await entries(peer)


async def test_what_is_punched_meanwhile_is_not_left_to_the_service(service: RunningService, peer: Peer) -> None:
    """Pages that are gone when the service comes to them, and what it fills instead: the kernel charges that to the
    service for as long as the client keeps its memfd, whatever became of the call.
    """
    size, count = 32 * MIB, 36
    before = charged()
    told: Counter[str] = Counter()
    filled, delay, step = 0, 0.02, 0.01
    async with peer_of(service.address, ALICE) as alice:
        with ExitStack() as stack:
            for _ in range(count):
                fd = stack.enter_context(clients_memfd(size))
                outcome, _ = await asyncio.gather(wrapped_and_released(alice, fd), punched_after(delay, fd))
                told[outcome] += 1
                left = os.fstat(fd.fileno()).st_blocks * 512
                filled += left
                # Before the check of holes is too early; if nothing was filled, it was too late.
                if "hole" in outcome:
                    delay += step
                elif not left:
                    delay = max(delay - step, 0)
                    step *= 0.8

            async def nothing() -> bool:
                return (await usage(peer, ALICE))["bytes"] == 0

            await until(nothing)
            grown = charged() - before
            print(f"{dict(told)}; filled by the service: {filled >> 20} MiB; its slice has grown by {grown >> 20} MiB")
            assert grown <= LEFT_BEHIND + size + SLACK


async def punched_after(delay: float, fd: OwnedFd) -> None:
    await asyncio.sleep(delay)
    await asyncio.to_thread(punch, fd.fileno(), 0, os.fstat(fd.fileno()).st_size)


async def wrapped_and_released(peer: Peer, fd: OwnedFd) -> str:
    """Wrap all of a memfd and give it back; return what became of it."""
    try:
        path, _ = await wrap(peer, [fd], [(0, 0, os.fstat(fd.fileno()).st_size)])
    except RemoteError as error:
        return error.message
    await peer.call("Release", path=path)
    return "wrapped"
