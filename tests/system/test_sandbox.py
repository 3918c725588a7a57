# SPDX-License-Identifier: MIT
"""What the sandbox of udmabufd.service lets it do with heaps, huge pages, cards and sysfs, and what only by drop-ins.

The drop-ins are those that the shipped files show, word for word. What the allocators do is left to tests/kernel.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.bus.peer import Peer, plain
from tests.kernel import unit
from tests.kernel.demands import allocators, modprobe, refused, release
from tests.kernel.hugepools import free_huge_pages, huge_pages
from tests.unit.tools import TOP, drop_in
from udmabufd.core.events import Event
from udmabufd_base.fd import OwnedFd

pytestmark = [pytest.mark.guest, pytest.mark.root]

BUS = "unix:path=/run/dbus/system_bus_socket"
HEAP = Path("/dev/dma_heap/system")
CONFIG = Path("/run/udmabufd/udmabufd.toml.d/90-test.toml")
SIZE = 1 << 20


def exporter(fd: OwnedFd) -> str:
    """Return who exports a dma-buf, as the kernel has it."""
    lines = Path(f"/proc/self/fdinfo/{fd.fileno()}").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("exp_name:"))


@asynccontextmanager
async def connected() -> AsyncIterator[Peer]:
    """A connection to the installed service, as it runs now."""
    peer = await Peer.connect(BUS)
    try:
        await unit.serving(peer)
        yield peer
    finally:
        peer.close()


async def row(peer: Peer, allocator: str) -> dict[str, Any]:
    """Return what the service says of one of its allocators; one that it does not list cannot serve."""
    unlisted = {"available": False, "reason": "it is not listed"}
    return next((entry for entry in await allocators(peer) if entry["allocator"] == allocator), unlisted)


async def available(peer: Peer, allocator: str) -> None:
    """Wait until an allocator whose device was announced a moment ago serves."""
    async with asyncio.timeout(unit.PATIENCE):
        while True:
            if (await row(peer, allocator))["available"]:
                return
            await asyncio.sleep(0.2)


async def serves(peer: Peer, allocator: str, exported_by: str, size: int = SIZE) -> dict[str, Any]:
    """Have a buffer made by this allocator and no other; return its info."""
    path, fd, info = await peer.allocate(size=size, allocator=allocator)
    assert info["allocator"] == allocator
    assert info["size"] == size
    assert exporter(fd) == exported_by
    await release(peer, path, fd)
    return info


@contextmanager
def heaps_announced(rule: str = "") -> Iterator[None]:
    """Have udev see the heaps again, with a rule of somebody else's, as long as this lasts."""
    file = Path("/run/udev/rules.d/60-others-heaps.rules")

    def announce() -> None:
        for command in (("control", "--reload"), ("trigger", "--subsystem-match=dma_heap"), ("settle",)):
            subprocess.run(["udevadm", *command], check=True)

    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(rule)
    try:
        announce()
        yield
    finally:
        file.unlink()
        announce()


@pytest.fixture
def restarted_afterwards() -> Iterator[None]:
    """Leave the service as it was found."""
    yield
    CONFIG.unlink(missing_ok=True)
    unit.systemctl("restart", unit.UNIT)


async def test_a_heap_is_served() -> None:
    assert (HEAP.owner(), HEAP.group(), HEAP.stat().st_mode & 0o777) == ("root", "udmabufd", 0o660)
    async with connected() as peer:
        assert (await row(peer, "heap:system"))["available"]
        await serves(peer, "heap:system", "system")


