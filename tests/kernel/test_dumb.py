# SPDX-License-Identifier: MIT
"""The allocators dumb:<card> by themselves: memory that stays, of cards that a compositor can still have."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.buffers import MIB, PAGE, drop_caches, mapped, poison_free_memory
from tests.kernel.given import (
    assert_as_told,
    assert_nothing_left_without_descriptors,
    bytes_not_zero,
    charged,
    discharged,
    given,
    request,
)
from tests.kernel.witness import bufinfo, descriptors
from udmabufd.core.database import DumbFacts
from udmabufd.core.dumb_allocator import DumbAllocator
from udmabufd.core.errors import NoAllocator
from udmabufd.core.memory import Accounting
from udmabufd.linux import boot, drm, memfd
from udmabufd_client.contract import Cache, CacheEvidence

pytestmark = pytest.mark.guest

DRIVERS = {"vgem": ("drm", Cache.WRITE_COMBINE), "virtio_gpu": ("virtio_gpu", Cache.CACHED)}
"""Of each: who exports its dma-bufs, and how they are mapped."""

PAT_IS_USED = Path("/sys/kernel/debug/x86/pat_memtype_list")
"""There only if the kernel uses page attribute tables (arch/x86/mm/pat/memtype.c)."""

A_COMPOSITOR = """
import fcntl, os, sys
card = os.open(sys.argv[1], os.O_RDWR)
for number, size in ((0x40046411, 4), (0x641e, 0), (0xc06864a2, 104)):  # AUTH_MAGIC, SET_MASTER, MODE_SETCRTC
    try:
        fcntl.ioctl(card, number, bytes(size))
        print(0)
    except OSError as error:
        print(error.errno)
"""
"""Opens a card as compositors do, and prints the errno of what only a master may."""


@pytest.fixture(scope="module", params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> Iterator[str]:
    """A driver, loaded until the end of its tests: compositors of other tests would render on it."""
    module: str = request.param
    loaded = Path("/sys/module", module).exists()
    subprocess.run(["modprobe", module], check=True)
    yield module
    if not loaded:
        subprocess.run(["modprobe", "--remove", module], check=True)


@pytest.fixture
def node(driver: str) -> Path:
    """The node of the driver's card."""
    # "virtio_gpu dev=0000:00:05.0 unique=0000:00:05.0": no link in sysfs leads from this card to the driver's name.
    names = {file: file.read_text().split()[0] for file in Path("/sys/kernel/debug/dri").glob("[0-9]/name")}
    (minor,) = [file.parent.name for file, name in names.items() if name == driver]
    node = Path(f"/dev/dri/card{minor}")
    subprocess.run(["udevadm", "wait", "--settle", "--timeout=30", node], check=True)
    return node


@pytest.fixture
def dumb(driver: str, node: Path) -> Iterator[DumbAllocator]:
    """The allocator of that card, probed."""
    allocator = DumbAllocator(node, DumbFacts(DRIVERS[driver][1], False, "a test"))
    assert allocator.probe()
    yield allocator
    allocator.close()


def answers_to_a_compositor(node: Path) -> list[int]:
    """The errno of each thing that another process, of an ordinary user, tries with the card."""
    command = [sys.executable, "-c", A_COMPOSITOR, str(node)]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, user="alice", group="video", extra_groups=[]
    )
    return [int(line) for line in done.stdout.split()]


@pytest.mark.parametrize("pages", [1, 3, 2048])
def test_gives_what_it_tells(dumb: DumbAllocator, driver: str, node: Path, pages: int) -> None:
    """Size, exporter, name, attributes, descriptors, and the name of the card."""
    assert dumb.name == f"dumb:{node.name}"
    with given(dumb, pages * PAGE) as memory:
        assert_as_told(memory, dumb, pages * PAGE, DRIVERS[driver][0])
        assert memory.evidence is CacheEvidence.DRIVER
    assert memory.inode not in bufinfo()


def test_memory_is_zero(dumb: DumbAllocator) -> None:
    """Also when what lies about is not."""
    poison_free_memory(256 * MIB)
    with given(dumb, 16 * MIB) as memory:
        assert bytes_not_zero(memory) == 0


