# SPDX-License-Identifier: MIT
"""Constraints decide where memory comes from: what the installed service gives, as kernel and page tables have it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.bus.memfds import until, usage
from tests.bus.peer import Peer, error, plain, spec
from tests.bus.service import RunningService
from tests.kernel import frames, unit
from tests.kernel.buffers import MIB, PAGE, mapped
from tests.kernel.demands import (
    allocators,
    attach,
    create,
    demands,
    explain,
    get_fd,
    made_up,
    numbers,
    refused,
    release,
)
from tests.kernel.hugepools import free_huge_pages, huge_pages
from tests.kernel.witness import bufinfo
from udmabufd_base.errors import RemoteError

pytestmark = [pytest.mark.guest, pytest.mark.root]

DEVICES: dict[str, dict[str, object]] = {
    "null": {"allocators": ["heap:system"]},
    "zero": {"allocators": ["udmabuf", "udmabuf-2M"], "stride_alignment": 1536},
    "full": {"address_bits": 20},
    "random": {"contiguous": True, "max_stride": 1024},
    "urandom": {"stride_alignment": 65536},
    "kmsg": {"stride_alignment": 65537},
}
"""What the database is made to say, by name in the subsystem mem."""


@pytest.fixture(scope="module", autouse=True)
def devices(service: RunningService) -> Iterator[None]:
    """A service that knows them; afterwards one that does not."""
    with made_up(DEVICES):
        unit.systemctl("restart", unit.UNIT)
        yield
    unit.systemctl("restart", unit.UNIT)


def pool_is_whole(count: int) -> Any:
    """Return a condition for until(): nobody has any of so many huge pages any more."""

    async def whole() -> bool:
        return free_huge_pages() == count

    return whole


# ---- contiguous memory ----------------------------------------------------------------------------------------------


async def test_a_pool_of_eight_huge_pages(service: RunningService, peer: Peer) -> None:
    """Eight contiguous buffers, by the page frames; the ninth goes elsewhere, or nowhere, as it demands."""
    size, contiguous = 2 * MIB, demands(contiguous=True)
    with refused("NoAllocator", devices=("contiguous",)):
        await peer.allocate(size=size, constraints=contiguous)
    remedies = {row["allocator"]: row["remedy"] for row in await explain(peer, size=size, constraints=contiguous)}
    assert "nr_hugepages" in remedies["udmabuf-2M"]
    with huge_pages(8):
        pid, held, taken = service.pid, [], set()
        for number in range(8):
            path, fd, info = await peer.allocate(size=size, name=f"huge-{number}", constraints=contiguous)
            assert (info["allocator"], info["size"]) == ("udmabuf-2M", size)
            addresses = frames.of_buffer(pid, f"huge-{number}", size)
            assert frames.runs(addresses) == 1
            assert addresses[0] % size == 0
            with mapped(fd, size) as view:
                assert not view.tobytes().strip(b"\0")
            taken.add(addresses[0])
            held.append((path, fd))
        assert len(taken) == 8
        assert free_huge_pages() == 0

        # That the pool is empty is no matter of what suits: it shows when somebody allocates.
        for wanted in ({"constraints": contiguous}, {"allocator": "udmabuf-2M"}):
            with refused("OutOfMemory"):
                await peer.allocate(size=size, **wanted)
        elsewhere = demands(allocators=["udmabuf-2M", "heap:system"])
        path, fd, info = await peer.allocate(size=size, constraints=elsewhere)
        assert (info["allocator"], bufinfo()[info["inode"]].exporter) == ("heap:system", "system")
        await release(peer, path, fd)
        # Nor does anybody get one of two.
        await release(peer, held[0][0], held[0][1])
        await until(pool_is_whole(1))
        with refused("OutOfMemory"):
            await peer.call("AllocateMany", "a{sv}u", spec(size=size, constraints=contiguous), 2)
        await until(pool_is_whole(1))
        held[0] = (await peer.allocate(size=size, constraints=contiguous))[:2]
        for path, fd in held:
            await release(peer, path, fd)
        await until(pool_is_whole(8))


async def test_a_small_buffer_costs_the_page_that_it_takes(peer: Peer) -> None:
    """And says so: in info, to the kernel, in the list and in the ledger."""
    before = (await usage(peer, 0))["bytes"]
    with huge_pages(2):
        path, fd, info = await peer.allocate(size=64 * 1024, constraints=demands(contiguous=True))
        assert (info["size"], info["size_requested"]) == (2 * MIB, 64 * 1024)
        assert os.lseek(fd.fileno(), 0, os.SEEK_END) == bufinfo()[info["inode"]].size == 2 * MIB
        assert free_huge_pages() == 1
        (entry,) = [row for row in map(plain, (await peer.call("ListBuffers"))[0]) if row["buffer"] == path]
        assert (entry["charged"], entry["size"]) == (2 * MIB, 2 * MIB)
        assert await peer.get("Size", path=path) == 2 * MIB
        assert (await usage(peer, 0))["bytes"] - before == 2 * MIB
        await release(peer, path, fd)
        await until(pool_is_whole(2))


async def test_one_page_is_contiguous_anywhere(service: RunningService, peer: Peer) -> None:
    """And four in four segments: what is counted is physical runs."""
    for count, wanted in ((1, demands(contiguous=True)), (4, demands(max_segments=4, alignment=PAGE))):
        path, fd, info = await peer.allocate(size=count * PAGE, name="few-pages", constraints=wanted)
        assert info["allocator"] == "udmabuf"
        assert frames.runs(frames.of_buffer(service.pid, "few-pages", count * PAGE)) <= count
        await release(peer, path, fd)
    with refused("NoAllocator", devices=("max_segments",)):
        await peer.allocate(size=5 * PAGE, constraints=demands(max_segments=4))


# ---- whose memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted",
    [
        {"allocator": "heap:system"},
        {"constraints": demands(allocators=["heap:system"])},
        {"constraints": demands(allocators=["heap:*", "dumb:*"])},
        {"devices": ["mem:null"]},
    ],
    ids=["spec.allocator", "by name", "by pattern", "by device"],
)
async def test_the_heap_serves_where_udmabuf_is_excluded(peer: Peer, wanted: dict[str, Any]) -> None:
    """The kernel says who exported it; its bytes are zeros and keep what is written."""
    path, fd, info = await peer.allocate(size=3 * PAGE, name="of-the-heap", **wanted)
    known = bufinfo()[info["inode"]]
    assert (known.exporter, known.size, known.name) == ("system", 3 * PAGE, "of-the-heap")
    assert (info["allocator"], info["size"]) == ("heap:system", 3 * PAGE)
    with mapped(fd, 3 * PAGE) as view:
        assert not view.tobytes().strip(b"\0")
        view[:5] = b"bytes"
    again, _ = await get_fd(peer, path)
    with mapped(again, 3 * PAGE) as view:
        assert view[:5].tobytes() == b"bytes"
    await release(peer, path, fd, again)


async def test_addresses(peer: Peer) -> None:
    """A device that reaches all of this machine's memory is served; one bit less, and nothing is known to suit."""
    bits = frames.highest_address().bit_length()
    for wide in (bits, bits + 1, 64):
        path, fd, info = await peer.allocate(size=PAGE, constraints=demands(address_bits=wide))
        assert info["allocator"] == "udmabuf"
        await release(peer, path, fd)
    for narrow in (bits - 1, 24, 1):
        with refused("NoAllocator", devices=("address_bits",)):
            await peer.allocate(size=PAGE, constraints=demands(address_bits=narrow))
        rows = {
            row["allocator"]: row for row in await explain(peer, size=PAGE, constraints=demands(address_bits=narrow))
        }
        for name in ("udmabuf", "heap:system"):
            assert (rows[name]["ok"], rows[name]["field"], rows[name]["device"]) == (False, "address_bits", "spec")
            assert str(narrow) in rows[name]["reason"]
            assert str(bits) in rows[name]["reason"]


