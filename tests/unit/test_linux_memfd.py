# SPDX-License-Identifier: MIT
"""linux.memfd on the kernel at hand: flags at birth, fall-backs, seals, and that populate() is two fallocates."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import pickle
import socket
from pathlib import Path

import pytest

from tests.kernel.threads import lets_others_run
from udmabufd.linux import memfd
from udmabufd.linux.errors import HintedOSError

PAGE = mmap.PAGESIZE


def knows_noexec_seal() -> bool:
    """Ask the kernel itself, without the code under test."""
    try:
        os.close(os.memfd_create("probe", os.MFD_CLOEXEC | 0x8))
    except OSError:
        return False
    return True


def hole_from_the_beginning(fd: int) -> int:
    """Offset of the first byte that is not up to date: SEEK_HOLE takes a page for data only once it is (mm/filemap.c,
    folio_seek_hole_data), so that it tells one fallocate from two."""
    return os.lseek(fd, 0, os.SEEK_HOLE)


def test_birth() -> None:
    """A new memfd is close-on-exec, has the size, no memory yet, and no seal but SEAL_EXEC."""
    with memfd.create("birth", 3 * PAGE) as fd:
        assert fcntl.fcntl(fd.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        state = os.fstat(fd.fileno())
        assert (state.st_size, state.st_blocks) == (3 * PAGE, 0)
        assert memfd.get_seals(fd.fileno()) == (memfd.F_SEAL_EXEC if knows_noexec_seal() else 0)
        assert str(Path(f"/proc/self/fd/{fd.fileno()}").readlink()).startswith("/memfd:birth")


def test_seals_hold() -> None:
    """SHRINK and GROW fix the size, SEAL the seals, and the kernel enforces it."""
    with memfd.create("sealed", 2 * PAGE) as fd:
        before = memfd.get_seals(fd.fileno())
        memfd.add_seals(fd.fileno(), memfd.F_SEAL_SHRINK | memfd.F_SEAL_GROW)
        assert memfd.get_seals(fd.fileno()) == before | memfd.F_SEAL_SHRINK | memfd.F_SEAL_GROW
        for size in (PAGE, 3 * PAGE):
            with pytest.raises(PermissionError):
                os.ftruncate(fd.fileno(), size)
        memfd.add_seals(fd.fileno(), memfd.F_SEAL_SEAL)
        with pytest.raises(PermissionError):
            memfd.add_seals(fd.fileno(), memfd.F_SEAL_WRITE)
    with pytest.raises(OSError) as caught, open("/dev/null", "rb") as null:
        memfd.get_seals(null.fileno())
    assert caught.value.errno == errno.EINVAL


def test_write_seal_says_busy_while_mapped() -> None:
    """The kernel's EBUSY arrives as it is."""
    with memfd.create("busy", PAGE) as fd:
        with mmap.mmap(fd.fileno(), PAGE), pytest.raises(OSError) as caught:
            memfd.add_seals(fd.fileno(), memfd.F_SEAL_WRITE)
        assert caught.value.errno == errno.EBUSY
        memfd.add_seals(fd.fileno(), memfd.F_SEAL_WRITE)


def test_kernel_without_noexec_seal(monkeypatch: pytest.MonkeyPatch) -> None:
    """EINVAL for the flag that kernels before 6.3 do not know is answered by a second call without it."""
    real, asked = os.memfd_create, []

    def old_kernel(name: str, flags: int) -> int:
        asked.append(flags)
        if flags & ~(memfd.MFD_CLOEXEC | memfd.MFD_ALLOW_SEALING | memfd.MFD_HUGETLB):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(name, flags)

    monkeypatch.setattr(os, "memfd_create", old_kernel)
    with memfd.create("old", PAGE) as fd:
        memfd.add_seals(fd.fileno(), memfd.F_SEAL_SHRINK)
        assert memfd.get_seals(fd.fileno()) & memfd.F_SEAL_SHRINK
        assert fcntl.fcntl(fd.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    base = memfd.MFD_CLOEXEC | memfd.MFD_ALLOW_SEALING
    assert asked == [base | memfd.MFD_NOEXEC_SEAL, base]


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOMEM, errno.EACCES])
def test_other_errors_are_not_retried(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Only EINVAL means an unknown flag."""
    asked = []

    def refuse(name: str, flags: int) -> int:
        asked.append(flags)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(OSError) as caught:
        memfd.create("refused", PAGE)
    assert caught.value.errno == code
    assert len(asked) == 1


def test_missing_call_has_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSYS alone would not tell that a filter may be the cause."""

    def missing(name: str, flags: int) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "memfd_create", missing)
    with pytest.raises(HintedOSError, match=r"memfd_create: .*ENOSYS.*SystemCallFilter=") as caught:
        memfd.create("missing", PAGE)
    assert caught.value.errno == errno.ENOSYS
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_wrong_arguments_have_hints_and_leave_nothing_open() -> None:
    """A long name and a size that cannot be; that no descriptor stays open is checked after every test."""
    with memfd.create("x" * 249, PAGE):
        pass
    with pytest.raises(HintedOSError, match="249 bytes") as caught:
        memfd.create("x" * 250, PAGE)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(HintedOSError, match="negative"):
        memfd.create("negative", -1)


