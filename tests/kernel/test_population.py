# SPDX-License-Identifier: MIT
"""Why memfds are populated by two fallocates: what this kernel does to those that are not.

Each test has its contrast, the wrong preparation, so that it is known to be able to fail. Boot the guest with
init_on_alloc=0, or the kernel zeroes pages itself and stale memory cannot be seen.
"""

from __future__ import annotations

import os
import platform
import secrets
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from tests.kernel.buffers import (
    MIB,
    PAGE,
    Preparation,
    drop_caches,
    exported,
    holes,
    mapped,
    one_fallocate,
    poison_free_memory,
    sealed_memfd,
)
from udmabufd.linux import memfd, selftest, udmabuf
from udmabufd_base.fd import OwnedFd

pytestmark = pytest.mark.guest

PAGES_ZEROED_AT_ALLOCATION = "init_on_alloc=0" not in Path("/proc/cmdline").read_text(encoding="ascii").split()
COUNT, SIZE = 64, 8 * MIB


def kernel_version() -> tuple[int, int]:
    """Major and minor number of the running kernel."""
    major, minor, *_ = platform.release().split(".")
    return int(major), int(minor)


def stale_bytes(device: OwnedFd, count: int, prepare: Preparation) -> int:
    """Make `count` buffers, all alive at a time, of poisoned memory; return how many bytes are not zero."""
    poison_free_memory(count * SIZE + 64 * MIB)
    stale = 0
    with ExitStack() as stack:
        for _ in range(count):
            _, dma_buf = stack.enter_context(exported(device, SIZE, prepare))
            with mapped(dma_buf, SIZE) as view:
                stale += int(np.count_nonzero(np.frombuffer(view, dtype=np.uint8)))
    return stale


@pytest.mark.skipif(
    PAGES_ZEROED_AT_ALLOCATION, reason="boot with init_on_alloc=0: tests/vm/run --append init_on_alloc=0"
)
def test_no_stale_byte(device: OwnedFd) -> None:
    """Not one byte in 64 buffers of 8 MiB; after a single fallocate plenty, where the kernel has the flaw."""
    assert stale_bytes(device, COUNT, memfd.populate) == 0
    after_one = stale_bytes(device, 4, one_fallocate)
    print(f"stale bytes in 4 buffers of 8 MiB after a single fallocate: {after_one}")
    assert (after_one > 0) == selftest.single_fallocate_flaw(device.fileno())


def test_flaw_is_found_where_it_is(device: OwnedFd) -> None:
    """Linux 6.11 to 7.2 have it; before, pages were made up to date; what comes later is for the self-test to say."""
    if kernel_version() <= (7, 2):
        assert selftest.single_fallocate_flaw(device.fileno()) == (kernel_version() >= (6, 11))


@pytest.mark.parametrize("written_by", ["mapping", "pwrite"])
def test_data_outlive_the_dma_buf(device: OwnedFd, written_by: str) -> None:
    """What was written through the dma-buf is still in the memfd after the dma-buf is gone and caches are dropped."""
    assert lost_pages(device, memfd.populate, written_by) == 0


def test_data_in_holes_do_not(device: OwnedFd) -> None:
    """The contrast: pages that udmabuf itself allocated are dropped as clean ones."""
    lost = lost_pages(device, holes, "mapping")
    print(f"pages lost of a memfd that was exported with holes: {lost} of {SIZE // PAGE}")
    if kernel_version() >= (6, 11):
        assert lost > SIZE // PAGE // 2


def lost_pages(device: OwnedFd, prepare: Preparation, written_by: str) -> int:
    """Fill a buffer with random bytes, close the dma-buf, drop caches; return the pages of the memfd that differ."""
    data = secrets.token_bytes(SIZE)
    with sealed_memfd(SIZE, prepare=prepare) as backing:
        with udmabuf.create(device.fileno(), backing.fileno(), 0, SIZE) as dma_buf:
            if written_by == "mapping":
                with mapped(dma_buf, SIZE) as view:
                    view[:] = data
            else:
                os.pwrite(backing.fileno(), data, 0)
        drop_caches()
        found = os.pread(backing.fileno(), SIZE, 0)
    return sum(found[page : page + PAGE] != data[page : page + PAGE] for page in range(0, SIZE, PAGE))
