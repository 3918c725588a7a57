# SPDX-License-Identifier: MIT
"""The shared mapping's reference count: made once, dropped with the last user, never under an array."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from udmabufd_base.fd import OwnedFd
from udmabufd_client.mapping import Map, SharedMapping

SIZE = 4 * mmap.PAGESIZE


class Memfd:
    """A memfd of SIZE bytes that counts how often a descriptor is asked for."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("udmabuf-client-test", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, SIZE)
        self.asked = 0

    def dup(self) -> OwnedFd:
        self.asked += 1
        return OwnedFd(os.dup(self.fd))

    def mappings(self) -> int:
        """Count the mappings of this memfd in this process, as the kernel has them."""
        inode = f" {os.fstat(self.fd).st_ino} "
        return sum(
            "udmabuf-client-test" in line and inode in line
            for line in Path("/proc/self/maps").read_text().splitlines()
        )


@pytest.fixture
def memfd() -> Iterator[Memfd]:
    made = Memfd()
    yield made
    os.close(made.fd)


def map_of(mapping: SharedMapping, memfd: Memfd, *, writable: bool = True) -> Map:
    return Map(mapping, memfd.dup, SIZE, writable=writable, label="buffer 1")


def test_nested_maps_share_one_mapping_that_the_last_one_drops(memfd: Memfd) -> None:
    mapping = SharedMapping()
    with map_of(mapping, memfd) as outer:
        with map_of(mapping, memfd) as inner:
            assert memfd.mappings() == 1
            assert mapping.users == 2
            inner[:5] = b"hello"
        assert bytes(outer[:5]) == b"hello"
        assert memfd.mappings() == 1
    assert (mapping.users, mapping.mapped, memfd.mappings()) == (0, False, 0)
    assert memfd.asked == 1
    with map_of(mapping, memfd) as again:
        assert bytes(again[:5]) == b"hello"
    assert memfd.asked == 2


def test_a_map_is_shared_memory_and_not_a_copy(memfd: Memfd) -> None:
    with map_of(SharedMapping(), memfd) as view:
        view[SIZE - 3 :] = b"end"
        assert os.pread(memfd.fd, 3, SIZE - 3) == b"end"
        os.pwrite(memfd.fd, b"X", 0)
        assert view[0] == ord("X")


def test_a_read_only_view_refuses_writes_while_a_writable_one_takes_them(memfd: Memfd) -> None:
    mapping = SharedMapping()
    with map_of(mapping, memfd, writable=False) as view, map_of(mapping, memfd) as writable:
        with pytest.raises(TypeError, match="read-only"):
            view[0] = 1
        writable[0] = 1
        assert view[0] == 1


def test_the_view_ends_with_its_handle(memfd: Memfd) -> None:
    handle = map_of(SharedMapping(), memfd)
    view = handle.view
    handle.close()
    handle.close()
    assert handle.closed
    with pytest.raises(ValueError, match="released"):
        view[0]
    with pytest.raises(ValueError, match="closed"):
        _ = handle.view


def test_an_array_keeps_the_memory_until_it_is_gone(memfd: Memfd) -> None:
    mapping = SharedMapping()
    with map_of(mapping, memfd) as view:
        array = np.frombuffer(view, dtype="<u4")
    assert mapping.users == 0
    assert memfd.mappings() == 1
    array[0] = 7
    assert os.pread(memfd.fd, 4, 0) == b"\7\0\0\0"
    # Whoever maps meanwhile gets that same mapping.
    with map_of(mapping, memfd) as view:
        assert view[0] == 7
        assert memfd.mappings() == 1
    assert memfd.mappings() == 1
    del array, view
    assert (memfd.mappings(), mapping.mapped) == (0, False)


def test_a_slice_of_the_view_keeps_the_memory_too(memfd: Memfd) -> None:
    with map_of(SharedMapping(), memfd) as view:
        part = view[8:16]
    part[0] = 9
    assert os.pread(memfd.fd, 1, 8) == b"\t"
    part.release()
    assert memfd.mappings() == 0


def test_an_export_lives_by_itself(memfd: Memfd) -> None:
    mapping = SharedMapping()
    view = mapping.export(memfd.dup, SIZE)
    assert (mapping.users, mapping.mapped, len(view)) == (0, True, SIZE)
    view.release()
    del view
    assert not mapping.mapped


def test_a_dropped_handle_warns_with_the_buffers_name_and_spares_the_view(memfd: Memfd) -> None:
    mapping = SharedMapping()
    with pytest.warns(ResourceWarning, match="unclosed map of buffer 1"):
        view = map_of(mapping, memfd).view
    view[0] = 3
    assert mapping.users == 0
    del view
    assert memfd.mappings() == 0


def test_a_failed_mmap_counts_nothing(memfd: Memfd) -> None:
    mapping = SharedMapping()
    with pytest.raises(ValueError, match="greater than file size"):
        Map(mapping, memfd.dup, 2 * SIZE, writable=True, label="buffer 1")
    assert (mapping.users, mapping.mapped) == (0, False)


def test_threads_that_map_and_unmap_agree_on_one_mapping(memfd: Memfd) -> None:
    mapping = SharedMapping()
    barrier = threading.Barrier(4)
    most = []

    def work() -> None:
        barrier.wait()
        for _ in range(300):
            with map_of(mapping, memfd) as view:
                view[0] = 1
                most.append(memfd.mappings())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 1200
    assert max(most) == 1
    assert (mapping.users, memfd.mappings()) == (0, 0)


def test_a_thread_that_maps_while_another_gets_its_descriptor_is_not_held_up(memfd: Memfd) -> None:
    mapping = SharedMapping()
    handles: list[Map] = []
    made: list[OwnedFd] = []

    def dup() -> OwnedFd:
        other = threading.Thread(target=lambda: handles.append(map_of(mapping, memfd)), daemon=True)
        other.start()
        other.join(30)
        assert not other.is_alive(), "the other thread waits for the mapping"
        made.append(memfd.dup())
        return made[0]

    with Map(mapping, dup, SIZE, writable=True, label="buffer 1") as view:
        assert (mapping.users, memfd.mappings()) == (2, 1)
        handles[0].view[0] = 4
        assert view[0] == 4
    assert made[0].closed
    handles[0].close()
    assert (mapping.users, memfd.mappings()) == (0, 0)