def test_charged_to_the_service_at_once(dumb: DumbAllocator) -> None:
    """All of it when it is made, nothing more when it is used, nothing after its end."""
    before = charged()
    with given(dumb, 32 * MIB) as memory:
        assert memory.accounting is Accounting.SERVICE
        made = charged() - before
        assert abs(made - 32 * MIB) < 4 * MIB
        with mapped(memory.exported, memory.size) as view:
            view[::PAGE] = bytes(memory.size // PAGE)
            assert charged() - before - made < 4 * MIB
    assert discharged(before, 4 * MIB)


def test_data_stay_while_nobody_uses_it(dumb: DumbAllocator) -> None:
    """What a client has written and unmapped is there after the kernel has dropped all that it may drop."""
    with given(dumb, 8 * MIB) as memory:
        with mapped(memory.exported, memory.size) as view:
            view[::PAGE] = b"\x07" * (memory.size // PAGE)
        drop_caches()
        with mapped(memory.exported, memory.size) as view:
            assert view[::PAGE].tobytes().count(7) == memory.size // PAGE


def test_no_descriptor_left(dumb: DumbAllocator) -> None:
    """Wherever it fails, nothing is left: no handle either, which would keep the memory."""
    before = charged()
    assert_nothing_left_without_descriptors(dumb, 16 * MIB)
    assert discharged(before, 8 * MIB)


def test_another_process_can_set_modes(dumb: DumbAllocator, node: Path) -> None:
    """While the allocator has the card open and has given memory of it, a compositor that comes is its master."""
    with given(dumb, PAGE):
        assert str(node) in descriptors()
        magic, master, mode = answers_to_a_compositor(node)
        assert (magic, master) == (errno.EINVAL, 0)
        assert mode not in (0, errno.EACCES)  # There is no CRTC 0, but it may ask.
        # The witness: whoever does not give that right up keeps it from others.
        with drm.open_card(str(node)) as other:
            assert drm.is_master(other.fileno())
            assert answers_to_a_compositor(node) == [errno.EACCES, errno.EACCES, errno.EACCES]
            drm.drop_master(other.fileno())
            assert not drm.is_master(other.fileno())
            drm.set_master(other.fileno())
            assert drm.is_master(other.fileno())


def test_a_master_that_was_there_before_stays(driver: str, node: Path) -> None:
    """A running compositor does not notice that the card is opened."""
    with drm.open_card(str(node)) as compositor:
        allocator = DumbAllocator(node, DumbFacts(DRIVERS[driver][1], False, "a test"))
        assert allocator.probe()
        with given(allocator, PAGE):
            assert drm.is_master(compositor.fileno())
        allocator.close()
        assert drm.is_master(compositor.fileno())


def test_nothing_is_known_of_the_driver(driver: str, node: Path) -> None:
    """It is named, and its card not kept open."""
    allocator = DumbAllocator(node, None)
    assert not allocator.probe()
    (refusal,) = allocator.match(request(PAGE))
    assert f"of the driver {driver} are like is not known" in refusal.reason
    assert "devices.d" in refusal.remedy
    assert str(node) not in descriptors()
    with pytest.raises(NoAllocator, match=allocator.name):
        allocator.allocate(request(PAGE), "none", memfd.populate)


def test_the_limit_is_the_kernels(dumb: DumbAllocator, driver: str, node: Path) -> None:
    """A page more than max_size: refused beforehand, and by the kernel if it is asked."""
    (refusal,) = dumb.match(request(dumb.max_size + PAGE))
    assert isinstance(refusal.error, NoAllocator)
    with pytest.raises(NoAllocator):
        dumb.allocate(request(dumb.max_size + PAGE), "too large", memfd.populate)
    with drm.open_card(str(node)) as card:
        with pytest.raises(OSError) as caught:
            drm.create_dumb(card.fileno(), PAGE // 4, dumb.max_size // PAGE + 1)
        assert caught.value.errno == errno.EINVAL
        if driver == "vgem":  # Which makes no pages before it is mapped.
            largest = drm.create_dumb(card.fileno(), PAGE // 4, dumb.max_size // PAGE)
            assert (largest.pitch, largest.size) == (PAGE, dumb.max_size)
            drm.destroy_dumb(card.fileno(), largest.handle)


def test_a_card_that_is_none(tmp_path: Path) -> None:
    """Absent, or another device."""
    (tmp_path / "card1").symlink_to("/dev/null")
    for name, reason in (("card0", "the node is not there"), ("card1", "Inappropriate ioctl")):
        allocator = DumbAllocator(tmp_path / name, None)
        assert not allocator.probe()
        assert allocator.unavailable is not None
        assert reason in allocator.unavailable.reason
        assert allocator.max_size == 0


def test_write_combining_is_what_the_kernel_does(dumb: DumbAllocator, driver: str) -> None:
    """As the kernel's own list tells, with `nopat` on the command line and without."""
    combines = PAT_IS_USED.exists()
    assert boot.write_combining() == combines
    told = DRIVERS[driver][1]
    expected = Cache.UNCACHED if told is Cache.WRITE_COMBINE and not combines else told
    assert dumb.capabilities.cache is expected
    assert combines or "nopat" in Path("/proc/cmdline").read_text(encoding="ascii")
    assert os.uname().machine == "x86_64"
