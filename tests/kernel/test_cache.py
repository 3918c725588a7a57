# SPDX-License-Identifier: MIT
"""Cache attributes on the kernel as it is: whatever is asked of whom, what the service says is what page tables have.

With `nopat` on the kernel's command line the same tests see other answers, and true ones.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import struct
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.bus.memfds import clients_memfd, until, wrap
from tests.bus.peer import Peer
from tests.bus.private_bus import PrivateBus
from tests.bus.service import own_service
from tests.kernel import areas, truth, unit, v4l2
from tests.kernel.areas import area
from tests.kernel.buffers import DRM_IOCTL_PRIME_FD_TO_HANDLE, PAGE
from tests.kernel.cachebuffers import at
from tests.kernel.demands import allocators, demands, explain, get_fd, modprobe, refused, release
from tests.kernel.exporters import dumb_buffer
from tests.kernel.hugepools import huge_pages
from tests.kernel.importing import Vivid
from tests.kernel.pagetables import PageTables
from tests.kernel.recording import CREATE, CREATE_LIST
from tests.kernel.truth import ATTRIBUTES, COMBINED, KINDS, NOPAT, POLICIES, assert_true, connected, kinds
from tests.kernel.witness import bufinfo
from tests.unit.tools import TOP, drop_in
from udmabufd.linux import dmabuf
from udmabufd_base.fd import OwnedFd
from udmabufd_client.importers import v4l2_abi as abi
from udmabufd_client.importers.v4l2_abi import BufType

pytestmark = [pytest.mark.guest, pytest.mark.root]

CARD = Path("/dev/dri/card0")
HUGE = 2 << 20
RECORDING = Path(__file__).with_name("recording.py")

REALLY = {
    "udmabuf": "cached",
    "udmabuf-2M": "cached",
    "heap:system": "cached",
    "dumb:card0": COMBINED,
    "memfd": "cached",
}
"""What memory of each is on this kernel, for the page tables to confirm."""

EVIDENCE = {name: "driver" if name == "dumb:card0" else "default" for name in REALLY}

DRM_IOCTL_MODE_MAP_DUMB = 0xC01064B3  # include/uapi/drm/drm.h


@pytest.fixture(scope="module", autouse=True)
def card() -> Iterator[None]:
    """vgem's card, and a service that may have it, as the manual says; huge pages."""
    assert not list(Path("/sys/class/drm").glob("card*")), "another test has left a card"
    modprobe("drm")
    with huge_pages(4), unit.drop_in("90-cards", drop_in(TOP / "systemd/udmabufd.service.in", "[Unit]")):
        with truth.configured('[drm]\ncards = ["card0"]\n'):
            modprobe("vgem")
            try:
                yield
            finally:
                unit.systemctl("stop", unit.UNIT)
                modprobe("--remove", "vgem")
    unit.systemctl("restart", unit.UNIT)


@pytest.fixture(scope="module")
def tables() -> Iterator[PageTables]:
    """The witness."""
    with PageTables() as tables:
        yield tables


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    """A connection to the service, which serves from all of them."""

    async with connected() as peer:

        async def complete() -> bool:
            return {row["allocator"] for row in await allocators(peer) if row["available"]} >= set(REALLY)

        await until(complete)
        yield peer


def spec_of(allocator: str, attribute: str, policy: str) -> dict[str, Any]:
    """Return a spec that names the allocator."""
    kind = "memfd" if allocator == "memfd" else "dma-buf"
    size = HUGE if allocator == "udmabuf-2M" else 8 * PAGE
    return {"size": size, "kind": kind, "allocator": allocator, "cache": attribute, "cache_policy": policy}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("attribute", ATTRIBUTES)
@pytest.mark.parametrize("allocator", REALLY)
async def test_of_each_allocator(peer: Peer, tables: PageTables, allocator: str, attribute: str, policy: str) -> None:
    """What it has, said as it is; refused where another is required. Explain has said so before."""
    spec = spec_of(allocator, attribute, policy)
    (row,) = [row for row in await explain(peer, **spec) if row["allocator"] == allocator]
    if policy == "require" and REALLY[allocator] != attribute:
        assert (row["ok"], row["field"]) == (False, "cache")
        assert "cache_effective" not in row
        with refused("CacheUnavailable", field="cache"):
            await peer.allocate(**spec)
        return
    path, fd, info = await peer.allocate(**spec)
    assert (info["allocator"], info["cache_requested"]) == (allocator, attribute)
    assert (info["cache_effective"], info["cache_evidence"]) == (REALLY[allocator], EVIDENCE[allocator])
    told = {key: row[key] for key in ("cache_effective", "cache_evidence")}
    assert told == {key: info[key] for key in told}
    assert_true(tables, fd, info)
    again, later = await get_fd(peer, path)
    assert {key: later[key] for key in told} == told
    await release(peer, path, fd, again)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("attribute", ATTRIBUTES)
