# SPDX-License-Identifier: MIT
"""The interface of /dev/udmabuf_cache: that of /dev/udmabuf, wrong calls included, but for flags, which it checks."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest

from tests.kernel import modules
from tests.kernel.buffers import (
    MIB,
    PAGE,
    drop_caches,
    exported,
    holes,
    mapped,
    one_fallocate,
    poison_free_memory,
    sealed_memfd,
)
from tests.kernel.cachebuffers import ATTRIBUTES, CLOEXEC, SEALS, create, create_list, is_free, memory
from tests.kernel.hugepools import HUGE
from tests.kernel.witness import bufinfo
from udmabufd.linux import dmabuf, memfd, selftest, udmabuf
from udmabufd.linux.udmabuf import Item
from udmabufd_base.fd import OwnedFd

pytestmark = pytest.mark.guest

SHRINK = memfd.F_SEAL_SHRINK

libc = ctypes.CDLL(None, use_errno=True)


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


def outcome(call: Callable[..., OwnedFd], *arguments: object) -> str:
    """Return "made", or the name of the error."""
    try:
        call(*arguments).close()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "made"


def outcome_of_list(device: OwnedFd, items: list[Item]) -> str:
    """The same of UDMABUF_CREATE_LIST."""
    return outcome(udmabuf.create_list, device.fileno(), items)


class Case:
    """A range of a memfd, made with UDMABUF_CREATE, and with UDMABUF_CREATE_LIST after a good item."""

    def __init__(self, expected: str, offset: int = 0, size: int = PAGE, seals: int = SHRINK, length: int = 4) -> None:
        self.expected = expected
        self._offset, self._size, self._seals, self._length = offset, size, seals, length * PAGE

    def outcomes(self, device: OwnedFd) -> tuple[str, str]:
        """Return what came of either call."""
        with sealed_memfd(self._length, self._seals, holes) as backing, sealed_memfd(PAGE) as good:
            item = Item(backing.fileno(), self._offset, self._size)
            single = outcome(udmabuf.create, device.fileno(), *item)
            return single, outcome_of_list(device, [Item(good.fileno(), 0, PAGE), item])


CASES = {
    "all of it": Case("made", 0, 4 * PAGE),
    "part of it": Case("made", PAGE, 2 * PAGE),
    "sealed SHRINK, GROW and SEAL": Case("made", seals=SEALS | memfd.F_SEAL_SEAL),
    "offset not aligned": Case("EINVAL", 1),
    "offset aligned to a sector": Case("EINVAL", 512),
    "size not aligned": Case("EINVAL", 0, PAGE + 1),
    "size below a page": Case("EINVAL", 0, PAGE - 1),
    "empty": Case("EINVAL", 0, 0),
    "longer than the memfd": Case("EINVAL", 0, 5 * PAGE),
    "past the end": Case("EINVAL", 4 * PAGE, PAGE),
    "over the end": Case("EINVAL", 3 * PAGE, 2 * PAGE),
    "far past the end": Case("EINVAL", 1 << 62, PAGE),
    "offset negative as a loff_t": Case("EINVAL", 1 << 63, PAGE),
    "end negative as a loff_t": Case("EINVAL", (1 << 63) - PAGE, 2 * PAGE),
    "end over 64 bits": Case("EINVAL", (1 << 64) - PAGE, 2 * PAGE),
    "size over the limit": Case("EINVAL", 0, 64 * MIB + PAGE, length=64 * MIB // PAGE + 1),
    "size of 2^63": Case("EINVAL", 0, 1 << 63),
    "size of almost 2^64": Case("EINVAL", 0, (1 << 64) - PAGE),
    "no seal": Case("EINVAL", seals=0),
    "SHRINK missing": Case("EINVAL", seals=memfd.F_SEAL_GROW),
    "sealed against writing": Case("EINVAL", seals=SHRINK | memfd.F_SEAL_WRITE),
    "sealed against writing in future": Case("EINVAL", seals=SHRINK | memfd.F_SEAL_FUTURE_WRITE),
}


def test_ranges_and_seals_as_udmabuf(device: OwnedFd, cache: OwnedFd) -> None:
    """The same answer of both devices, to either call."""
    table = {name: (case.outcomes(device), case.outcomes(cache)) for name, case in CASES.items()}
    assert table == {name: ((case.expected,) * 2,) * 2 for name, case in CASES.items()}


def test_other_descriptors_as_udmabuf(device: OwnedFd, cache: OwnedFd) -> None:
    """What is no memfd; and files on a tmpfs, which are like memfds, but cannot be sealed."""
    with ExitStack() as stack:

        def opened(fd: int, size: int = 0) -> OwnedFd:
            owned = stack.enter_context(OwnedFd(fd))
            if size:
                os.ftruncate(fd, size)
            return owned

        reader, writer = os.pipe2(os.O_CLOEXEC)
        wrong = {
            "file": (opened(os.open("/etc/passwd", os.O_RDONLY | os.O_CLOEXEC)), "EBADFD"),
            "folder": (opened(os.open("/dev/shm", os.O_RDONLY | os.O_CLOEXEC)), "EBADFD"),
            "on a tmpfs": (opened(os.open("/dev/shm", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC), PAGE), "EINVAL"),
            "memfd that cannot be sealed": (opened(os.memfd_create("unsealable", os.MFD_CLOEXEC), PAGE), "EINVAL"),
            "pipe": (opened(reader), "EBADFD"),
            "its other end": (opened(writer), "EBADFD"),
            "dma-buf": (stack.enter_context(exported(device, PAGE))[1], "EBADFD"),
            "the device": (device, "EBADFD"),
        }
        numbers = {name: (fd.fileno(), answer) for name, (fd, answer) in wrong.items()}
        numbers |= {"closed": (1 << 20, "EBADFD"), "-1": (2**32 - 1, "EBADFD")}
        for one in (device, cache):
            table = {name: outcome(udmabuf.create, one.fileno(), fd, 0, PAGE) for name, (fd, _) in numbers.items()}
            assert table == {name: answer for name, (_, answer) in numbers.items()}


def test_lists_as_udmabuf(device: OwnedFd, cache: OwnedFd) -> None:
    """None, as many as list_limit, one more; a total at the limit and above; empty ones; which error comes first."""
    with sealed_memfd(64 * MIB, prepare=holes) as backing, open("/etc/passwd", "rb") as file:
        page, half = Item(backing.fileno(), 0, PAGE), Item(backing.fileno(), 0, 32 * MIB)
        empty, crooked, wrong = page._replace(size=0), page._replace(offset=1), page._replace(memfd=file.fileno())
        for one in (device, cache):
            assert outcome_of_list(one, []) == "EINVAL"
            assert outcome_of_list(one, [page] * 1024) == "made"
            assert outcome_of_list(one, [page] * 1025) == "EINVAL"
            assert outcome_of_list(one, [half, half]) == "made"
            assert outcome_of_list(one, [half, half, page]) == "EINVAL"
            for items in ([empty], [empty, page], [page, empty], [empty, empty]):
                assert outcome_of_list(one, items) == "EINVAL"
            assert outcome_of_list(one, [wrong, page]) == outcome_of_list(one, [page, wrong]) == "EBADFD"
            assert outcome_of_list(one, [wrong, crooked]) == outcome_of_list(one, [crooked, wrong]) == "EINVAL"


def test_addresses_and_commands_as_udmabuf(device: OwnedFd, cache: OwnedFd) -> None:
    """EFAULT for memory that is not there, behind the head of a list too; ENOTTY for calls that there are not."""
    known = (udmabuf.UDMABUF_CREATE, udmabuf.UDMABUF_CREATE_LIST)
    with mmap.mmap(-1, 2 * PAGE) as area:
        # A list of two of which the kernel can read the head alone.
        area[PAGE - 8 : PAGE] = struct.pack("=II", CLOEXEC, 2)
        view = np.frombuffer(area, dtype=np.uint8)
        address = view.ctypes.data
        del view
        assert libc.mprotect(ctypes.c_void_p(address + PAGE), PAGE, 0) == 0
        for one in (device, cache):
            assert {outcome(ioctl, one, command, 8) for command in known} == {"EFAULT"}
            assert outcome(ioctl, one, udmabuf.UDMABUF_CREATE_LIST, address + PAGE - 8) == "EFAULT"
            unknown = (0x40187541, 0x40187544, 0x40087542, 0x40187543, 0)
            assert {outcome(ioctl, one, command, 8) for command in unknown} == {"ENOTTY"}
        assert libc.mprotect(ctypes.c_void_p(address + PAGE), PAGE, mmap.PROT_READ | mmap.PROT_WRITE) == 0


def ioctl(device: OwnedFd, command: int, address: int) -> OwnedFd:
    """Make a call with the argument at that address."""
    fd = libc.ioctl(device.fileno(), ctypes.c_ulong(command), ctypes.c_void_p(address))
    if fd < 0:
        raise OSError(ctypes.get_errno(), "ioctl")
    return OwnedFd(fd)


def test_flags(cache: OwnedFd) -> None:
    """One attribute or none, close-on-exec or not; every other bit is refused, and two attributes at once."""
    with sealed_memfd(PAGE) as backing:
        item = Item(backing.fileno(), 0, PAGE)
        accepted = {CLOEXEC * on | flag for flag in ATTRIBUTES.values() for on in (0, 1)}
        every = {*range(256), *(1 << bit for bit in range(32)), 0xFFFFFFFF}
        for flags in sorted(every):
            answer = "made" if flags in accepted else "EINVAL"
            assert outcome(udmabuf.create, cache.fileno(), *item, flags) == answer, f"{flags:#x}"
            assert outcome(udmabuf.create_list, cache.fileno(), [item], flags) == answer, f"{flags:#x}"
        assert is_free(backing)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_result(cache: OwnedFd, attribute: str) -> None:
    """A dma-buf of that size, readable and writable, from the exporter udmabuf_cache, close-on-exec if asked for."""
    with sealed_memfd(4 * PAGE) as backing:
        for flags, expected in ((CLOEXEC, fcntl.FD_CLOEXEC), (0, 0)):
            with udmabuf.create(cache.fileno(), backing.fileno(), 0, 4 * PAGE, flags | ATTRIBUTES[attribute]) as made:
                fd = made.fileno()
                assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC == expected
                assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
                assert dmabuf.size(fd) == 4 * PAGE
                assert dmabuf.fdinfo(fd).exporter == bufinfo()[dmabuf.inode(fd)].exporter == modules.NAME


def test_limits_are_parameters(cache: OwnedFd) -> None:
    """Read at each call, as udmabuf's are; negative is no limit."""
    with parameters(size_limit_mb=1, list_limit=2), sealed_memfd(2 * MIB) as backing:
        whole, page = Item(backing.fileno(), 0, MIB), Item(backing.fileno(), 0, PAGE)
        assert udmabuf.read_limits(modules.PARAMETERS) == udmabuf.Limits(list_limit=2, size_limit_mb=1)
        assert outcome(udmabuf.create, cache.fileno(), *whole) == "made"
        assert outcome(udmabuf.create, cache.fileno(), backing.fileno(), 0, MIB + PAGE) == "EINVAL"
        assert outcome_of_list(cache, [page, page]) == "made"
        assert outcome_of_list(cache, [page, page, page]) == "EINVAL"
        with parameters(size_limit_mb=0, list_limit=0):
            assert outcome(udmabuf.create, cache.fileno(), *page) == "EINVAL"
            assert outcome_of_list(cache, [page]) == "EINVAL"
        with parameters(size_limit_mb=-1, list_limit=-1):
            assert outcome_of_list(cache, [page] * 2000) == "made"
            # More than an array of pointers can have, of a memfd that claims to be so long: refused, not warned of.
            with memfd.create("vast", 1 << 62) as vast:
                memfd.add_seals(vast.fileno(), SEALS)
                assert outcome(udmabuf.create, cache.fileno(), vast.fileno(), 0, 1 << 62) == "ENOMEM"


