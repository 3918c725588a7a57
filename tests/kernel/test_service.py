# SPDX-License-Identifier: MIT
"""The installed service on the real kernel: sizes to the page, fresh memory, its descriptors."""

from __future__ import annotations

import asyncio
import mmap
import os
import random
from collections.abc import Callable

import pytest

from tests.bus.peer import Peer, error, spec
from tests.bus.service import RunningService
from tests.kernel.witness import bufinfo, descriptors, dma_bufs
from udmabufd.linux import udmabuf
from udmabufd_base.errors import RemoteError

pytestmark = pytest.mark.guest

PAGE = mmap.PAGESIZE
MIB = 1 << 20

SetParameter = Callable[[str, int], None]


async def round_trip(peer: Peer, size: int) -> None:
    """Allocate, compare what service, descriptor and kernel say of the size, and give it back."""
    path, fd, info = await peer.allocate(size=size, allocator="udmabuf", name="sized")
    whole = -(-size // PAGE) * PAGE
    known = bufinfo()[info["inode"]]
    assert info["size"] == os.lseek(fd.fileno(), 0, os.SEEK_END) == known.size == whole
    assert (info["allocator"], known.exporter, known.name) == ("udmabuf", "udmabuf", "sized")
    await peer.call("Release", path=path)
    fd.close()


async def test_every_power_of_two_of_pages_and_its_neighbours(peer: Peer) -> None:
    limit = udmabuf.read_limits().max_size
    assert await max_size(peer) == limit == 64 * MIB
    pages = 1
    while pages * PAGE <= limit:
        for size in ((pages - 1) * PAGE, pages * PAGE, (pages + 1) * PAGE):
            if 0 < size <= limit:
                await round_trip(peer, size)
        pages *= 2
    await refused(peer, limit + 1, 64)
    await refused(peer, limit + PAGE, 64)


async def max_size(peer: Peer) -> int:
    """Return the largest size of the allocator udmabuf, with which no other's may be mixed up."""
    (rows,) = await peer.call("ListAllocators")
    sizes: dict[str, int] = {row["allocator"].value: row["max_size"].value for row in rows}
    assert await peer.get("MaxBufferSize") == max(sizes[name] for name in sizes if name != "memfd")
    return sizes["udmabuf"]


async def test_sizes_at_random(peer: Peer) -> None:
    for size in random.sample(range(1, udmabuf.read_limits().max_size + 1), 50):
        await round_trip(peer, size)


async def refused(peer: Peer, size: int, megabytes: int) -> None:
    with pytest.raises(RemoteError, match=f"size: .* size_limit_mb of {megabytes}") as caught:
        await peer.allocate(size=size, allocator="udmabuf")
    assert caught.value.name == error("KernelLimit")


async def test_the_limit_is_noticed_when_it_changes(peer: Peer, set_parameter: SetParameter) -> None:
    set_parameter("size_limit_mb", 96)
    assert await max_size(peer) == 96 * MIB
    await round_trip(peer, 96 * MIB)
    await refused(peer, 96 * MIB + 1, 96)
    set_parameter("size_limit_mb", 1)
    assert await max_size(peer) == MIB
    await refused(peer, MIB + PAGE, 1)
    await round_trip(peer, MIB)


@pytest.mark.unzeroed
async def test_no_stale_byte_in_any_of_64_buffers(peer: Peer) -> None:
    # Leave more dirty memory behind than is about to be allocated.
    with mmap.mmap(-1, 1536 * MIB) as dirt:
        for offset in range(0, len(dirt), PAGE):
            dirt[offset : offset + 8] = b"\xa5" * 8
    size = 8 * MIB
    zeros = bytes(size)
    for _ in range(4):
        paths, fds, _ = await peer.call("AllocateMany", "a{sv}u", spec(size=size, allocator="udmabuf"), 16)
        for fd in fds:
            with mmap.mmap(fd.fileno(), size, mmap.MAP_SHARED, mmap.PROT_READ) as view:
                assert view[:] == zeros
        # All 64 are held at the same time: none is another's memory again.
        assert len(paths) == 16


async def test_one_memfd_and_one_dma_buf_for_each_buffer(service: RunningService, peer: Peer) -> None:
    """Beside the memfd with the service's own state; and as long as the client keeps its descriptor."""

    def held() -> tuple[int, int]:
        counts = descriptors(service.pid)
        return counts["memfd"], counts["dma-buf"]

    async def only_the_state() -> None:
        async with asyncio.timeout(120):
            while held() != (1, 0):
                await peer.get("Version")

    # Those of the tests before, whose connections have ended, are closed in a moment.
    await only_the_state()
    (empty,) = await peer.call("CreateBuffer", "a{sv}", spec(size=PAGE))
    assert held() == (1, 0)
    path, fd, info = await peer.allocate(size=PAGE, name="mine")
    assert held() == (2, 1)
    (own,) = [one for one in dma_bufs(service.pid) if one.inode == info["inode"]]
    assert (own.name, own.exporter, own.size) == ("mine", "udmabuf", PAGE)
    await peer.call("SetName", "s", "renamed", path=path)
    assert bufinfo()[info["inode"]].name == "renamed"
    memfd_path, memfd, _ = await peer.allocate(size=PAGE, kind="memfd")
    assert held() == (3, 1)
    for one in (empty, path, memfd_path):
        await peer.call("Release", path=one)
    # The memfd is the client's from then on; the dma-buf is followed to its end.
    assert held() == (2, 1)
    assert info["inode"] in bufinfo()
    fd.close()
    memfd.close()
    await only_the_state()
    assert info["inode"] not in bufinfo()
