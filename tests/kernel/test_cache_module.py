# SPDX-License-Identifier: MIT
"""The service on a udmabuf device that honours cache attributes: what was asked for is given, said, and there.

The device is the module's of tests/module, which the service is configured with; with `nopat` the same tests see that
nobody is told of write-combined memory. What the module itself promises is in test_module*.py.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.bus.memfds import clients_memfd, until, wrap
from tests.bus.peer import Peer, plain, spec
from tests.kernel import modules, truth, unit
from tests.kernel.areas import area
from tests.kernel.buffers import PAGE, prime_import
from tests.kernel.cachebuffers import at, memory
from tests.kernel.demands import allocators, attach, demands, detach, explain, get_fd, refused, release
from tests.kernel.hugepools import huge_pages
from tests.kernel.kernel_memory import KernelMemory, symbols
from tests.kernel.pagetables import PageTables
from tests.kernel.truth import (
    ATTRIBUTES,
    CONFIG,
    HAD,
    KINDS,
    NOPAT,
    POLICIES,
    assert_true,
    connected,
    frames_of,
    kernels_kinds,
    kinds,
)
from tests.kernel.witness import bufinfo
from udmabufd.core.spec import Request
from udmabufd.core.udmabuf_allocator import UdmabufAllocator
from udmabufd.linux import dmabuf
from udmabufd.linux.udmabuf import Item
from udmabufd_base.fd import OwnedFd

pytestmark = [pytest.mark.guest, pytest.mark.root]

HUGE = 2 << 20
NULL = "mem:null"
"""A device that nothing is known of and that demands nothing by itself."""


@pytest.fixture(scope="module", autouse=True)
def module() -> Iterator[None]:
    """The module, its node as systemd's rule has that of /dev/udmabuf, and a service that uses it; huge pages."""
    watch = modules.Watch()
    with huge_pages(4), modules.udmabuf_cache() as node:
        shutil.chown(node, "root", "kvm")
        node.chmod(0o660)
        with truth.configured(CONFIG):
            yield
    watch.assert_silent()


@pytest.fixture(scope="module")
def tables() -> Iterator[PageTables]:
    """The witness."""
    with PageTables() as tables:
        yield tables


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    """A connection to the service."""
    async with connected() as peer:
        assert await peer.get("UdmabufAvailable")
        yield peer


def spec_of(allocator: str, attribute: str, policy: str = "prefer") -> dict[str, Any]:
    size = HUGE if allocator == "udmabuf-2M" else 16 * PAGE
    return {"size": size, "allocator": allocator, "cache": attribute, "cache_policy": policy}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("attribute", ATTRIBUTES)
@pytest.mark.parametrize("allocator", ["udmabuf", "udmabuf-2M"])
async def test_what_is_asked_for(peer: Peer, tables: PageTables, allocator: str, attribute: str, policy: str) -> None:
    """Given, said, and there, in this process, in a child and where it was moved; ordinary again afterwards."""
    spec = spec_of(allocator, attribute, policy)
    (row,) = [row for row in await explain(peer, **spec) if row["allocator"] == allocator]
    if policy == "require" and HAD[attribute] != attribute:
        assert (row["ok"], row["field"]) == (False, "cache")
        with refused("CacheUnavailable", field="cache"):
            await peer.allocate(**spec)
        return
    path, fd, info = await peer.allocate(**spec)
    assert (info["cache_requested"], info["cache_effective"]) == (attribute, HAD[attribute])
    assert (info["cache_evidence"], info["allocator"]) == ("probe", allocator)
    assert (row["cache_effective"], row["cache_evidence"]) == (info["cache_effective"], "probe")
    assert bufinfo()[info["inode"]].exporter == modules.NAME
    assert_true(tables, fd, info)
    frames = frames_of(tables, fd, info["size"])
    assert kernels_kinds(tables, frames) == {KINDS[HAD[attribute]]}
    await release(peer, path, fd)
    await ordinary(tables, frames)


