# SPDX-License-Identifier: MIT
"""A camera's frames in our buffers: vivid captures its test pattern through V4L2_MEMORY_DMABUF, without a copy.

The witness is v4l2-ctl, which is not ours and has the same frame in memory of the driver's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.kernel import v4l2
from tests.kernel.buffers import PAGE, exported, mapped
from tests.kernel.hugepools import HUGE
from tests.kernel.importing import Vivid, adjacent, one_piece
from tests.kernel.v4l2 import queued
from tests.kernel.witness import bufinfo
from udmabufd.linux import dmabuf
from udmabufd_base.fd import OwnedFd

pytestmark = pytest.mark.guest

WIDTH, HEIGHT = 640, 360
STALE = 0xA5


@pytest.fixture
def buffers(device: OwnedFd) -> Iterator[list[OwnedFd]]:
    """Four dma-bufs of 2 MiB, full of what no frame has."""
    with ExitStack() as stack:
        made = [stack.enter_context(exported(device, HUGE))[1] for _ in range(4)]
        fill(made)
        yield made


def fill(buffers: Sequence[OwnedFd]) -> None:
    """Put into each what no frame has."""
    for fd in buffers:
        with mapped(fd, HUGE) as view:
            view[:] = bytes([STALE]) * HUGE


def contents(fd: OwnedFd) -> bytes:
    """Read a dma-buf by the CPU, in brackets."""
    size = dmabuf.size(fd.fileno())
    dmabuf.sync_start(fd.fileno(), dmabuf.DMA_BUF_SYNC_READ)
    with mapped(fd, size) as view:
        found = bytes(view)
    dmabuf.sync_end(fd.fileno(), dmabuf.DMA_BUF_SYNC_READ)
    return found


def rows(picture: bytes, stride: int, visible: int, count: int) -> list[bytes]:
    """Return the visible bytes of each row, without what may follow them."""
    return [picture[row * stride : row * stride + visible] for row in range(count)]


@pytest.mark.parametrize(
    ("fourcc", "stride", "visible", "count"),
    [
        ("YUYV", 1280, 2 * WIDTH, HEIGHT),
        ("XR24", 2560, 4 * WIDTH, HEIGHT),
        ("NV12", 768, WIDTH, HEIGHT * 3 // 2),
    ],
)
def test_frames_are_those_of_the_drivers_own_memory(
    vivid: Vivid, buffers: list[OwnedFd], fourcc: str, stride: int, visible: int, count: int, tmp_path: Path
) -> None:
    v4l2.still(vivid.mapped, WIDTH, HEIGHT, fourcc, stride)
    expected = v4l2.reference(vivid.mapped, tmp_path)
    assert len(expected) == stride * count
    assert colours(expected) >= 8, "the test pattern has eight bars"
    with queued(vivid.mapped, buffers) as camera:
        frames = v4l2.frames(camera, len(buffers))
    # Each came into a buffer of its own, one after the other.
    assert [frame.index for frame in frames] == [0, 1, 2, 3]
    assert sorted(frame.sequence for frame in frames) == [frame.sequence for frame in frames]
    for frame in frames:
        assert frame.size == len(expected)
        found = contents(buffers[frame.index])
        assert rows(found, stride, visible, count) == rows(expected, stride, visible, count)
        assert set(found[frame.size :]) == {STALE}, "the driver wrote beyond its frame"


def colours(picture: bytes) -> int:
    """Return how many different groups of four bytes there are."""
    return len({picture[offset : offset + 4] for offset in range(0, len(picture), 4)})


def test_another_pattern_is_another_frame(vivid: Vivid, buffers: list[OwnedFd], tmp_path: Path) -> None:
    """Without this the comparison above could be one of anything."""
    v4l2.still(vivid.mapped, WIDTH, HEIGHT, "YUYV")
    expected = v4l2.reference(vivid.mapped, tmp_path)
    v4l2.still(vivid.mapped, WIDTH, HEIGHT, "YUYV", pattern=10)
    with queued(vivid.mapped, buffers) as camera:
        (frame,) = v4l2.frames(camera, 1)
    assert contents(buffers[frame.index])[: frame.size] != expected


def test_an_importer_that_attaches(vivid: Vivid, device: OwnedFd, tmp_path: Path) -> None:
    """One piece of memory, attached while the stream runs, and the same frame in it."""
    v4l2.still(vivid.contiguous, 320, 180, "YUYV")
    expected = v4l2.reference(vivid.contiguous, tmp_path)
    with ExitStack() as stack:
        made = [stack.enter_context(adjacent(device, 32 * PAGE)) for _ in range(2)]
        with queued(vivid.contiguous, made) as camera:
            for fd in made:
                assert bufinfo()[dmabuf.inode(fd.fileno())].devices == ("vivid.0",)
            frames = v4l2.frames(camera, 2)
        for frame in frames:
            assert contents(made[frame.index])[: frame.size] == expected
        for fd in made:
            assert bufinfo()[dmabuf.inode(fd.fileno())].devices == ()


@pytest.mark.parametrize("instance", [0, 1])
def test_huge_pages_that_the_cpu_maps_for_a_driver(
    vivid: Vivid, device: OwnedFd, tmp_path: Path, instance: int
) -> None:
    """Linux 6.11 and 6.12 map the first page of a huge one in the place of each: taken, and the frame is lost.

    The constraint database keeps such devices from huge pages on these kernels; later ones have it right.
    """
    node = vivid.node(instance)
    v4l2.still(node, WIDTH, HEIGHT, "YUYV")
    expected = v4l2.reference(node, tmp_path)
    with one_piece(device) as fd:
        fill([fd])
        with queued(node, [fd, fd]) as camera:
            (frame, *_) = v4l2.frames(camera, 2)
        found = contents(fd)[: frame.size]
    if (6, 11) <= linux() < (6, 13):
        assert set(found[PAGE:]) == {STALE}
        assert STALE not in found[:PAGE]
    else:
        assert found == expected


def linux() -> tuple[int, ...]:
    """Return the kernel's version."""
    return tuple(int(number) for number in os.uname().release.split("-")[0].split(".")[:2])