# ---- what cannot be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "field"),
    [
        ("mem:null", "mem:zero", "allocators"),
        ("mem:zero", "mem:random", "max_stride"),
        ("mem:urandom", "mem:kmsg", "stride_alignment"),
    ],
)
async def test_devices_that_nothing_suits_together(peer: Peer, first: str, second: str, field: str) -> None:
    """By whatever way both come: refused with the field and both names, and nothing is left of it."""
    picture = {"width": 100, "height": 1, "format": "XR24"}
    before = bufinfo().keys()
    for pair in ((first, second), (second, first)):
        with refused("IncompatibleConstraints", field=field, devices=pair):
            await peer.allocate(devices=list(pair), **picture)
        with refused("IncompatibleConstraints", field=field, devices=pair):
            await create(peer, devices=list(pair), **picture)
        for row in await explain(peer, devices=list(pair), **picture):
            assert (row["ok"], row["field"], row["device"] in pair) == (False, field, True)
            assert all(device in row["reason"] for device in pair)
        one, another = pair
        path = await create(peer, devices=[one], **picture)
        merged = await peer.get("Constraints", path=path)
        with refused("IncompatibleConstraints", field=field, devices=pair):
            await attach(peer, path, another)
        assert await numbers(peer, path) == [1]
        assert await peer.get("Constraints", path=path) == merged
        await release(peer, path)
    assert bufinfo().keys() == before


