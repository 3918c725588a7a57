# SPDX-License-Identifier: MIT
"""The start-up self-test on the real driver, and that the dma-buf and its memfd are the same memory."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable

import pytest

from tests.kernel.buffers import PAGE, exported, mapped, one_fallocate
from udmabufd.linux import memfd, selftest
from udmabufd.linux.errors import HintedOSError
from udmabufd.linux.selftest import SelfTestFailed
from udmabufd_base.fd import OwnedFd

pytestmark = pytest.mark.guest


def test_passes(device: OwnedFd) -> None:
    """On this kernel buffers are as they should be."""
    selftest.check(device.fileno())


def test_finds_the_flaw(device: OwnedFd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were buffers populated by one fallocate, the self-test would say so exactly where the kernel has the flaw."""
    flaw = selftest.single_fallocate_flaw(device.fileno())
    monkeypatch.setattr(memfd, "populate", one_fallocate)
    if flaw:
        with pytest.raises(SelfTestFailed, match="stale memory|lost to the memfd"):
            selftest.check(device.fileno())
    else:
        selftest.check(device.fileno())


def test_says_why_a_call_is_refused(set_parameter: Callable[[str, int], None], device: OwnedFd) -> None:
    """Another device; a driver that allows no buffer at all."""
    with open("/dev/null", "rb") as null, pytest.raises(HintedOSError, match="not /dev/udmabuf") as caught:
        selftest.check(null.fileno())
    assert caught.value.errno == errno.ENOTTY
    set_parameter("size_limit_mb", 0)
    with pytest.raises(HintedOSError, match="size_limit_mb of 0"):
        selftest.check(device.fileno())


def test_coherent_both_ways(device: OwnedFd) -> None:
    """Random bytes by every way in are read by every way out."""
    size = 256 * PAGE
    first, second, third = (secrets.token_bytes(size) for _ in range(3))
    with (
        exported(device, size) as (backing, dma_buf),
        mapped(dma_buf, size) as through_dma_buf,
        mapped(backing, size) as through_memfd,
    ):
        through_dma_buf[:] = first
        assert os.pread(backing.fileno(), size, 0) == first
        assert through_memfd.tobytes() == first
        through_memfd[:] = second
        assert through_dma_buf.tobytes() == second
        os.pwrite(backing.fileno(), third, 0)
        assert through_dma_buf.tobytes() == third
