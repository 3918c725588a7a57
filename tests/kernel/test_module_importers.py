# SPDX-License-Identifier: MIT
"""Devices that import buffers of the module: attached with a table of the right pages, mapped by drivers, let go."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.kernel import frames, modules, v4l2
from tests.kernel.areas import area
from tests.kernel.buffers import PAGE, prime_import
from tests.kernel.cachebuffers import ATTRIBUTES, KINDS, SEALS, at, create, create_list, is_free, memory
from tests.kernel.hugepools import HUGE, huge_pages
from tests.kernel.importing import Vivid
from tests.kernel.pagetables import PageTables
from tests.kernel.witness import bufinfo
from udmabufd.linux import dmabuf, memfd, udmabuf
from udmabufd_base.fd import OwnedFd

pytestmark = pytest.mark.guest

PAGES = 32
SIZE = PAGES * PAGE
REACH = 1 << 32
STALE = 0xA5


@pytest.fixture(scope="module", autouse=True)
def module() -> Iterator[None]:
    """The module, loaded for the tests of this file, none of which the kernel may warn of."""
    watch = modules.Watch()
    with modules.udmabuf_cache():
        yield
    watch.assert_silent()


@pytest.fixture
def cache() -> Iterator[OwnedFd]:
    """/dev/udmabuf_cache, opened for reading."""
    with udmabuf.open_device(str(modules.NODE)) as fd:
        yield fd


@pytest.fixture(scope="module")
def tables() -> Iterator[PageTables]:
    """The witness."""
    with PageTables() as tables:
        yield tables


@pytest.fixture(scope="module")
def low() -> Iterator[OwnedFd]:
    """A memfd of a huge page below 4 GiB.

    vivid.0 reaches no further; for memory that is beyond it the kernel puts copies in between, which the driver, whose
    device is the processor, does not write to.
    """
    with ExitStack() as stack:
        while True:
            # What is above is given out first.
            stack.enter_context(huge_pages(64))
            backing = stack.enter_context(memfd.create("low", HUGE, huge_page=HUGE))
            memfd.populate(backing.fileno(), HUGE)
            if frames.of_file(backing.fileno(), HUGE)[0] < REACH:
                break
        memfd.add_seals(backing.fileno(), SEALS)
        yield backing


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_an_importer_outlives_everybody(cache: OwnedFd, tables: PageTables, vgem: Path, attribute: str) -> None:
    """Attached by vgem, twice over; the pages keep their attribute until it lets go, and no longer."""
    with memory("shmem", SIZE) as backing, ExitStack() as cards:
        pages = [address // PAGE for address in frames.of_file(backing.fileno(), SIZE)]
        with create(cache, backing, attribute, SIZE) as made:
            inode = dmabuf.inode(made.fileno())
            for _ in range(2):
                card = cards.enter_context(OwnedFd(os.open(vgem, os.O_RDWR | os.O_CLOEXEC)))
                prime_import(card.fileno(), made)
            assert bufinfo()[inode].devices == ("vgem", "vgem")
            # With importers there is something to make coherent.
            dmabuf.sync_start(made.fileno(), dmabuf.DMA_BUF_SYNC_READ | dmabuf.DMA_BUF_SYNC_WRITE)
            dmabuf.sync_end(made.fileno(), dmabuf.DMA_BUF_SYNC_READ | dmabuf.DMA_BUF_SYNC_WRITE)
        assert bufinfo()[inode].exporter == modules.NAME
        assert {page.kind for page in tables.direct_maps(pages)} == {KINDS[attribute]}
        assert not is_free(backing)
        cards.close()
        assert inode not in bufinfo()
        assert {page.kind for page in tables.direct_maps(pages)} == {"WB"}
        assert is_free(backing)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
@pytest.mark.parametrize("instance", [0, 1])
def test_a_frame_arrives(
    cache: OwnedFd, vivid: Vivid, low: OwnedFd, tmp_path: Path, instance: int, attribute: str
) -> None:
    """Byte for byte, in a huge page: mapped for the driver alone, and attached as one piece."""
    node = vivid.node(instance)
    v4l2.still(node, 320, 180, "YUYV")
    expected = v4l2.reference(node, tmp_path)
    with create(cache, low, attribute, HUGE) as made, area(made.fileno(), HUGE) as address:
        at(address, HUGE)[:] = STALE
        with v4l2.queued(node, [made, made]) as camera:
            if instance:
                assert set(bufinfo()[dmabuf.inode(made.fileno())].devices) == {"vivid.0"}
            frame, *_ = v4l2.frames(camera, 2)
        assert frame.size == len(expected)
        assert at(address, HUGE)[: frame.size].tobytes() == expected
        assert set(at(address, HUGE)[frame.size :].tolist()) == {STALE}
    assert os.pread(low.fileno(), len(expected), 0) == expected


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_a_driver_maps_it_alike(
    cache: OwnedFd, tables: PageTables, vivid: Vivid, low: OwnedFd, attribute: str
) -> None:
    """Where the kernel's own list has the mapping that vivid made by vmap(); none is left when it has let go."""
    v4l2.still(vivid.mapped, 320, 180, "YUYV")
    assert vmaps() == []
    with create(cache, low, attribute, HUGE) as made:
        with v4l2.queued(vivid.mapped, [made]):
            (start,) = vmaps()
            found = [tables.kernel(address) for address in range(start, start + SIZE, PAGE)]
            assert {page.kind for page in found} == {KINDS[attribute]}
            assert [page.pfn * PAGE for page in found] == frames.of_file(low.fileno(), SIZE)
        assert vmaps() == []


def vmaps() -> list[int]:
    """Return the addresses at which drivers have buffers of the module mapped, by the kernel's list."""
    restrict = Path("/proc/sys/kernel/kptr_restrict")
    before = restrict.read_text()
    restrict.write_text("1")  # With 0 the addresses are hashed.
    try:
        text = Path("/proc/vmallocinfo").read_text(encoding="ascii")
    finally:
        restrict.write_text(before)
    pattern = rf"^0x([0-9a-f]+)-\S+ +\d+ \S+ \[{modules.NAME}\] .*\bvmap\b"
    return [int(start, 16) for start in re.findall(pattern, text, re.MULTILINE)]


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_the_table_has_the_pages_in_order(cache: OwnedFd, vivid: Vivid, low: OwnedFd, attribute: str) -> None:
    """An importer that takes one piece alone takes pages that adjoin, and refuses the same ones in reverse order."""
    v4l2.still(vivid.contiguous, 320, 180, "YUYV")
    ordered = [(low, offset, PAGE) for offset in range(0, SIZE, PAGE)]
    with create_list(cache, ordered, attribute) as made:
        accepts(vivid.contiguous, [made])
    with create_list(cache, ordered[::-1], attribute) as made, pytest.raises(OSError) as caught:
        accepts(vivid.contiguous, [made])
    assert caught.value.errno == errno.EFAULT


def accepts(node: Path, buffers: Sequence[OwnedFd]) -> None:
    """Have a camera take buffers in its queue, and let them go."""
    with v4l2.queued(node, buffers):
        pass