async def test_a_device_that_nothing_suits_alone(peer: Peer) -> None:
    """No other device is to blame: NoAllocator, and each allocator's row says for which key, and for whom."""
    with refused("NoAllocator", devices=("address_bits", "mem:full")):
        await peer.allocate(size=PAGE, devices=["mem:full"])
    path = await create(peer, size=PAGE)
    with refused("NoAllocator", devices=("address_bits", "mem:full")):
        await attach(peer, path, "mem:full")
    assert await numbers(peer, path) == []
    await release(peer, path)
    rows = await explain(peer, size=PAGE, devices=["mem:full"])
    assert not [row for row in rows if row["ok"]]
    assert {row["device"] for row in rows if row["field"] == "address_bits"} == {"mem:full"}


async def test_devices_that_there_are_not(peer: Peer) -> None:
    """By node, name and path; and what can be none."""
    for name in ("/dev/video77", "mem:nothing", "/sys/class/mem/nothing"):
        with refused("NoSuchDevice"):
            await peer.allocate(size=PAGE, devices=[name])
    with refused("InvalidSpec", field="devices"):
        await peer.allocate(size=PAGE, devices=["/etc/passwd"])


# ---- Explain --------------------------------------------------------------------------------------------------------

SPECS: dict[str, dict[str, Any]] = {
    "a page": {"size": PAGE},
    "a memfd": {"size": PAGE, "kind": "memfd"},
    "contiguous": {"size": 1 * MIB, "constraints": demands(contiguous=True)},
    "contiguous, two huge pages": {"size": 3 * MIB, "constraints": demands(contiguous=True)},
    "two huge pages": {"size": 3 * MIB, "constraints": demands(max_segments=2)},
    "32 bits": {"size": PAGE, "constraints": demands(address_bits=32)},
    "31 bits": {"size": PAGE, "constraints": demands(address_bits=31)},
    "aligned to a page": {"size": PAGE, "constraints": demands(alignment=PAGE)},
    "aligned to 2 MiB": {"size": PAGE, "constraints": demands(alignment=2 * MIB)},
    "64 segments": {"size": 64 * PAGE, "constraints": demands(max_segments=64, segment_boundary=PAGE)},
    "too short a segment": {
        "size": 64 * PAGE,
        "constraints": demands(max_segments=64, max_segment_size=PAGE // 2),
    },
    "write-combining, if possible": {"size": PAGE, "cache": "write-combine"},
    "write-combining": {"size": PAGE, "cache": "write-combine", "cache_policy": "require"},
    "uncached, by constraint": {"size": PAGE, "constraints": demands(cache=["uncached"])},
    "no udmabuf": {"size": PAGE, "constraints": demands(allocators=["heap:*", "udmabuf-2M"])},
    "a heap's device": {"size": PAGE, "devices": ["mem:null"]},
    "udmabuf's device": {"width": 100, "height": 10, "format": "NV12", "devices": ["mem:zero"]},
    "impossible": {"size": PAGE, "devices": ["mem:full", "mem:null"]},
    "more than udmabuf may": {"size": 64 * MIB + 1},
}


@pytest.mark.parametrize("what", SPECS)
async def test_explain_says_what_allocate_does(peer: Peer, what: str) -> None:
    """The first row that is ok serves; by name each serves that is ok, and no other; and nothing was made to know."""
    wanted = SPECS[what]
    with huge_pages(3):
        before = bufinfo().keys()
        rows = await explain(peer, **wanted)
        assert bufinfo().keys() == before
        assert [row["allocator"] for row in rows] == [row["allocator"] for row in await allocators(peer)]
        assert all({"field", "device", "reason", "remedy"} <= row.keys() for row in rows if not row["ok"])
        assert all(row["reason"] for row in rows if not row["ok"])
        serving = [row["allocator"] for row in rows if row["ok"]]
        assert await served_by(peer, wanted) == (serving[0] if serving else None)
        for row in rows:
            name = row["allocator"]
            expected = name if row["ok"] else None
            assert await served_by(peer, wanted | {"allocator": name}) == expected, row
        await until(pool_is_whole(3))


async def served_by(peer: Peer, wanted: dict[str, Any]) -> str | None:
    """Allocate, and return the allocator that info names, which the kernel bears out; None where it is refused."""
    try:
        path, fd, info = await peer.allocate(**wanted)
    except RemoteError as caught:
        # memfd for a dma-buf, and the like, is a contradiction in the spec itself.
        kinds = {error(name) for name in ("NoAllocator", "KernelLimit", "CacheUnavailable", "InvalidSpec")}
        assert caught.name in kinds, caught
        return None
    if info["kind"] == "dma-buf":
        exporter = bufinfo()[info["inode"]].exporter
        assert exporter == info["allocator"].removeprefix("heap:").removesuffix("-2M")
    await release(peer, path, fd)
    return str(info["allocator"])