@contextmanager
def parameters(**values: int) -> Iterator[None]:
    """Have the module's parameters at these values until the end of the block."""
    files = {modules.PARAMETERS / name: value for name, value in values.items()}
    before = {file: file.read_text() for file in files}
    for file, value in files.items():
        file.write_text(f"{value}\n")
    try:
        yield
    finally:
        for file, text in before.items():
            file.write_text(text)


def test_hugetlb_ranges_as_udmabuf(device: OwnedFd, cache: OwnedFd) -> None:
    """Aligned to ordinary pages is enough, over the border of two huge ones too."""
    with memory("hugetlb", 2 * HUGE) as backing:
        for offset, size, answer in (
            (0, 2 * HUGE, "made"),
            (HUGE - PAGE, 2 * PAGE, "made"),
            (3 * PAGE, PAGE, "made"),
            (HUGE + 1, PAGE, "EINVAL"),
            (2 * HUGE - PAGE, 2 * PAGE, "EINVAL"),
            (2 * HUGE, PAGE, "EINVAL"),
        ):
            assert outcome(udmabuf.create, device.fileno(), backing.fileno(), offset, size) == answer
            for flag in ATTRIBUTES.values():
                assert outcome(udmabuf.create, cache.fileno(), backing.fileno(), offset, size, flag) == answer


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_no_descriptor_left(cache: OwnedFd, attribute: str) -> None:
    """EMFILE, and nothing is kept: neither pins nor the claim to the pages."""
    with sealed_memfd(PAGE) as backing:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest_free = os.dup(backing.fileno())
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
        try:
            assert outcome(create, cache, backing, attribute, PAGE) == "EMFILE"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for other in ATTRIBUTES:
            assert outcome(create, cache, backing, other, PAGE) == "made"
        assert is_free(backing)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_one_bad_item_leaves_nothing(cache: OwnedFd, attribute: str) -> None:
    """What was pinned before it is let go, from the start of a range that ends too late as well."""
    with sealed_memfd(4 * PAGE) as good, sealed_memfd(PAGE, 0) as bad:
        for parts in ([(good, 0, 4 * PAGE), (bad, 0, PAGE)], [(good, 0, PAGE), (good, PAGE, 4 * PAGE)]):
            assert outcome(create_list, cache, parts, attribute) == "EINVAL"
        for other in ATTRIBUTES:
            assert outcome(create, cache, good, other, 4 * PAGE) == "made"
        assert is_free(good)