async def test_of_whoever_has_it(peer: Peer, tables: PageTables, attribute: str, policy: str) -> None:
    """Without a name: the card for what is write-combined, the first for what nobody has, or nobody."""
    wanted = {"size": PAGE, "cache": attribute, "cache_policy": policy}
    rows = await explain(peer, **wanted)
    if attribute not in REALLY.values():
        assert rows[0]["allocator"] == "udmabuf"
        if policy == "require":
            assert not any(row["ok"] for row in rows)
            with refused("CacheUnavailable", field="cache"):
                await peer.allocate(**wanted)
            return
    expected = "dumb:card0" if attribute == COMBINED else "udmabuf"
    path, fd, info = await peer.allocate(**wanted)
    assert info["allocator"] == expected == next(row["allocator"] for row in rows if row["ok"])
    assert info["cache_effective"] == REALLY[expected]
    assert_true(tables, fd, info)
    await release(peer, path, fd)


@pytest.mark.parametrize("accepted", [["cached"], ["write-combine"], ["uncached"], ["uncached", "write-combine"]])
async def test_as_devices_accept_it(peer: Peer, tables: PageTables, accepted: list[str]) -> None:
    """Whatever is preferred: memory that they accept, or none."""
    constraints = demands(cache=accepted)
    for attribute in ATTRIBUTES:
        if not set(accepted) & set(REALLY.values()):
            with refused("NoAllocator"):
                await peer.allocate(size=PAGE, cache=attribute, constraints=constraints)
            continue
        path, fd, info = await peer.allocate(size=PAGE, cache=attribute, constraints=constraints)
        assert info["cache_effective"] in accepted
        assert_true(tables, fd, info)
        await release(peer, path, fd)


async def test_what_clients_bring(peer: Peer, tables: PageTables) -> None:
    """Cached, one range or several."""
    with clients_memfd(4 * PAGE) as brought:
        for ranges in ([(0, 0, 4 * PAGE)], [(0, 2 * PAGE, PAGE), (0, 0, PAGE)]):
            path, info = await wrap(peer, [brought], ranges)
            fd, _ = await get_fd(peer, path)
            assert (info["cache_effective"], info["cache_evidence"]) == ("cached", "default")
            assert_true(tables, fd, info)
            await release(peer, path, fd)


async def test_listed_as_it_is(peer: Peer) -> None:
    rows = {row["allocator"]: row for row in await allocators(peer)}
    for name, really in REALLY.items():
        assert (rows[name]["cache"], rows[name]["caches"]) == (really, [really])
        assert rows[name]["cache_evidence"] == EVIDENCE[name]
        assert name == "memfd" or rows[name]["sources"]["cache"]


async def test_it_is_the_same_after_a_restart(peer: Peer, tables: PageTables) -> None:
    path, fd, info = await peer.allocate(size=PAGE, cache="write-combine")
    await unit.killed()
    await unit.serving(peer)
    again, later = await get_fd(peer, path)
    keys = ("allocator", "cache_requested", "cache_effective", "cache_evidence", "inode")
    assert {key: later[key] for key in keys} == {key: info[key] for key in keys}
    assert_true(tables, again, later)
    await release(peer, path, fd, again)


def test_the_witness_tells_them_apart(tables: PageTables) -> None:
    """Of a card's buffer that the service has nothing to do with."""
    with dumb_buffer(CARD, 64) as fd, area(fd.fileno(), PAGE) as address, areas.anonymous(PAGE) as ordinary:
        areas.write(address, PAGE)
        areas.write(ordinary, PAGE)
        assert kinds(tables, address, PAGE) == {KINDS[COMBINED]} != kinds(tables, ordinary, PAGE)


async def test_a_frame_comes_back_to_its_card(peer: Peer, tables: PageTables) -> None:
    """Drawn into write-combined memory by its dma-buf's mapping, and read, byte for byte, by the card when
    it is opened again, which it comes to by PRIME and which maps it in its own way.

    No importer attaches: vgem, the only exporter of such memory on this kernel, finds its own buffer again. One that
    does is in test_a_device_attaches_to_write_combined_memory, and, for whole frames, in test_cache_module.py.
    """
    width, height = 333, 77
    path, fd, info = await peer.allocate(width=width, height=height, format="XR24", cache=COMBINED)
    assert (info["allocator"], info["cache_effective"]) == ("dumb:card0", COMBINED)
    (stride,), size = info["strides"], info["size"]
    picture = np.frombuffer(secrets.token_bytes(4 * width * height), np.uint8).reshape(height, 4 * width)
    with area(fd.fileno(), size) as address:
        dmabuf.sync_start(fd.fileno(), dmabuf.DMA_BUF_SYNC_WRITE)
        at(address, stride * height).reshape(height, stride)[:, : 4 * width] = picture
        dmabuf.sync_end(fd.fileno(), dmabuf.DMA_BUF_SYNC_WRITE)
        assert kinds(tables, address, PAGE) == {KINDS[COMBINED]}
    with OwnedFd(os.open(CARD, os.O_RDWR | os.O_CLOEXEC)) as importer:
        argument = bytearray(struct.pack("=IIi", 0, 0, fd.fileno()))
        fcntl.ioctl(importer.fileno(), DRM_IOCTL_PRIME_FD_TO_HANDLE, argument)
        assert bufinfo()[info["inode"]].devices == ()
        argument = bytearray(struct.pack("=IIQ", struct.unpack_from("=I", argument)[0], 0, 0))
        fcntl.ioctl(importer.fileno(), DRM_IOCTL_MODE_MAP_DUMB, argument)
        # The importer is another that has it once nobody else does.
        await release(peer, path, fd)
        with area(importer.fileno(), size, struct.unpack("=IIQ", argument)[2]) as address:
            areas.read(address, size)
            assert kinds(tables, address, size) == {KINDS[COMBINED]}
            seen = at(address, stride * height).reshape(height, stride)
            assert np.array_equal(seen[:, : 4 * width], picture)
            assert not seen[:, 4 * width :].any()