async def ordinary(tables: PageTables, frames: list[int]) -> None:
    """Wait until the kernel has these pages as all others: the service closes a buffer a moment after its client."""

    async def over() -> bool:
        return kernels_kinds(tables, frames) == {"WB"}

    await until(over)


async def test_a_new_buffer_is_zero_whatever_it_is(peer: Peer) -> None:
    """What is behind it was filled before the attribute was changed."""
    for attribute in ATTRIBUTES:
        path, fd, info = await peer.allocate(**spec_of("udmabuf", attribute))
        with area(fd.fileno(), info["size"]) as address:
            assert not at(address, info["size"]).any()
        await release(peer, path, fd)


async def test_whoever_is_not_asked_for_an_attribute_gives_cached_memory(peer: Peer, tables: PageTables) -> None:
    path, fd, info = await peer.allocate(size=PAGE)
    assert (info["allocator"], info["cache_effective"], info["cache_evidence"]) == ("udmabuf", "cached", "probe")
    assert_true(tables, fd, info)
    await release(peer, path, fd)


async def test_many_alike(peer: Peer, tables: PageTables) -> None:
    """Each of a call's buffers."""
    paths, fds, infos = await peer.call("AllocateMany", "a{sv}u", spec(size=PAGE, cache="uncached"), 4)
    for path, fd, info in zip(paths, fds, map(plain, infos), strict=True):
        assert info["cache_effective"] == "uncached"
        assert_true(tables, fd, info)
        await release(peer, path, fd)


async def test_listed_as_what_can_be_had(peer: Peer) -> None:
    rows = {row["allocator"]: row for row in await allocators(peer)}
    for name in ("udmabuf", "udmabuf-2M"):
        assert (rows[name]["cache"], rows[name]["cache_evidence"]) == ("cached", "probe")
        assert set(rows[name]["caches"]) == set(HAD.values())
        assert ("not known to combine writes" in rows[name]["sources"]["cache"]) is NOPAT
    assert rows["heap:system"]["caches"] == ["cached"]


async def test_as_devices_accept_it(peer: Peer, tables: PageTables) -> None:
    """What they accept is asked of the device, too."""
    path, fd, info = await peer.allocate(size=PAGE, constraints=demands(cache=["uncached"]))
    assert (info["allocator"], info["cache_requested"], info["cache_effective"]) == ("udmabuf", "cached", "uncached")
    assert_true(tables, fd, info)
    await release(peer, path, fd)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
async def test_devices_are_told_by_the_memory_that_there_is(peer: Peer, tables: PageTables, attribute: str) -> None:
    """Not by what else the device could be asked for, or maps usually; the memory stays as it is."""
    path, fd, info = await peer.allocate(**spec_of("udmabuf", attribute))
    has = info["cache_effective"]
    for accepted in ATTRIBUTES:
        if accepted == has:
            number, _ = await attach(peer, path, NULL, cache=[accepted])
            await detach(peer, path, number)
            continue
        with refused("Busy", field="cache", devices=(NULL,)):
            await attach(peer, path, NULL, cache=[accepted])
    assert_true(tables, fd, info)
    await release(peer, path, fd)


@pytest.mark.parametrize("count", [1, 3])
async def test_what_clients_bring_stays_cached(peer: Peer, tables: PageTables, count: int) -> None:
    """Their own mapping is cached, and another kind beside it would be an alias: for who demands it, nothing."""
    ranges = [(0, number * PAGE, PAGE) for number in reversed(range(count))]
    with clients_memfd(4 * PAGE) as brought:
        path, info = await wrap(peer, [brought], ranges)
        fd, _ = await get_fd(peer, path)
        assert (info["cache_effective"], info["cache_evidence"]) == ("cached", "probe")
        assert_true(tables, fd, info)
        await release(peer, path, fd)
        with refused("NoAllocator", field="cache"):
            await wrap(peer, [brought], ranges, constraints=demands(cache=["uncached"]))


