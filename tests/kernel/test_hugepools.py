# SPDX-License-Identifier: MIT
"""The pool of huge pages that other tests set aside: who leaves one in use is told, and the next is none the worse."""

from __future__ import annotations

import pytest

from tests.kernel import hugepools
from tests.kernel.hugepools import HUGE, free_huge_pages, huge_pages
from udmabufd.linux import memfd, udmabuf
from udmabufd_base.fd import OwnedFd

pytestmark = [pytest.mark.guest, pytest.mark.root]


def one_page(name: str) -> OwnedFd:
    """Return a memfd of a page."""
    file = memfd.create(name, HUGE, huge_page=HUGE)
    memfd.populate(file.fileno(), HUGE)
    return file


def test_a_page_that_stays_in_use() -> None:
    """It is said whose it is, and it is gone when it is free, whoever has used the pool meanwhile."""
    before = hugepools.read()
    with pytest.raises(AssertionError, match=r"(?s)1 huge pages are in use still.*has descriptor \d+ of /memfd:kept"):
        with huge_pages(2, patience=0.5):
            kept = one_page("kept")
    with kept:
        assert (hugepools.read().persistent, hugepools.read().used) == (before.persistent, before.used + 1)
        with huge_pages(2):
            assert free_huge_pages() == before.free + 2
            one_page("another").close()
        assert hugepools.read().persistent == before.persistent
        with pytest.raises(AssertionError, match="in use still"), hugepools.pool(patience=0.5):
            pass
    hugepools.await_return(before.used)
    assert hugepools.read() == before


def test_what_is_found_of_those_who_have_pages(device: OwnedFd) -> None:
    with huge_pages(1), one_page("mapped") as file:
        memfd.add_seals(file.fileno(), memfd.F_SEAL_SHRINK | memfd.F_SEAL_GROW)
        with udmabuf.create(device.fileno(), file.fileno(), 0, HUGE) as dma_buf:
            found = "; ".join(hugepools.holders())
            assert f"descriptor {file.fileno()} of /memfd:mapped" in found
            assert f"descriptor {dma_buf.fileno()} of /dmabuf:" in found
            assert "there is the dma-buf DmaBuf(size=2097152" in found


def test_a_block_that_fails() -> None:
    """Its own error is what is told, at once."""
    before = hugepools.read()
    with pytest.raises(ZeroDivisionError):
        with huge_pages(1):
            kept = one_page("kept")
            raise ZeroDivisionError
    assert hugepools.read().persistent == before.persistent
    kept.close()
    hugepools.await_return(before.used)
    assert hugepools.read() == before