def test_end_before_beginning_as_udmabuf(device: OwnedFd, cache: OwnedFd) -> None:
    """EINVAL until CPU access has begun once."""
    with exported(device, PAGE) as (_, theirs), exported(cache, PAGE) as (_, ours):
        for fd in (theirs.fileno(), ours.fileno()):
            with pytest.raises(OSError) as caught:
                dmabuf.sync_end(fd, dmabuf.DMA_BUF_SYNC_WRITE)
            assert caught.value.errno == errno.EINVAL
            dmabuf.sync_start(fd, dmabuf.DMA_BUF_SYNC_WRITE)
            dmabuf.sync_end(fd, dmabuf.DMA_BUF_SYNC_WRITE)
            dmabuf.sync_end(fd, dmabuf.DMA_BUF_SYNC_WRITE)


def test_without_the_flaws_of_udmabuf(device: OwnedFd, cache: OwnedFd) -> None:
    """A memfd of one fallocate is exported as zeros and stays one with the dma-buf; holes keep what was written."""
    assert selftest.single_fallocate_flaw(device.fileno())
    assert not selftest.single_fallocate_flaw(cache.fileno())
    poison_free_memory(64 * MIB)
    with exported(cache, 8 * MIB, one_fallocate) as (_, made), mapped(made, 8 * MIB) as view:
        assert view.tobytes().count(0) == 8 * MIB
    marks = {}
    for one in (device, cache):
        with sealed_memfd(MIB, prepare=holes) as backing:
            with udmabuf.create(one.fileno(), backing.fileno(), 0, MIB) as made, mapped(made, MIB) as view:
                view[::PAGE] = b"\x5a" * (MIB // PAGE)
            drop_caches()
            marks[one] = os.pread(backing.fileno(), MIB, 0).count(0x5A)
    assert marks == {device: 0, cache: MIB // PAGE}