async def test_a_device_attaches_to_write_combined_memory(peer: Peer, tables: PageTables, vivid: Vivid) -> None:
    """A video output that takes memory in one piece, such as a page: what is drawn is there while it has it, and is
    mapped as before.
    """
    node = vivid.node(1, "vid-out")
    v4l2.ctl(node, "--set-fmt-video-out=width=32,height=32,pixelformat=XR24")
    path, fd, info = await peer.allocate(size=PAGE, cache=COMBINED)
    assert (info["allocator"], info["cache_effective"]) == ("dumb:card0", COMBINED)
    picture = np.frombuffer(secrets.token_bytes(PAGE), np.uint8)
    with area(fd.fileno(), PAGE) as address:
        dmabuf.sync_start(fd.fileno(), dmabuf.DMA_BUF_SYNC_WRITE)
        at(address, PAGE)[:] = picture
        dmabuf.sync_end(fd.fileno(), dmabuf.DMA_BUF_SYNC_WRITE)
        with OwnedFd(os.open(node, os.O_RDWR | os.O_CLOEXEC)) as output:
            request = abi.RequestBuffers(count=1, type=BufType.VIDEO_OUTPUT, memory=abi.V4L2_MEMORY_DMABUF)
            abi.call(output.fileno(), abi.VIDIOC_REQBUFS, request)
            buffer = abi.Buffer(type=BufType.VIDEO_OUTPUT, memory=abi.V4L2_MEMORY_DMABUF, length=PAGE, bytesused=PAGE)
            buffer.m.fd = fd.fileno()
            abi.call(output.fileno(), abi.VIDIOC_QBUF, buffer)
            assert bufinfo()[info["inode"]].devices == ("vivid.0",)
            assert kinds(tables, address, PAGE) == {KINDS[COMBINED]}
        assert bufinfo()[info["inode"]].devices == ()
        assert np.array_equal(at(address, PAGE), picture)
    await release(peer, path, fd)


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a service that is started with recording.py writes down what it asks udmabuf for."""
    monkeypatch.setenv("UDMABUFD_RECORD", str(tmp_path / "record"))
    return tmp_path / "record"


async def test_the_kernels_own_device_is_sent_no_flag(record: Path) -> None:
    """But for the probe's one, which has no meaning: CLOEXEC alone, whatever is asked for, by both calls."""
    with PrivateBus() as bus, own_service(bus.address, program=("-P", str(RECORDING))):
        async with connected(bus.address) as peer:
            for attribute in ATTRIBUTES:
                for allocator in ("udmabuf", "udmabuf-2M"):
                    path, fd, _ = await peer.allocate(**spec_of(allocator, attribute, "prefer"))
                    await release(peer, path, fd)
            with clients_memfd(2 * PAGE) as brought:
                path, _ = await wrap(peer, [brought], [(0, PAGE, PAGE), (0, 0, PAGE)])
                await release(peer, path)
            # And again when udev tells of the device.
            before = len(record.read_text().splitlines())
            subprocess.run(["udevadm", "trigger", "--action=change", "--settle", "/dev/udmabuf"], check=True)

            async def probed() -> bool:
                return f"{CREATE:#x} {1 << 31 | 1:#x}" in record.read_text().splitlines()[before:]

            await until(probed)
    calls = record.read_text().splitlines()
    assert set(calls) == {f"{CREATE:#x} 0x1", f"{CREATE:#x} {1 << 31 | 1:#x}", f"{CREATE_LIST:#x} 0x1"}
    assert calls.count(f"{CREATE:#x} {1 << 31 | 1:#x}") == 2
    assert calls.count(f"{CREATE:#x} 0x1") >= 6


def test_this_kernel_is_the_one_that_was_asked_for(tables: PageTables) -> None:
    """The processor has write-combining in its table, but where it was booted without."""
    assert ("WC" in tables.pat) is not NOPAT
