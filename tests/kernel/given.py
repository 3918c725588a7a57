# SPDX-License-Identifier: MIT
"""What an allocator has given, looked at without its code: for the tests of each allocator by itself."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import open_fds
from tests.kernel.buffers import mapped
from tests.kernel.witness import CGROUP, bufinfo
from udmabufd.core.allocator import Allocator
from udmabufd.core.memory import Memory
from udmabufd.core.spec import Request
from udmabufd.linux import memfd

NAME = "given"


def request(size: int) -> Request:
    """A request that demands nothing but its size."""
    return Request.from_spec({"size": size})


@contextmanager
def given(allocator: Allocator, size: int) -> Iterator[Memory]:
    """Memory of at least `size` bytes, closed at the end of the block; the allocator had nothing against it."""
    asked = request(size)
    assert allocator.match(asked) == ()
    memory = allocator.allocate(asked, NAME, memfd.populate)
    try:
        yield memory
    finally:
        memory.close()


def assert_as_told(memory: Memory, allocator: Allocator, size: int, exporter: str) -> None:
    """Each figure of `memory` is the kernel's, its descriptors are close-on-exec, the dma-buf is read-write."""
    witness = bufinfo()[memory.inode]
    assert (witness.size, witness.exporter, witness.name) == (size, exporter, NAME)
    assert memory.size == size
    assert memory.allocator == allocator.name
    assert memory.accounting is allocator.capabilities.accounting
    assert (memory.cache, memory.evidence) == (allocator.capabilities.cache, allocator.capabilities.evidence)
    assert memory.dma_buf is not None
    found = os.fstat(memory.dma_buf.fileno())
    assert (os.major(found.st_dev), os.minor(found.st_dev)) == memory.device
    assert (found.st_ino, found.st_size) == (memory.inode, size)
    assert fcntl.fcntl(memory.dma_buf.fileno(), fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
    for fd in filter(None, (memory.dma_buf, memory.memfd)):
        assert fcntl.fcntl(fd.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert memory.references() == 0
    with memory.dup():
        assert memory.references() == 1


def bytes_not_zero(memory: Memory) -> int:
    """Count them through the dma-buf."""
    with mapped(memory.exported, memory.size) as view:
        return memory.size - view.tobytes().count(0)


def charged() -> int:
    """Bytes that the kernel charges this process's control group with; some hundred KiB of it come and go."""
    (line,) = Path("/proc/self/cgroup").read_text().splitlines()
    return int((CGROUP / line.removeprefix("0::/") / "memory.current").read_bytes())


def discharged(before: int, tolerance: int) -> bool:
    """Wait up to 10 s for charged() to be `before` again: virtio_gpu, for one, frees when its device has answered."""
    deadline = time.monotonic() + 10
    while charged() - before > tolerance:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def assert_nothing_left_without_descriptors(allocator: Allocator, size: int) -> None:
    """While this process may open none, one, two, … descriptors more, EMFILE, until they suffice. Each time all are
    closed, and no dma-buf is left.
    """
    before, dma_bufs = open_fds(), set(bufinfo())
    failures = 0
    while True:
        try:
            with descriptors_left(failures):
                memory = allocator.allocate(request(size), NAME, memfd.populate)
        except OSError as error:
            assert error.errno == errno.EMFILE
            assert (open_fds(), set(bufinfo())) == (before, dma_bufs), f"left with {failures} descriptors"
            failures += 1
            continue
        memory.close()
        break
    assert failures >= 2


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """Let this process open so many descriptors more than it has."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    spares = [os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC) for _ in range(count + 1)]
    for spare in spares:
        os.close(spare)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spares[-1], limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