@pytest.mark.usefixtures("restarted_afterwards")
async def test_a_heap_of_another_group_is_left_to_it() -> None:
    with heaps_announced('SUBSYSTEM=="dma_heap", GROUP="video"\n'):
        assert (HEAP.group(), HEAP.stat().st_mode & 0o777) == ("video", 0o660)
        unit.systemctl("restart", unit.UNIT)
        async with connected() as peer:
            refusal = await row(peer, "heap:system")
            assert not refusal["available"]
            assert "may not open it" in refusal["reason"]
            with refused("NoAllocator"):
                await peer.allocate(size=SIZE, allocator="heap:system")
        # What the rule's own comment says is to be done then.
        example = drop_in(TOP / "systemd/00-udmabufd-heaps.rules", "[Service]")
        with unit.drop_in("90-heaps", example.replace("thatgroup", "video")):
            unit.systemctl("restart", unit.UNIT)
            async with connected() as peer:
                await serves(peer, "heap:system", "system")
    assert HEAP.group() == "udmabufd"


async def test_huge_pages_are_served() -> None:
    with huge_pages(2):
        async with connected() as peer:
            await serves(peer, "udmabuf-2M", "udmabuf", 2 << 20)
            path, fd, _ = await peer.allocate(size=2 << 20, allocator="udmabuf-2M")
            assert free_huge_pages() == 1
            await release(peer, path, fd)
        # The pool of the next test is set aside anew.
        await unit.until(lambda: free_huge_pages() == 2)


@pytest.mark.usefixtures("restarted_afterwards")
async def test_a_card_is_served_with_the_drop_in_only() -> None:
    assert not list(Path("/sys/class/drm").glob("card*")), "another test has left a card"
    CONFIG.parent.mkdir(parents=True, exist_ok=True)
    CONFIG.write_text('[drm]\ncards = ["card0"]\n')
    # The guest has no modprobe@.service, by which the drop-in has the class there first.
    modprobe("drm")
    try:
        with unit.drop_in("90-cards", drop_in(TOP / "systemd/udmabufd.service.in", "[Unit]")):
            unit.systemctl("restart", unit.UNIT)
            async with connected() as peer:
                # It comes after the service has started, and is opened all the same.
                modprobe("vgem")
                assert Path("/dev/dri/card0").group() == "video"
                await available(peer, "dumb:card0")
                await serves(peer, "dumb:card0", "drm")
        unit.systemctl("restart", unit.UNIT)
        async with connected() as peer:
            refusal = await row(peer, "dumb:card0")
            assert not refusal["available"]
            assert "may not open it" in refusal["reason"]
            with refused("NoAllocator"):
                await peer.allocate(size=SIZE, allocator="dumb:card0")
            command = ["journalctl", "--output=cat", f"MESSAGE_ID={Event.ALLOCATOR_GONE.message_id}"]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            assert any(refusal["reason"] in line and "dumb:card0" in line for line in said.splitlines())
    finally:
        unit.systemctl("stop", unit.UNIT)
        modprobe("--remove", "vgem")


async def test_what_sysfs_and_the_kernel_tell_is_read() -> None:
    pid = unit.show("MainPID")["MainPID"]
    inside = ["nsenter", "--mount", "--target", pid, "setpriv", "--reuid=udmabufd", "--clear-groups"]
    pools = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages"
    for path in ("/proc/zoneinfo", "/proc/meminfo", "/proc/cmdline", pools):
        subprocess.run([*inside, "cat", path], check=True, stdout=subprocess.DEVNULL)
    modprobe("bochs")
    try:
        async with connected() as peer:
            (rows,) = await peer.call("ListDevices")
            (card,) = (found for found in map(plain, rows) if found.get("driver") == "bochs-drm")
            assert card["subsystem"] == "drm"
            device = Path("/sys/class/drm", Path(card["device"]).name, "device")
            assert card["dma_mask_bits"] == int((device / "dma_mask_bits").read_text())
            assert card["dma_device"] == f"pci:{device.resolve().name}"
            # The driver takes no memory but its own card's, so that the mask says nothing of other memory.
            assert plain(card["constraints"]) == {"allocators": [f"dumb:{Path(card['device']).name}"]}
            assert card["sources"]["allocators"]
    finally:
        modprobe("--remove", "bochs")
