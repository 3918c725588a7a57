# SPDX-License-Identifier: MIT
"""Devices that still write to a buffer that is to move: they are waited for, not for ever, and nobody waits with them.

The fences are vgem's, which end by themselves after 10 s (VGEM_FENCE_TIMEOUT in drivers/gpu/drm/vgem/vgem_fence.c).
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import pytest

from tests.kernel.buffers import MIB, PAGE, prime_import
from tests.kernel.demands import create, refused
from tests.kernel.dynamic import Importer, contents, fill, pattern
from udmabufd_base.codec import Variant
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import MOVE_TYPES

pytestmark = [pytest.mark.guest, pytest.mark.root]

# include/uapi/drm/vgem_drm.h
VGEM_FENCE_WRITE: Final = 0x1
DRM_IOCTL_VGEM_FENCE_ATTACH: Final = 0xC0106441
DRM_IOCTL_VGEM_FENCE_SIGNAL: Final = 0x40086442

ELSEWHERE = {"allocator": Variant(MOVE_TYPES["allocator"], "heap:system")}
SIZE = 2 * MIB


class Writing:
    """A device that says it writes to a dma-buf until end()."""

    def __init__(self, card: OwnedFd, dma_buf: OwnedFd) -> None:
        self._card = card
        attach = bytearray(struct.pack("=IIII", prime_import(card.fileno(), dma_buf), VGEM_FENCE_WRITE, 0, 0))
        fcntl.ioctl(card, DRM_IOCTL_VGEM_FENCE_ATTACH, attach)
        _, _, self._fence, _ = struct.unpack("=IIII", attach)

    def end(self) -> None:
        """It has written."""
        fcntl.ioctl(self._card, DRM_IOCTL_VGEM_FENCE_SIGNAL, struct.pack("=II", self._fence, 0))


@contextmanager
def writing(node: Path, dma_buf: OwnedFd) -> Iterator[Writing]:
    """A device that writes to a dma-buf, and has it until the end of the block."""
    with OwnedFd(os.open(node, os.O_RDWR | os.O_CLOEXEC)) as card:
        yield Writing(card, dma_buf)


async def backed(one: Importer, size: int) -> str:
    path = await create(one, size=size)
    await one.attach(path)
    await one.renew(path)
    return path


async def test_what_devices_write_is_waited_for(alice: Importer, bob: Importer, vgem: Path) -> None:
    """By more moves than there are threads that copy; another user's buffer moves meanwhile."""
    paths, theirs = [await backed(alice, SIZE) for _ in range(3)], await backed(bob, PAGE)
    with ExitStack() as stack:
        devices = [stack.enter_context(writing(vgem, alice.uses[path].own)) for path in paths]
        moving = [asyncio.create_task(alice.call("Move", "a{sv}", ELSEWHERE, path=path)) for path in paths]
        assert await bob.call("Move", "a{sv}", ELSEWHERE, path=theirs) == [2]
        assert {await alice.get("State", path=path) for path in paths} == {"moving"}
        # What they have written last is in what is copied.
        for path, device in zip(paths, devices, strict=True):
            fill(alice.uses[path].own, pattern(SIZE))
            device.end()
        assert await asyncio.gather(*moving) == [[2]] * 3
    for path in paths:
        use = await alice.moved(path, 2)
        assert use.info["allocator"] == "heap:system"
        assert contents(use.own, SIZE) == pattern(SIZE)
        await alice.leave(path)
    await bob.moved(theirs, 2)
    await bob.leave(theirs)


async def test_a_device_that_does_not_end(alice: Importer, bob: Importer, vgem: Path) -> None:
    """Nothing has changed when that took longer than importers would have had."""
    path, other = await backed(alice, SIZE), await backed(alice, SIZE)
    use, its = alice.uses[path], alice.uses[other]
    fill(use.own, pattern(SIZE))
    with writing(vgem, use.own) as one, writing(vgem, its.own) as two:
        together = [asyncio.create_task(alice.call("Move", "a{sv}", ELSEWHERE, path=each)) for each in (path, other)]
        for moving in together:
            with refused("MoveTimedOut"):
                await moving
        one.end()
        two.end()
    assert await alice.get("State", path=path) == "backed"
    assert await alice.get("Serial", path=path) == 1
    assert contents(use.own, SIZE) == pattern(SIZE)
    assert await alice.call("Move", "a{sv}", ELSEWHERE, path=path) == [2]
    await alice.moved(path, 2)
    for each in (path, other):
        await alice.leave(each)
