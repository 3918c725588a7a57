# SPDX-License-Identifier: MIT
"""UDMABUF_CREATE_LIST: several memfds as one dma-buf, and the driver's limits on the list."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from tests.kernel.buffers import MIB, PAGE, mapped, sealed_memfd
from tests.kernel.threads import lets_others_run
from tests.kernel.witness import bufinfo
from udmabufd.linux import dmabuf, udmabuf
from udmabufd.linux.errors import HintedOSError
from udmabufd.linux.udmabuf import Item
from udmabufd_base.fd import OwnedFd

pytestmark = pytest.mark.guest


def test_several_memfds_in_order(device: OwnedFd) -> None:
    """The buffer is the items one after the other, each from its offset; writes arrive in the right memfd."""
    with ExitStack() as stack:
        memfds = [stack.enter_context(sealed_memfd(4 * PAGE)) for _ in range(5)]
        for number, fd in enumerate(memfds):
            with mapped(fd, 4 * PAGE) as view:
                view[:] = b"".join(bytes([10 * number + page]) * PAGE for page in range(4))
        items = [Item(fd.fileno(), PAGE if number % 2 else 0, 2 * PAGE) for number, fd in enumerate(memfds)]
        with udmabuf.create_list(device.fileno(), items) as dma_buf:
            size = 10 * PAGE
            assert dmabuf.size(dma_buf.fileno()) == bufinfo()[dmabuf.inode(dma_buf.fileno())].size == size
            with mapped(dma_buf, size) as view:
                assert view[::PAGE].tolist() == [0, 1, 11, 12, 20, 21, 31, 32, 40, 41]
                view[2 * PAGE + 5] = 255
            with mapped(memfds[1], 4 * PAGE) as view:
                assert view[PAGE + 5] == 255


def test_a_page_may_be_listed_again(device: OwnedFd) -> None:
    """The same page in every place of the longest list: written once, seen everywhere."""
    count = udmabuf.read_limits().max_items
    with sealed_memfd(PAGE) as backing:
        items = [Item(backing.fileno(), 0, PAGE)] * count
        with udmabuf.create_list(device.fileno(), items) as dma_buf, mapped(dma_buf, count * PAGE) as view:
            view[7] = 42
            assert set(view[7::PAGE]) == {42}


def test_list_limit(device: OwnedFd, set_parameter: Callable[[str, int], None]) -> None:
    """As many items as the parameter says and no more, at its default and at another value; none at all is refused."""
    with sealed_memfd(PAGE) as backing:
        for limit in (udmabuf.read_limits().list_limit, 3):
            set_parameter("list_limit", limit)
            limits = udmabuf.read_limits()
            assert limits.max_items == limit
            items = [Item(backing.fileno(), 0, PAGE)] * limit
            udmabuf.create_list(device.fileno(), items).close()
            for wrong in (0, limit + 1):
                with pytest.raises(HintedOSError, match=f"{wrong} items with a list_limit of {limit}") as caught:
                    udmabuf.create_list(device.fileno(), (items * 2)[:wrong])
                assert caught.value.errno == errno.EINVAL


def test_list_limit_is_for_lists_alone(device: OwnedFd, set_parameter: Callable[[str, int], None]) -> None:
    """UDMABUF_CREATE works with a list_limit of 0; a negative one is no limit."""
    with sealed_memfd(PAGE) as backing:
        set_parameter("list_limit", 0)
        udmabuf.create(device.fileno(), backing.fileno(), 0, PAGE).close()
        set_parameter("list_limit", -1)
        assert udmabuf.read_limits().max_items == 2**32 - 1
        udmabuf.create_list(device.fileno(), [Item(backing.fileno(), 0, PAGE)] * 2000).close()


def test_size_limit_is_for_the_sum(device: OwnedFd, set_parameter: Callable[[str, int], None]) -> None:
    """The items together may have size_limit_mb, and not a page more."""
    set_parameter("size_limit_mb", 1)
    with sealed_memfd(MIB) as backing:
        half = Item(backing.fileno(), 0, MIB // 2)
        udmabuf.create_list(device.fileno(), [half, half]).close()
        with pytest.raises(HintedOSError, match=f"{MIB + PAGE} bytes with a size_limit_mb of 1") as caught:
            udmabuf.create_list(device.fileno(), [half, half, Item(backing.fileno(), 0, PAGE)])
        assert caught.value.errno == errno.EINVAL


def test_one_bad_item_spoils_the_list(device: OwnedFd) -> None:
    """All or nothing, wherever the bad one stands."""
    with sealed_memfd(PAGE) as good, sealed_memfd(PAGE, seals=0) as bad:
        items = [Item(good.fileno(), 0, PAGE), Item(bad.fileno(), 0, PAGE)]
        for order in (items, items[::-1]):
            with pytest.raises(HintedOSError, match="F_SEAL_SHRINK is missing"):
                udmabuf.create_list(device.fileno(), order)


def test_others_run_meanwhile(device: OwnedFd, set_parameter: Callable[[str, int], None]) -> None:
    """Also for more items than fcntl.ioctl would release the interpreter's lock for."""
    size = 256 * MIB
    set_parameter("size_limit_mb", 256)
    part = size // 64
    with ExitStack() as made, sealed_memfd(size) as backing:
        items = [Item(backing.fileno(), number * part, part) for number in range(64)]
        assert lets_others_run(lambda: made.enter_context(udmabuf.create_list(device.fileno(), items)))
