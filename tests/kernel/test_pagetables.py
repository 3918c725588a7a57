# SPDX-License-Identifier: MIT
"""The witness of cache attributes against mappings whose attribute is known from elsewhere.

With page attribute tables switched off, what is write-combined otherwise is uncached, which a boot of its own shows,
as one with `no5lvl` in place of `nopat` shows four levels of tables:

    tests/vm/run --append nopat -- python3 -m pytest -p no:cacheprovider tests/kernel/test_pagetables.py
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kernel import areas
from tests.kernel.buffers import MIB, PAGE, sealed_memfd
from tests.kernel.exporters import SYSTEM_HEAP, heap_buffer
from tests.kernel.hugepools import HUGE, huge_pages
from tests.kernel.pagetables import Attribute, Mapping, NotPresentError, PageTables, main
from udmabufd.linux import dmabuf, drm, memfd, udmabuf
from udmabufd_base.fd import OwnedFd

pytestmark = pytest.mark.guest

ROOT = Path(__file__).resolve().parents[2]
NOPAT = "nopat" in Path("/proc/cmdline").read_text(encoding="ascii").split()
COMBINED = "UC-" if NOPAT else "WC"
"""What a driver gets that asks for write-combining (Documentation/arch/x86/pat.rst)."""

SIZE = 16 * PAGE
ME = os.getpid()

MEMTYPES = Path("/sys/kernel/debug/x86/pat_memtype_list")
KINDS = {
    "write-back": "WB",
    "write-combining": "WC",
    "uncached-minus": "UC-",
    "uncached": "UC",
    "write-through": "WT",
    "write-protected": "WP",
}
"""As the kernel's own list of what it has reserved of devices names them (cattr_name, arch/x86/mm/pat/memtype.c)."""

DRM_IOCTL_MODE_MAP_DUMB = 0xC01064B3  # include/uapi/drm/drm.h


@pytest.fixture(scope="module")
def tables() -> Iterator[PageTables]:
    """The witness."""
    with PageTables() as tables:
        yield tables


def kinds(attributes: list[Attribute]) -> set[str]:
    """What is there of attributes."""
    return {attribute.kind for attribute in attributes}


def frames(attributes: list[Attribute]) -> list[int]:
    """The frame numbers."""
    return [attribute.pfn for attribute in attributes]