@pytest.fixture
def allocator() -> Iterator[UdmabufAllocator]:
    """The daemon's part that exports, by itself."""
    allocator = UdmabufAllocator(modules.NODE, modules.PARAMETERS)
    assert allocator.probe()
    yield allocator
    allocator.close()


@pytest.mark.parametrize("attribute", ATTRIBUTES)
@pytest.mark.parametrize("kind", ["shmem", "hugetlb"])
def test_lists(allocator: UdmabufAllocator, tables: PageTables, kind: str, attribute: str) -> None:
    """UDMABUF_CREATE_LIST with an attribute, which no member of the contract leads to."""
    request = Request.from_spec({"size": 1, "cache": attribute})
    half = HUGE // 2
    with memory(kind, HUGE) as backing:
        exported = allocator.export_list([Item(backing.fileno(), offset, half) for offset in (half, 0)], request)
        with exported.dma_buf as fd:
            assert exported.cache == HAD[attribute]
            said = {"size": HUGE, "allocator": kind, "cache_effective": str(exported.cache)}
            assert_true(tables, fd, said)
            frames = frames_of(tables, fd, HUGE)
        assert kernels_kinds(tables, frames) == {"WB"}


async def test_it_is_the_same_after_a_restart(peer: Peer, tables: PageTables) -> None:
    """Also where the device that the service finds then is another, of which nothing is known."""
    path, fd, info = await peer.allocate(**spec_of("udmabuf", "uncached", "require"))
    await unit.killed()
    await unit.serving(peer)
    again, later = await get_fd(peer, path)
    keys = ("allocator", "cache_requested", "cache_effective", "cache_evidence", "inode")
    assert {key: later[key] for key in keys} == {key: info[key] for key in keys}
    assert_true(tables, again, later)
    await release(peer, path, fd, again)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
async def test_a_frame_and_its_importer(peer: Peer, tables: PageTables, vgem: Path, attribute: str) -> None:
    """Drawn by the CPU, and there for whoever holds it: another mapping and, when all descriptors are closed, the
    importer's, by which the service's own witness still has it byte for byte.
    """
    width, height = 333, 77
    name = f"frame-{attribute}"
    path, fd, info = await peer.allocate(
        width=width, height=height, format="XR24", cache=attribute, allocator="udmabuf", name=name
    )
    (stride,), size = info["strides"], info["size"]
    picture = np.frombuffer(secrets.token_bytes(4 * width * height), np.uint8).reshape(height, 4 * width)
    with ExitStack() as stack:
        importer = stack.enter_context(OwnedFd(os.open(vgem, os.O_RDWR | os.O_CLOEXEC)))
        with area(fd.fileno(), size) as address:
            dmabuf.sync_start(fd.fileno(), dmabuf.DMA_BUF_SYNC_WRITE)
            at(address, stride * height).reshape(height, stride)[:, : 4 * width] = picture
            dmabuf.sync_end(fd.fileno(), dmabuf.DMA_BUF_SYNC_WRITE)
            assert kinds(tables, address, PAGE) == {KINDS[HAD[attribute]]}
            prime_import(importer.fileno(), fd)
            assert bufinfo()[info["inode"]].devices == ("vgem",)
        frames = frames_of(tables, fd, size)
        seen = physical(frames)[: stride * height].reshape(height, stride)
        assert np.array_equal(seen[:, : 4 * width], picture)
        await release(peer, path, fd)
        # The importer alone has it now, and has it as it was made.
        assert bufinfo()[info["inode"]].devices == ("vgem",)
        assert kernels_kinds(tables, frames) == {KINDS[HAD[attribute]]}
        assert np.array_equal(physical(frames)[: stride * height].reshape(height, stride), seen)
    await ordinary(tables, frames)


def physical(frames: list[int]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return what is in the pages of these numbers, where a device that was given them reads: by no mapping of the
    buffer, but by the kernel's of all memory.
    """
    with KernelMemory() as kernel:
        base = kernel.word(symbols(["page_offset_base"])["page_offset_base"])
        return np.frombuffer(b"".join(kernel.read(base + frame * PAGE, PAGE) for frame in frames), np.uint8)
