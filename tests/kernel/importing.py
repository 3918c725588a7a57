# SPDX-License-Identifier: MIT
"""Devices that import, loaded for a test; dma-bufs that are certainly scattered, or in one piece; what modprobe left.

What they answer is left to the tests.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from tests.kernel.buffers import MIB, PAGE, sealed_memfd
from tests.kernel.frames import of_file
from tests.kernel.hugepools import HUGE, huge_pages
from udmabufd.linux import memfd, udmabuf
from udmabufd_base.fd import OwnedFd

_COMPACT: Final = Path("/proc/sys/vm/compact_memory")
_MAPPED, _CONTIGUOUS, _PLANES = range(3)


class Vivid:
    """The nodes of the kernel's virtual video devices: three instances, alike but for how they import.

    `mapped` maps buffers by the CPU and attaches to none, as the driver does by default; `contiguous` (allocators=1)
    attaches, and takes what is one piece; `planes` is as the first, with the multi-planar interface.
    """

    PARAMETERS: Final = ("n_devs=3", "allocators=0,1,0", "multiplanar=1,1,2")

    @property
    def mapped(self) -> Path:
        """The camera of the first instance."""
        return self.node(_MAPPED)

    @property
    def contiguous(self) -> Path:
        """The camera of the instance that takes one piece."""
        return self.node(_CONTIGUOUS)

    @property
    def planes(self) -> Path:
        """The camera of the multi-planar instance."""
        return self.node(_PLANES)

    @staticmethod
    def node(instance: int, kind: str = "vid-cap") -> Path:
        """Return the node of an instance by the name that the driver gives it."""
        (device,) = [
            one for one in Path("/sys/class/video4linux").iterdir() if name(one) == f"vivid-{instance:03}-{kind}"
        ]
        return Path("/dev", device.name)

    @staticmethod
    def instance(node: Path) -> int:
        """Return the number of the instance that a node belongs to."""
        return int(name(Path("/sys/class/video4linux", node.name)).split("-")[1])

    @staticmethod
    def nodes() -> list[Path]:
        """Return the nodes of all instances."""
        every = [one for one in Path("/sys/class/video4linux").iterdir() if name(one).startswith("vivid-")]
        return [Path("/dev", one.name) for one in sorted(every)]


def name(device: Path) -> str:
    """Return what a V4L2 device calls itself."""
    return (device / "name").read_text().strip()


@contextmanager
def loaded(module: str, *parameters: str) -> Iterator[None]:
    """Have a kernel module, and its nodes, until the end of the block."""
    assert not Path("/sys/module", module).exists(), f"{module} is loaded already: a test before this left it"
    subprocess.run(["modprobe", module, *parameters], check=True)
    try:
        settle()
        yield
    finally:
        settle()
        subprocess.run(["modprobe", "--remove", module], check=True)
        settle()


def settle() -> None:
    """Return when udev has dealt with all that has come and gone: it opens new devices to look at them."""
    subprocess.run(["udevadm", "settle", "--timeout=60"], check=True)


def drm_nodes() -> list[Path]:
    """Return the card nodes, then the render nodes."""
    # card0-Virtual-1 is a plug of card0. Without any device there is no such folder.
    names = sorted(one.name for one in Path("/sys/class/drm").glob("*[0-9]") if "-" not in one.name)
    return [Path("/dev/dri", one) for one in names]


@contextmanager
def scattered(device: OwnedFd, size: int) -> Iterator[OwnedFd]:
    """A dma-buf whose pages are in reverse order, so that no two are adjacent whatever memory the kernel gave."""
    with sealed_memfd(size) as backing:
        pages = [udmabuf.Item(backing.fileno(), offset, PAGE) for offset in reversed(range(0, size, PAGE))]
        with udmabuf.create_list(device.fileno(), pages) as dma_buf:
            yield dma_buf


@contextmanager
def one_piece(device: OwnedFd) -> Iterator[OwnedFd]:
    """A dma-buf of one huge page: 2 MiB, physically contiguous."""
    with huge_pages(1), memfd.create("huge", HUGE, huge_page=HUGE) as backing:
        memfd.populate(backing.fileno(), HUGE)
        memfd.add_seals(backing.fileno(), memfd.F_SEAL_SHRINK | memfd.F_SEAL_GROW)
        with udmabuf.create(device.fileno(), backing.fileno(), 0, HUGE) as dma_buf:
            yield dma_buf


@contextmanager
def adjacent(device: OwnedFd, size: int) -> Iterator[OwnedFd]:
    """A dma-buf of `size` bytes in one piece, of ordinary pages that happen to lie one after the other."""
    with ExitStack() as stack:
        # Memory that the tests before this one have scattered has such runs only here and there.
        for extent in (64 * MIB, 128 * MIB, 256 * MIB, 512 * MIB):
            _COMPACT.write_text("1\n")
            backing = stack.enter_context(sealed_memfd(extent))
            if items := _run(backing.fileno(), extent, size // PAGE):
                break
        else:
            raise AssertionError(f"memory is too fragmented for {size} bytes in one piece")
        yield stack.enter_context(udmabuf.create_list(device.fileno(), items))


def _run(backing: int, extent: int, pages: int) -> list[udmabuf.Item]:
    """Return the items of the first `pages` pages of a file that follow one another in memory, or none."""
    frames = of_file(backing, extent)
    order = sorted(range(len(frames)), key=frames.__getitem__)
    for start in range(len(order) - pages + 1):
        if frames[order[start + pages - 1]] - frames[order[start]] == (pages - 1) * PAGE:
            return [udmabuf.Item(backing, page * PAGE, PAGE) for page in order[start : start + pages]]
    return []