def pagemap(address: int, size: int) -> list[int]:
    """The frame numbers as the kernel tells them itself (Documentation/admin-guide/mm/pagemap.rst)."""
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        entries = struct.unpack(f"={size // PAGE}Q", os.pread(file.fileno(), size // PAGE * 8, address // PAGE * 8))
    assert all(entry >> 63 for entry in entries), "pages that are not present"
    return [entry & ((1 << 55) - 1) for entry in entries]


@contextmanager
def dumb(node: Path) -> Iterator[tuple[OwnedFd, int, OwnedFd]]:
    """A card, the offset that maps its dumb buffer of SIZE bytes, and the buffer's dma-buf."""
    with drm.open_card(str(node)) as card:
        buffer = drm.create_dumb(card.fileno(), PAGE // 4, SIZE // PAGE)
        assert buffer.size == SIZE
        argument = bytearray(struct.pack("=IIQ", buffer.handle, 0, 0))
        fcntl.ioctl(card.fileno(), DRM_IOCTL_MODE_MAP_DUMB, argument)
        with drm.export(card.fileno(), buffer.handle) as dma_buf:
            yield card, struct.unpack("=IIQ", argument)[2], dma_buf


def test_the_processors_table(tables: PageTables) -> None:
    """Linux programs its own order, unless told not to: then it is what a processor has after a reset."""
    if NOPAT:
        assert tables.pat == ("WB", "WT", "UC-", "UC") * 2
    else:
        assert tables.pat == ("WB", "WC", "UC-", "UC", "WB", "WP", "UC-", "WT")


def test_anonymous_memory(tables: PageTables) -> None:
    """It is cached, by the process and by the kernel, and lies where pagemap says."""
    with areas.anonymous(SIZE) as address:
        areas.write(address, SIZE)
        found = tables.attributes(ME, address, SIZE)
        assert kinds(found) == kinds(tables.direct_maps(frames(found))) == {"WB"}
        assert frames(found) == pagemap(address, SIZE)
        assert {attribute.level for attribute in found} == {1}
        assert tables.attribute(ME, address + 5 * PAGE + 123) == found[5]


@pytest.mark.parametrize("pages", [1, 16, 2048])
def test_memfd(tables: PageTables, pages: int) -> None:
    """It is cached, and each page is the one that pagemap says."""
    size = pages * PAGE
    with memfd.create("witnessed", size) as file, areas.area(file.fileno(), size) as address:
        areas.write(address, size)
        found = tables.attributes(ME, address, size)
        assert kinds(found) == kinds(tables.direct_maps(frames(found))) == {"WB"}
        assert frames(found) == pagemap(address, size)
        assert len(set(frames(found))) == pages


@pytest.mark.parametrize("flags", [0, 1, 2, 4, 8, 0x10, 0xFFFFFFFF])
def test_stock_udmabuf(tables: PageTables, device: OwnedFd, flags: int) -> None:
    """It is cached whatever it was asked for, and is the pages of the memfd."""
    with sealed_memfd(SIZE) as backing, udmabuf.create(device.fileno(), backing.fileno(), 0, SIZE, flags) as dma_buf:
        with areas.area(backing.fileno(), SIZE) as memory, areas.area(dma_buf.fileno(), SIZE) as address:
            areas.read(memory, SIZE)
            areas.read(address, SIZE)
            found = tables.attributes(ME, address, SIZE)
            assert kinds(found) == kinds(tables.direct_maps(frames(found))) == {"WB"}
            assert frames(found) == pagemap(memory, SIZE)


def test_system_heap(tables: PageTables) -> None:
    """It is cached."""
    assert SYSTEM_HEAP.exists()
    with heap_buffer(SIZE) as dma_buf, areas.area(dma_buf.fileno(), SIZE) as address:
        areas.read(address, SIZE)
        found = tables.attributes(ME, address, SIZE)
        assert kinds(found) == kinds(tables.direct_maps(frames(found))) == {"WB"}


def test_vgem(tables: PageTables, vgem: Path) -> None:
    """A dumb buffer is write-combined both ways of mapping it, and by the kernel; its pages are cached afterwards."""
    with dumb(vgem) as (card, offset, dma_buf):
        with areas.area(card.fileno(), SIZE, offset) as by_card, areas.area(dma_buf.fileno(), SIZE) as by_dma_buf:
            for address in (by_card, by_dma_buf):
                areas.write(address, SIZE)
            found = tables.attributes(ME, by_card, SIZE)
            assert kinds(found) == kinds(tables.direct_maps(frames(found))) == {COMBINED}
            assert tables.attributes(ME, by_dma_buf, SIZE) == found
    assert kinds(tables.direct_maps(frames(found))) == {"WB"}


def unused_graphics_card() -> Path:
    """The folder in sysfs of the emulated VGA card, whose BARs nobody has mapped while its driver is not loaded."""
    qemu = "0x1234"
    (found,) = [one for one in Path("/sys/bus/pci/devices").iterdir() if (one / "vendor").read_text().strip() == qemu]
    assert not (found / "driver").exists(), "a driver is bound, which has mapped the BARs its own way"
    return found


@pytest.mark.parametrize(
    ("bar", "kind"), [("resource0", "UC-"), ("resource0_wc", COMBINED), ("resource2", "UC-")]
)  # Documentation/PCI/sysfs-pci.rst
def test_bar_of_a_device(tables: PageTables, bar: str, kind: str) -> None:
    """It is where the device has it, mapped as sysfs and the kernel's list say, and not in the direct map."""
    card = unused_graphics_card()
    if NOPAT and bar.endswith("_wc"):
        assert not (card / bar).exists()
        return
    begin = int((card / "resource").read_text().splitlines()[int(bar[8])].split()[0], 16)
    with open(card / bar, "r+b", buffering=0) as file:
        with areas.area(file.fileno(), PAGE) as address:
            found = tables.attribute(ME, address)
            assert (found.kind, found.pfn, found.level) == (kind, begin // PAGE, 1)
            if not NOPAT:
                assert kind in reserved(begin)
    with pytest.raises(NotPresentError):
        tables.direct_map(found.pfn)


def reserved(physical: int) -> set[str]:
    """What the kernel's own list has of a physical address. With nopat there is no such file."""
    if physical < MIB:
        return {"WB"}  # Always, and not listed (memtype_reserve, arch/x86/mm/pat/memtype.c).
    pattern = r"^PAT: \[mem (0x[0-9a-f]+)-(0x[0-9a-f]+)\] (\S+)$"
    lines = re.findall(pattern, MEMTYPES.read_text(encoding="ascii"), re.MULTILINE)
    return {KINDS[kind] for start, end, kind in lines if int(start, 16) <= physical < int(end, 16)}


def test_what_the_kernel_maps_of_devices(tables: PageTables) -> None:
    """Each mapping that ioremap() made is of the physical memory and of the kind that the kernel says."""
    restrict = Path("/proc/sys/kernel/kptr_restrict")
    before = restrict.read_text()
    restrict.write_text("1")  # With 0 the addresses are hashed.
    try:
        text = Path("/proc/vmallocinfo").read_text(encoding="ascii")
    finally:
        restrict.write_text(before)
    lines = re.findall(r"^0x([0-9a-f]+)-\S+ +\d+ .* phys=0x([0-9a-f]+) ioremap$", text, re.MULTILINE)
    assert len(lines) > 5
    seen = set()
    for virtual, physical in lines:
        found = tables.kernel(int(virtual, 16))
        assert found.pfn * PAGE == int(physical, 16)
        seen.add(found.kind)
        if not NOPAT:
            assert {found.kind} == reserved(int(physical, 16))
    assert {"WB", "UC-"} <= seen


def test_huge_pages(tables: PageTables) -> None:
    """An entry of level 2 stands for 512 pages, each of them told by its own frame number."""
    with huge_pages(2), memfd.create("huge", 2 * HUGE, huge_page=HUGE) as file:
        with areas.area(file.fileno(), 2 * HUGE) as address:
            areas.write(address, 2 * HUGE)
            found = tables.attributes(ME, address, 2 * HUGE)
            assert {(attribute.kind, attribute.level) for attribute in found} == {("WB", 2)}
            assert frames(found) == pagemap(address, 2 * HUGE)
            assert tables.attribute(ME, address + HUGE - 1) == found[511]


def test_mprotect(tables: PageTables, vgem: Path) -> None:
    """The attribute stays; without any permission there is no page."""
    with dumb(vgem) as (_, _, dma_buf), areas.area(dma_buf.fileno(), SIZE) as address:
        areas.write(address, SIZE)
        before = tables.attributes(ME, address, SIZE)
        areas.protect(address, SIZE, mmap.PROT_READ)
        assert tables.attributes(ME, address, SIZE) == before
        areas.protect(address + PAGE, PAGE, areas.PROT_NONE)
        assert tables.attribute(ME, address) == before[0]
        with pytest.raises(NotPresentError, match=f"{address + PAGE:#x}"):
            tables.attributes(ME, address, SIZE)
        areas.protect(address, SIZE, areas.READ_WRITE)
        areas.write(address, SIZE)
        assert tables.attributes(ME, address, SIZE) == before
        assert kinds(before) == {COMBINED}


def test_mremap(tables: PageTables, vgem: Path) -> None:
    """The attribute goes along; where the mapping was is nothing."""
    with dumb(vgem) as (_, _, dma_buf), areas.area(dma_buf.fileno(), SIZE) as address:
        areas.write(address, SIZE)
        before = tables.attributes(ME, address, SIZE)
        with areas.moved(address, SIZE) as to:
            areas.read(to, SIZE)
            assert tables.attributes(ME, to, SIZE) == before
            assert kinds(before) == {COMBINED}
            with pytest.raises(NotPresentError):
                tables.attribute(ME, address)


def test_fork(tables: PageTables, vgem: Path) -> None:
    """Shared pages are the same in a child, private ones until one of the two writes; each has its own tables."""
    with (
        dumb(vgem) as (_, _, dma_buf),
        areas.area(dma_buf.fileno(), SIZE) as address,
        areas.anonymous(PAGE) as private,
    ):
        areas.write(address, SIZE)
        areas.write(private, PAGE)
        before = tables.attributes(ME, address, SIZE)
        own = tables.attribute(ME, private)
        with areas.child(address, SIZE) as pid:
            assert tables.attributes(pid, address, SIZE) == before
            assert kinds(before) == {COMBINED}
            assert tables.attribute(pid, private) == own
            areas.write(private, PAGE)  # Which makes a copy for this process.
            assert tables.attribute(pid, private) == own
            assert tables.attribute(ME, private).pfn != own.pfn
            areas.protect(address, SIZE, areas.PROT_NONE)
            assert tables.attributes(pid, address, SIZE) == before
            with pytest.raises(NotPresentError):
                tables.attribute(ME, address)


def test_what_is_not_there(tables: PageTables) -> None:
    """Nothing mapped, not touched, no such process, a process without memory, no length: each raises."""
    with areas.anonymous(2 * PAGE) as address:
        areas.write(address, PAGE)
        assert tables.attribute(ME, address).kind == "WB"
        for nothing in (address + PAGE, 0):
            with pytest.raises(NotPresentError, match=f"no page at {nothing:#x}"):
                tables.attribute(ME, nothing)
        with pytest.raises(NotPresentError):
            tables.attributes(ME, address, 2 * PAGE)
        with pytest.raises(ValueError):
            tables.attributes(ME, address, 0)
        with areas.child(address, PAGE) as pid:
            tables.attribute(pid, address)
        for process in (pid, -1):
            with pytest.raises(ProcessLookupError, match=f"no process {process}"):
                tables.attribute(process, address)
        with pytest.raises(ProcessLookupError, match="no memory of its own"):
            tables.attribute(2, address)  # kthreadd


def test_mappings_of(tables: PageTables) -> None:
    """All mappings of a file are found, with permissions and offset."""
    with memfd.create("found", 2 * PAGE) as file:
        status = os.fstat(file.fileno())
        assert tables.mappings_of(ME, status.st_ino) == []
        with (
            areas.area(file.fileno(), 2 * PAGE) as whole,
            areas.area(file.fileno(), PAGE, PAGE, mmap.PROT_READ) as part,
        ):
            device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
            path = "/memfd:found (deleted)"
            assert tables.mappings_of(ME, status.st_ino) == sorted(
                [
                    Mapping(whole, whole + 2 * PAGE, "rw-s", 0, device, status.st_ino, path),
                    Mapping(part, part + PAGE, "r--s", PAGE, device, status.st_ino, path),
                ],
                key=lambda mapping: mapping.start,
            )
            with areas.child(whole, PAGE) as pid:
                assert len(tables.mappings_of(pid, status.st_ino)) == 2
        assert tables.mappings_of(ME, status.st_ino) == []


def test_command(tables: PageTables, vgem: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It prints runs of like pages, found by address and by path, and fails for what is not there."""
    with dumb(vgem) as (_, _, dma_buf), areas.area(dma_buf.fileno(), SIZE) as address:
        dmabuf.set_name(dma_buf.fileno(), "shown")
        areas.write(address, 4 * PAGE)
        (mapping,) = tables.mappings_of(ME, dmabuf.inode(dma_buf.fileno()))
        command = [sys.executable, "-m", "tests.kernel.pagetables", str(ME), mapping.path]
        output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
        lines = [line.split() for line in output.splitlines()]
        assert lines[0] == ["PAT:", *tables.pat[:-1], f"{tables.pat[-1]};", str(tables.levels), "levels"]
        assert lines[1][0] == f"{address:x}-{address + SIZE:x}"
        assert lines[3:] == [
            [f"{address:x}", "4", COMBINED, "4K", COMBINED],
            [f"{address + 4 * PAGE:x}", "12", "-", "-", "-"],
        ]
        for where in (f"{address + PAGE:#x}", f"{address + SIZE - 1:x}"):
            assert main([str(ME), where]) == 0
            assert capsys.readouterr() == (output, "")
    for arguments in ((str(ME), "/nothing"), (str(ME), "1"), ("4194305", "1")):
        assert main(arguments) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("pagetables: ")