def test_huge_page_size_is_in_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits 26 to 31 hold the logarithm of the page size; one that no machine has is named as such."""
    asked = []

    def record(name: str, flags: int) -> int:
        asked.append(flags)
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(os, "memfd_create", record)
    for size in (2 << 20, 1 << 30):
        with pytest.raises(HintedOSError, match="hugepages"):
            memfd.create("huge", size, huge_page=size)
    assert [flags >> memfd.MFD_HUGE_SHIFT for flags in asked] == [21, 30]
    assert all(flags & memfd.MFD_HUGETLB for flags in asked)


@pytest.mark.parametrize("pages", [1, 2, 511, 2048])
def test_populated_means_up_to_date(pages: int) -> None:
    """Every page is allocated, up to date and zero. One fallocate allocates, too, but leaves every page a hole."""
    size = pages * PAGE
    with memfd.create("once", size) as once:
        os.posix_fallocate(once.fileno(), 0, size)
        assert os.fstat(once.fileno()).st_blocks * 512 == size
        assert hole_from_the_beginning(once.fileno()) == 0, (
            "one fallocate is enough on this kernel: this test proves nothing"
        )
    with memfd.create("populated", size) as fd:
        memfd.populate(fd.fileno(), size)
        assert os.fstat(fd.fileno()).st_blocks * 512 == size
        assert hole_from_the_beginning(fd.fileno()) == size
        assert os.pread(fd.fileno(), size, 0) == bytes(size)


def test_populate_keeps_what_is_there() -> None:
    """Pages that hold data already keep it."""
    with memfd.create("data", 4 * PAGE) as fd:
        os.pwrite(fd.fileno(), b"kept", PAGE)
        memfd.populate(fd.fileno(), 4 * PAGE)
        assert os.pread(fd.fileno(), 4 * PAGE, 0) == bytes(PAGE) + b"kept" + bytes(3 * PAGE - 4)


def test_populate_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC, which shmem says for memory, is explained; EPERM of a seal arrives as it is."""
    with memfd.create("grow", PAGE) as fd:
        memfd.add_seals(fd.fileno(), memfd.F_SEAL_GROW)
        with pytest.raises(PermissionError):
            memfd.populate(fd.fileno(), 2 * PAGE)

        def full(fd: int, offset: int, length: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(HintedOSError, match=f"no memory for {PAGE} bytes") as caught:
            memfd.populate(fd.fileno(), PAGE)
        assert caught.value.errno == errno.ENOSPC


def test_populate_lets_other_threads_run() -> None:
    """A worker that populates keeps nobody from running; a call that keeps the interpreter's lock does."""
    size = 256 << 20

    def populate() -> None:
        with memfd.create("large", size) as fd:
            memfd.populate(fd.fileno(), size)

    assert lets_others_run(populate)
    assert not lets_others_run(lambda: ctypes.PyDLL(None).usleep(100_000), attempts=1)


def test_populate_from_an_offset() -> None:
    """These bytes and no others, and each of several ranges."""
    with memfd.create("offset", 8 * PAGE) as fd:
        memfd.populate(fd.fileno(), 2 * PAGE, 3 * PAGE)
        assert os.fstat(fd.fileno()).st_blocks * 512 == 2 * PAGE
        assert [memfd.first_hole(fd.fileno(), page * PAGE, PAGE) for page in (2, 3, 4, 5)] == [
            2 * PAGE,
            None,
            None,
            5 * PAGE,
        ]
        memfd.populate_ranges(fd.fileno(), [(0, PAGE), (7 * PAGE, PAGE)])
        assert [memfd.first_hole(fd.fileno(), page * PAGE, PAGE) is None for page in range(8)] == [
            page in (0, 3, 4, 7) for page in range(8)
        ]


def test_first_hole() -> None:
    """Where a page is missing, was punched, or only allocated; the position stays, also after an error."""
    with memfd.create("holes", 8 * PAGE) as fd:
        os.pwrite(fd.fileno(), bytes(4 * PAGE), 0)
        os.lseek(fd.fileno(), 123, os.SEEK_SET)
        assert memfd.first_hole(fd.fileno(), 0, 4 * PAGE) is None
        assert memfd.first_hole(fd.fileno(), 0, 5 * PAGE) == 4 * PAGE
        assert memfd.first_hole(fd.fileno(), 6 * PAGE, PAGE) == 6 * PAGE
        os.posix_fallocate(fd.fileno(), 4 * PAGE, 4 * PAGE)
        assert memfd.first_hole(fd.fileno(), 0, 8 * PAGE) == 4 * PAGE
        memfd.populate(fd.fileno(), 8 * PAGE)
        assert memfd.first_hole(fd.fileno(), 0, 8 * PAGE) is None, "the end of the file is no hole in it"
        punch(fd.fileno(), 2 * PAGE, PAGE)
        assert memfd.first_hole(fd.fileno(), PAGE, 7 * PAGE) == 2 * PAGE
        with pytest.raises(OSError) as caught:
            memfd.first_hole(fd.fileno(), 8 * PAGE, PAGE)
        assert caught.value.errno == errno.ENXIO
        assert os.lseek(fd.fileno(), 0, os.SEEK_CUR) == 123


def punch(fd: int, offset: int, size: int) -> None:
    """FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
    assert libc.fallocate(fd, 3, offset, size) == 0, os.strerror(ctypes.get_errno())


def test_reopen() -> None:
    """The same file with the same seals, another open file: readable and writable, with a position of its own."""
    with memfd.create("first", PAGE) as fd, memfd.reopen(fd.fileno()) as other:
        os.pwrite(fd.fileno(), b"seen", 0)
        assert os.read(other.fileno(), 4) == b"seen"
        assert os.lseek(fd.fileno(), 0, os.SEEK_CUR) == 0, "a duplicate would share the position"
        assert fcntl.fcntl(other.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        memfd.add_seals(other.fileno(), memfd.F_SEAL_SHRINK)
        assert memfd.get_seals(fd.fileno()) & memfd.F_SEAL_SHRINK
    with pytest.raises(FileNotFoundError):
        memfd.reopen(1_000_000)


def test_proof() -> None:
    """Busy while the memfd is mapped, free after, and asked again still free; other errors arrive as they are."""
    with memfd.create("proved", PAGE) as fd:
        with mmap.mmap(fd.fileno(), PAGE):
            assert memfd.prove_free(fd.fileno()) is False
            assert not memfd.get_seals(fd.fileno()) & memfd.F_SEAL_WRITE
        with memfd.reopen(fd.fileno()):
            assert memfd.prove_free(fd.fileno()) is True, "an open file alone has no pages"
        assert memfd.get_seals(fd.fileno()) & memfd.F_SEAL_WRITE
        assert memfd.prove_free(fd.fileno()) is True
    with memfd.create("sealed", PAGE) as fd:
        memfd.add_seals(fd.fileno(), memfd.F_SEAL_SEAL)
        with pytest.raises(PermissionError):
            memfd.prove_free(fd.fileno())
    with open("/dev/null", "r+b", buffering=0) as null, pytest.raises(OSError) as caught:
        memfd.prove_free(null.fileno())
    assert caught.value.errno == errno.EINVAL


def test_proof_collects_sockets_in_a_cycle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Busy, and then not, is free: a socket was made and closed in between, and only then."""
    answers: list[OSError | None] = []
    closed: list[bool] = []
    real = socket.socketpair

    def answer(fd: int, seals: int) -> None:
        if (error := answers.pop(0)) is not None:
            raise error

    def pair() -> tuple[socket.socket, socket.socket]:
        closed.append(True)
        return real()

    monkeypatch.setattr(memfd, "add_seals", answer)
    monkeypatch.setattr(socket, "socketpair", pair)
    busy = OSError(errno.EBUSY, "busy")
    for script, expected, pairs in (([None], True, 0), ([busy, None], True, 1), ([busy, busy], False, 1)):
        answers[:], closed[:] = script, []
        assert memfd.prove_free(5) is expected
        assert (answers, len(closed)) == ([], pairs)
